"""`manifest.json`: what a bundle is, as frozen dataclasses that are written by the exporter and read by the runtime.

Reading is strict: a missing, unknown or wrongly typed key is an error that names the key, because a manifest that is
half understood gives wrong answers later. The schema version is looked at before anything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from ..errors import BundleCorruptError, BundleVersionError
from .typed_json import OPTIONAL, StrictReader

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
CACHE_TYPES = ("int8", "float32", "float16")
GRANULARITIES = ("channel", "token")
# In an INT8 cache "by token", each key and value ends with a scale of its own, a float32.
_SCALE_BYTES = 4
EXACT_SCHEMES = ("int8-rowwise", "int4-rowwise")
_READER = StrictReader(MANIFEST_NAME)

ACTIVATION_BITS, WEIGHT_BITS = (8, 16), (4, 5, 6, 8)

CacheLayout = Literal["in_place", "concatenated"]


@dataclass(frozen=True)
class Source:
    """Where the model came from. `revision` is a commit of the hub, or null for a local folder."""

    model: str
    revision: str | None
    architecture: str
    license: str | None


@dataclass(frozen=True)
class Target:
    """The machine that the bundle was made for, with every setting as it was resolved at export."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Exclusion:
    """A matrix that is stored in a wider type than the scheme's, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Quantization:
    """The scheme of the weights and activations. activations: {matrix: 8 or 16}, the bits that its activations are
    quantized to in the row-wise schemes; empty for other schemes, and in bundles from before there were 16. weights:
    {matrix: 4, 5, 6 or 8}, the bits of its weights in int4-rowwise; empty for other schemes."""

    scheme: str
    excluded: tuple[Exclusion, ...]
    activations: dict[str, int] = field(default_factory=dict, metadata={OPTIONAL: True})
    weights: dict[str, int] = field(default_factory=dict, metadata={OPTIONAL: True})


@dataclass(frozen=True)
class LayerCache:
    """The KV cache of one layer. `window` is the sliding window in tokens, or null for full attention."""

    kv_heads: int
    key_size: int
    value_size: int
    window: int | None


@dataclass(frozen=True)
class CacheType:
    """The element type of all keys and values: "int8", "float32" or "float16"; granularity of the scales:

    "channel" (fixed at export), "token" (each key and value of a head has one of its own on top of the channels', where
    compiled kernels compute attention; else as "channel"), or null.
    """

    type: str
    granularity: str | None

    @property
    def scale_bytes(self) -> int:
        """Bytes that compiled kernels need behind each key or value of a head, for its own scale."""
        return _SCALE_BYTES if self.granularity == "token" else 0


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a step hands to the next, besides keys and values, such as the last inputs of a convolution.

    Inputs are past_key_values.NAME, outputs present.NAME; `shape` is without the batch; a text begins with zeros.
    """

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Model:
    """The shape of the model. `layers[N]` is null where layer N of the source has no attention, hence no cache.

    cache_layout: "in_place" (past and present may be one buffer) or "concatenated" (present is past and the new
    tokens); step_tokens: how many new tokens a step must have, or null for any number. parameters: 0 where nobody
    counted them, in files of other exporters.
    """

    vocab_size: int
    context_length: int
    parameters: int
    layers: tuple[LayerCache | None, ...]
    kv: CacheType
    cache_layout: CacheLayout = "in_place"
    states: tuple[StateTensor, ...] = ()
    step_tokens: int | None = None


