"""Folders that other exporters wrote: optimum's, and those made for transformers.js. They have no manifest.

The manifest is made from the graph's inputs and outputs, config.json and generation_config.json. A graph takes past
keys and values and returns past and new ones. It comes as one file, as a pair (decoder_model.onnx for the first step,
decoder_with_past_model.onnx for the others), or as the pair in one file with the input `use_cache_branch`.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..bundle.folder import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    Bundle,
    file_digest,
)
from ..bundle.foreign_graphs import WITH_PAST, Graphs, find_graphs
from ..bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    CacheType,
    FileEntry,
    LayerCache,
    Manifest,
    Model,
    Quantization,
    Source,
    Target,
    Tokens,
)
from ..bundle.onnx_file import weight_files
from ..errors import BundleCorruptError, BundleMissingError, BundleUnsupportedError
from ..host.files import MODEL_TEXT_BYTES, UnfitFileError, read_text, require_regular
from .concatenated import ConcatSession, known_input
from .graph import load_graph, require_memory

CONFIG_NAME = "config.json"
UNKNOWN = "unknown"
# The names of the context length in model configurations, and the default: models that name none have no positions, so
# no limit.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNLIMITED_CONTEXT = 1 << 20

_CACHE_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_PAST, _KEY, _VALUE = "past_key_values.", ".key", ".value"
_TEXTS = (CONFIG_NAME, GENERATION_CONFIG_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, CHAT_TEMPLATE_NAME)


def open_foreign(folder: Path, graph: str | None, threads: int) -> tuple[Bundle, ConcatSession]:
    """Load a model and describe it as a bundle. The digests are computed from the files, in a thread, while onnxruntime
    prepares the weights.

    graph: the file to use, relative to the folder, if there are several. Raises: SettingsError (if that is not clear),
    BundleMissingError, BundleCorruptError, BundleUnsupportedError, SessionError.
    """
    config = _read_json(folder / CONFIG_NAME)
    if config is None:
        raise BundleMissingError(
            f"{folder} holds neither {MANIFEST_NAME}, as a bundle does, nor {CONFIG_NAME}: give a folder that  edgelm "
            "export  or optimum wrote"
        )
    if config.get("is_encoder_decoder"):
        raise BundleUnsupportedError(
            f"{folder / CONFIG_NAME}: an encoder and a decoder (model_type {config.get('model_type')!r}): edgelm runs "
            "causal language models only"
        )
    graphs = find_graphs(folder, graph)
    if not (folder / TOKENIZER_NAME).is_file():
        raise BundleMissingError(f"{folder} holds no {TOKENIZER_NAME}: download it too, or save it with transformers")
    names = _names(folder, graphs)
    require_memory(sum((folder / name).stat().st_size for name in names if name not in _TEXTS), folder)
    with ThreadPoolExecutor(1) as pool:
        files = pool.submit(_entries, folder, names)
        main, *first = (load_graph(path, threads, ("CPUExecutionProvider",)) for path in graphs.files)
        model = _model(graphs, main, config)
        bundle = Bundle(folder, _manifest(folder, config, model, files.result()), has_manifest=False)
    return bundle, ConcatSession(main, model, first[0] if first else None)


def _model(graphs: Graphs, inference: Any, config: dict[str, Any]) -> Model:
    """The shape of the model, from the inputs and outputs of the graph that takes past keys and values."""
    inputs = {item.name: item for item in inference.get_inputs()}
    outputs = {item.name: item for item in inference.get_outputs()}
    keys = [name for name in inputs if name.startswith(_PAST) and name.endswith(_KEY)]
    unknown = [name for name in inputs if not known_input(name)]
    if unknown:
        raise BundleUnsupportedError(
            f"{graphs.main} wants the inputs {', '.join(unknown)}, which edgelm does not know: give a causal language "
            "model that takes input_ids and past_key_values"
        )
    if "input_ids" not in inputs or "logits" not in outputs or not keys:
        raise BundleUnsupportedError(
            f"{graphs.main} takes {', '.join(inputs)} and gives {', '.join(outputs)}: edgelm needs input_ids and "
            "past_key_values and logits. Export it with  --task text-generation-with-past"
        )
    layers = {int(name[len(_PAST) : -len(_KEY)]): _layer(graphs.main, inputs, name) for name in keys}
    types = {inputs[name].type for name in inputs if name.startswith(_PAST)}
    if len(types) > 1 or not types <= _CACHE_TYPES.keys():
        raise BundleUnsupportedError(
            f"{graphs.main} has a cache of {', '.join(sorted(types))}: edgelm runs float32 and float16 ones of other "
            "exporters"
        )
    tokens = inputs["input_ids"].shape[1]
    return Model(
        vocab_size=_vocab_size(graphs.main, outputs["logits"], config),
        context_length=_context_length(config),
        parameters=0,
        layers=tuple(layers.get(index) for index in range(max(layers) + 1)),
        kv=CacheType(_CACHE_TYPES[types.pop()], None),
        cache_layout="concatenated",
        # The second of two graphs was traced with one token, and may lack what several need.
        step_tokens=tokens if isinstance(tokens, int) else 1 if graphs.main.stem.startswith(WITH_PAST) else None,
    )


def _layer(path: Path, inputs: dict[str, Any], key: str) -> LayerCache:
    """One layer's cache, from the shapes (batch, heads, positions, size) of its two inputs."""
    value = key.removesuffix(_KEY) + _VALUE
    shapes = [inputs[name].shape if name in inputs else [] for name in (key, value)]
    (heads, key_size), (value_heads, value_size) = ((shape[1::2] if len(shape) == 4 else (0, 0)) for shape in shapes)
    if heads != value_heads or not all(isinstance(n, int) and n > 0 for n in (heads, key_size, value_size)):
        raise BundleUnsupportedError(
            f"{path}: {key} and {value} have the shapes {shapes}: edgelm runs caches of "
            "(batch, heads, positions, size) whose heads and sizes are numbers"
        )
    return LayerCache(heads, key_size, value_size, None)


