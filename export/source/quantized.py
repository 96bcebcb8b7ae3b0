"""Checkpoints whose weights are quantized already: detected by the configuration, before anything is loaded.

FP8 with a scale for each block is widened to float32 exactly. All other methods are refused by name: transformers reads
them with other packages, for GPUs, or gives modules that are not matrices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SourceError

_KEY = "quantization_config"
# Keys and files in which other tools declare their method.
_OTHER_KEYS = {"quantization": "MLX", "compression_config": "compressed-tensors"}
_OTHER_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
_FP8 = "fp8"
_SCALE = "_scale_inv"
_ADVICE = (
    "export the model that it was made from, whose weights are float16, bfloat16 or float32; edgelm quantizes it itself"
)


def check_quantization(folder: Path, config: dict[str, Any]) -> None:
    """Check that the weights of a folder are plain, or FP8 that can be widened.

    config: of config.json. Raises: SourceError.
    """
    found = quantization_of(config)
    method = _method(folder, config, found)
    if method is None:
        return
    if method != _FP8 or found is None:
        raise SourceError(f"{folder} holds weights that are quantized already ({method}): {_ADVICE}")
    block: Any = found.get("weight_block_size")
    form, activations = found.get("fmt", "e4m3"), found.get("activation_scheme")
    if not _is_block(block) or form != "e4m3" or activations not in (None, "dynamic"):
        raise SourceError(
            f"{folder} holds FP8 weights in another form (fmt {form!r}, weight_block_size {block!r}, activation_scheme "
            f"{activations!r}) than blocks of e4m3 with one scale each: {_ADVICE}"
        )
    _check_blocks(folder, (int(block[0]), int(block[1])))


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """quantization_config of a configuration, or of its text_config."""
    text = config.get("text_config")
    found = config.get(_KEY) or (text.get(_KEY) if isinstance(text, dict) else None)
    return found if isinstance(found, dict) else None


def widening(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `from_pretrained` that make transformers widen a checkpoint that passed `check_quantization`, also
    on a machine whose GPU could compute in FP8. Empty for plain weights."""
    found = quantization_of(config)
    if found is None:
        return {}
    from transformers import FineGrainedFP8Config

    # transformers takes only loading attributes from it, and overrides the folder's.
    skipped = found.get("modules_to_not_convert")
    make: Any = FineGrainedFP8Config
    return {_KEY: make(dequantize=True, modules_to_not_convert=skipped)}


def _method(folder: Path, config: dict[str, Any], found: dict[str, Any] | None) -> str | None:
    """The quantization method that a folder's files declare; None for plain weights."""
    if found is not None:
        return str(found.get("quant_method") or _unnamed(found))
    by_key = next((method for key, method in _OTHER_KEYS.items() if config.get(key)), None)
    return by_key or next((method for name, method in _OTHER_FILES.items() if (folder / name).is_file()), None)


def _unnamed(found: dict[str, Any]) -> str:
    """The method of a configuration that names none: bitsandbytes in old files; MLX gives only bits and group size."""
    if any(key.startswith(("load_in_", "bnb_")) for key in found):
        return "bitsandbytes"
    return f"a method without a name, of {', '.join(sorted(found)) or 'no settings'}"


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)


def _check_blocks(folder: Path, block: tuple[int, int]) -> None:
    """Check that matrices consist of whole blocks: transformers cuts a matrix into as many equal parts as it has
    scales, which is wrong if the last block is smaller."""
    shapes = _shapes(folder)
    for name, scales in shapes.items():
        weight = shapes.get(name.removesuffix(_SCALE))
        if not name.endswith(_SCALE) or weight is None or len(weight) < 2 or len(scales) < 2:
            continue
        if weight[-2:] != [scales[-2] * block[0], scales[-1] * block[1]]:
            raise SourceError(
                f"{folder}: {name.removesuffix(_SCALE)} of {weight[-2]} x {weight[-1]} is not a whole number of FP8 "
                f"blocks of {block[0]} x {block[1]} ({scales[-2]} x {scales[-1]} scales), which transformers does not "
                f"widen: {_ADVICE}"
            )


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{folder} cannot be loaded ({error}): download the model again") from error
    return shapes