@dataclass(frozen=True)
class Tokens:
    """Special token ids. Generation stops at any of `eos`, which may be empty."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


@dataclass(frozen=True)
class FileEntry:
    """Size and tagged digest ("sha256:" and 64 hexadecimal digits) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`; see `docs/bundle.md` for the meaning of each field.

    notes: where the bundle deviates from the source's files, in sentences.
    """

    schema_version: int
    name: str
    source: Source
    target: Target
    compression: tuple[dict[str, Any], ...]
    quantization: Quantization
    model: Model
    tokens: Tokens
    quality: dict[str, Any]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    notes: tuple[str, ...] = field(default=(), metadata={OPTIONAL: True})

    @property
    def digest(self) -> str:
        """ "sha256:" and the hash of the canonical form of `files`: JSON, keys sorted, no blanks, ASCII only.

        Two bundles with the same digest hold the same bytes. Every cache key starts with it.
        """
        files = {name: dataclasses.asdict(entry) for name, entry in self.files.items()}
        canonical = json.dumps(files, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def exact_under_cuts(self) -> bool:
        """Whether a text is promised to give bit for bit the same logits however it is cut into steps.

        This needs three things: activations that are quantized row by row in every matrix product (onnxruntime
        multiplies one float32 row by another kernel than several), ONNX Runtime's fused attention, and no state besides
        keys and values.
        """
        exact = self.quantization.scheme in EXACT_SCHEMES and not self.quantization.excluded
        return exact and self.model.cache_layout == "in_place" and not self.model.states

    def to_json(self) -> str:
        """The text of `manifest.json`, indented, ending in a line feed."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def parse_manifest(text: str) -> Manifest:
    """Read the text of a `manifest.json`.

    Raises: BundleCorruptError, if it is not JSON, or a key is missing, unknown or of the wrong type;
    BundleVersionError, if it was written in another schema version.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleCorruptError(
            f"{MANIFEST_NAME} is not valid JSON ({error}): copy or export the bundle again"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("schema_version"), int):
        raise BundleCorruptError(f"{MANIFEST_NAME} has no schema_version: this is not an edgelm bundle")
    if data["schema_version"] != SCHEMA_VERSION:
        raise BundleVersionError(
            f"the bundle has schema version {data['schema_version']}, this edgelm reads version {SCHEMA_VERSION}: "
            "use a matching edgelm, or export the bundle again"
        )
    _refuse_unprintable(data, "")
    manifest = _READER.build(Manifest, data, "")
    _check_values(manifest)
    return manifest


def _refuse_unprintable(value: Any, where: str) -> None:
    """Refuse texts with unprintable characters: a terminal would obey escape sequences."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_unprintable(key, where)
            _refuse_unprintable(inner, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            _refuse_unprintable(inner, where)
    elif isinstance(value, str) and not value.isprintable():
        raise BundleCorruptError(f"{MANIFEST_NAME}: {where} holds {value!r}, which cannot be shown: export it again")


def _refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity: Python reads them, but JSON does not have them."""
    raise ValueError(f"{name} is not a JSON value")


def _check_values(manifest: Manifest) -> None:
    """Refuse values of the right type that no bundle can have."""
    model = manifest.model
    counts = {"model.vocab_size": model.vocab_size, "model.context_length": model.context_length}
    for index, layer in enumerate(model.layers):
        if layer is not None:
            sizes = {"kv_heads": layer.kv_heads, "key_size": layer.key_size, "value_size": layer.value_size}
            counts.update({f"model.layers[{index}].{key}": size for key, size in sizes.items()})
    for where, value in counts.items():
        if value < 1:
            raise _READER.mismatch(where, "1 or more", value)
    for name, entry in manifest.files.items():
        if entry.bytes < 0:
            raise _READER.mismatch(f"files.{name}.bytes", "0 or more", entry.bytes)
    quantization = manifest.quantization
    for key, found, known in (
        ("activations", quantization.activations, ACTIVATION_BITS),
        ("weights", quantization.weights, WEIGHT_BITS),
    ):
        for name, bits in found.items():
            if bits not in known:
                raise _READER.mismatch(f"quantization.{key}.{name}", " or ".join(map(str, known)), bits)
    if model.kv.type not in CACHE_TYPES:
        raise _READER.mismatch("model.kv.type", " or ".join(CACHE_TYPES), model.kv.type)
    if model.kv.granularity not in (None, *GRANULARITIES) or (model.kv.scale_bytes and model.kv.type != "int8"):
        raise _READER.mismatch(
            f"model.kv.granularity of {model.kv.type}", f"{' or '.join(GRANULARITIES)}", model.kv.granularity
        )