def _vocab_size(path: Path, logits: Any, config: dict[str, Any]) -> int:
    for size in (logits.shape[-1], config.get("vocab_size")):
        if isinstance(size, int) and size > 0:
            return size
    raise BundleUnsupportedError(f"neither {path} nor {CONFIG_NAME} says how large the vocabulary is: add vocab_size")


def _context_length(config: dict[str, Any]) -> int:
    lengths = [config[name] for name in CONTEXT_NAMES if isinstance(config.get(name), int) and config[name] > 0]
    return lengths[0] if lengths else UNLIMITED_CONTEXT


def _manifest(folder: Path, config: dict[str, Any], model: Model, files: dict[str, FileEntry]) -> Manifest:
    architectures = config.get("architectures") or [config.get("model_type") or UNKNOWN]
    name = folder.resolve().name
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        source=Source(str(config.get("_name_or_path") or name), None, str(architectures[0]), None),
        target=Target(UNKNOWN, {}),
        compression=(),
        quantization=Quantization(UNKNOWN, ()),
        model=model,
        tokens=_tokens(config, _read_json(folder / GENERATION_CONFIG_NAME) or {}, _own_end(folder, model.vocab_size)),
        quality={},
        files=files,
        versions={},
    )


def _own_end(folder: Path, vocab_size: int) -> int | None:
    """The id of the end token that tokenizer_config.json names: the end of a turn in models that were trained to
    chat."""
    named = (_read_json(folder / TOKENIZER_CONFIG_NAME) or {}).get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    added = (_read_json(folder / TOKENIZER_NAME) or {}).get("added_tokens") if isinstance(text, str) else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == text:
            found = token.get("id")
            return found if isinstance(found, int) and 0 <= found < vocab_size else None
    return None


def _tokens(config: dict[str, Any], generation: dict[str, Any], own_end: int | None) -> Tokens:
    """The special tokens, from generation_config.json, else config.json, as in transformers; own_end: the tokenizer's
    end token."""
    ids = {name: generation.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        listed = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if not all(item is None or (isinstance(item, int) and not isinstance(item, bool)) for item in listed):
            raise BundleCorruptError(
                f"{name} is {value!r:.80} in {GENERATION_CONFIG_NAME} or {CONFIG_NAME}: correct it"
            )
    eos = ids["eos_token_id"]
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if own_end is not None and own_end not in ends:
        ends = (*ends, own_end)
    return Tokens(ids["bos_token_id"], ends, ids["pad_token_id"])


def _names(folder: Path, graphs: Graphs) -> list[str]:
    """The files of the bundle, relative to the folder: texts, graphs, weights. Raises: BundleMissingError;
    BundleCorruptError, if a graph names a path outside the folder."""
    names = [name for name in _TEXTS if (folder / name).is_file()]
    for name in names:
        _require_plain(folder / name)
    for graph in graphs.files:
        inside = graph.relative_to(folder)
        for weights in weight_files(graph):
            # Names that Windows reads as a drive or a parent are refused everywhere, since folders are copied.
            name = posixpath.normpath((inside.parent / weights).as_posix())
            if weights.startswith("/") or name.startswith("../") or set(weights) & set("\\:") or not name.isprintable():
                raise BundleCorruptError(f"{graph} has weights in {weights!r}, which is not a file of its folder")
            names.append(name)
        names.append(inside.as_posix())
    for name in names:
        if not (folder / name).is_file():
            raise BundleMissingError(f"{folder} holds no {name}, where weights of the model are: download it too")
    return sorted(set(names))


def _require_plain(path: Path) -> None:
    try:
        require_regular(path, MODEL_TEXT_BYTES)
    except OSError as error:
        raise BundleCorruptError(f"{path}: {error.strerror}: download or export it again") from error


def _entries(folder: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    """Size and digest of each file."""
    return {name: FileEntry((folder / name).stat().st_size, file_digest(folder / name)) for name in names}


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, in which the entries of a nested `text_config` take precedence; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        data = json.loads(read_text(path, MODEL_TEXT_BYTES))
    except UnfitFileError as error:
        raise BundleCorruptError(f"{path}: {error.strerror}: download or export it again") from error
    except OSError as error:
        raise BundleMissingError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise BundleCorruptError(f"{path} is not valid JSON ({error}): download or export it again") from error
    if not isinstance(data, dict):
        raise BundleCorruptError(f"{path} is not a JSON object: download or export it again")
    text = data.get("text_config")
    return {**data, **text} if isinstance(text, dict) else data
