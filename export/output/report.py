"""The data of report.json: sizes by part, quality, speed, memory, stages.

Does not format anything; `report_html` and `edgelm inspect --report` show it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...runtime.bundle import folder as names
from ...runtime.bundle.manifest import CacheType, Model, Source
from ...runtime.evaluation.speed import Speed
from ...runtime.host import machine
from ...runtime.sessions.kv_cache import KVCache
from ..gate import verify
from ..gate.cache_judge import CacheAgreement
from ..gate.quality import QuantizedAgreement
from ..gate.sensitivity import Sensitivity
from ..passes.functions import NORM_INPUTS
from ..stages import StageRecord
from . import package
from .report_html import page

# Parts of a model by names of weights. The first match counts, so a norm inside attention is a norm.
_PARTS = {
    "norms": re.compile(r"norm|(^|[._])ln|[._]ln_?\w*\."),
    "attention": re.compile(r"attn|attention|[._](q|k|v|o|qkv|out)_proj|^cache\."),
    "MLP": re.compile(r"mlp|ffn|feed_forward|experts|moe|[._]fc_?\d|(gate|up|down)_proj|dense_\w*to_\w*h"),
    "embedding and head": re.compile(r"embed|[._]wte|[._]wpe|head"),
}
_OTHER = "other"
_NORM_OPERATOR = "LayerNormalization"


@dataclass(frozen=True)
class Measurements:
    """The input of the report.

    model: with the bundle's type of cache; before, after: folders of the fp32 graph and of the bundle; speeds: of
    "before" and "after"; against_fp32: None if the two are the same graph; stages: finished ones; path, refused_paths:
    how the model was traced, and why not in other ways; examples: prompts with both graphs' answers; arithmetic: the
    choice of 8 and 16 bits for activations, with cost and gain, None for other schemes; weights: the same for the bits
    of weights; cache: None for a float32 cache; without_genai: why onnxruntime-genai cannot open the bundle, None if it
    can; compression: earlier compression steps with their figures; not_run: what could not be tried on this machine, in
    words; notes: where the bundle deviates from the source's files.
    """

    name: str
    source: Source
    target: str
    scheme: str
    model: Model
    before: Path
    after: Path
    speeds: dict[str, Speed]
    against_source: verify.SourceAgreement
    against_fp32: QuantizedAgreement | None
    stages: Sequence[StageRecord]
    path: str
    refused_paths: Sequence[str] = ()
    sensitivity: Sequence[Sensitivity] = ()
    examples: Sequence[dict[str, Any]] = ()
    arithmetic: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    cache: CacheAgreement | None = None
    without_genai: str | None = None
    compression: Sequence[dict[str, Any]] = ()
    not_run: Sequence[str] = ()
    notes: Sequence[str] = ()


def build_report(found: Measurements) -> dict[str, Any]:
    """The content of report.json. Sizes are in bytes, read from the written graphs."""
    sides = {"before": found.before, "after": found.after}
    parts = {side: part_bytes(folder / names.GRAPH_NAME) for side, folder in sides.items()}
    models = {"before": dataclasses.replace(found.model, kv=CacheType("float32", None)), "after": found.model}
    return {
        "model": found.name,
        "architecture": found.source.architecture,
        "license": found.source.license,
        "target": found.target,
        "scheme": found.scheme,
        "kv": found.model.kv.type,
        "parameters": found.model.parameters,
        "layers": len(found.model.layers),
        "context_length": found.model.context_length,
        "bytes": {
            side: sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
            for side, folder in sides.items()
        },
        "parts": parts,
        "memory": {side: _memory(models[side], parts[side]) for side in sides},
        "speed": {side: _speed(speed) for side, speed in found.speeds.items()},
        "against_source": found.against_source.measured(),
        "against_fp32": None if found.against_fp32 is None else found.against_fp32.measured(),
        "examples": list(found.examples),
        "arithmetic": found.arithmetic,
        "weights": found.weights,
        "cache": None if found.cache is None else found.cache.measured(),
        "path": found.path,
        "refused_paths": list(found.refused_paths),
        "sensitivity": [item.measured() for item in found.sensitivity],
        "genai": {"written": found.without_genai is None, "reason": found.without_genai},
        "compression": list(found.compression),
        "not_run": list(found.not_run),
        "notes": list(found.notes),
        "stages": [dataclasses.asdict(record) for record in found.stages],
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json for programs, report.html for people."""
    package.write_json(folder / names.REPORT_NAME, report)
    (folder / names.REPORT_PAGE_NAME).write_text(page(report), encoding="utf-8")


def part_bytes(graph: Path) -> dict[str, int]:
    """Bytes of a graph's weights by part of the model: embedding and head, attention, MLP, norms, other.

    A matrix that embedding and head share counts once; a merged matrix counts for the first of its parts. Scales of the
    cache belong to attention; position tables and constants are "other".
    """
    sizes = dict.fromkeys(("embedding and head", "attention", "MLP", "norms", _OTHER), 0)
    for value in ir.load(graph).graph.initializers.values():
        assert value.const_value is not None
        sizes[_part(value)] += value.const_value.nbytes
    return sizes


def _part(value: ir.Value) -> str:
    if value.dtype == ir.DataType.INT64:
        return _OTHER  # axes and shapes, which are named after the weights that they serve
    if any(_NORM_OPERATOR in use.node.op_type or (use.node.op_type, use.idx) in NORM_INPUTS for use in value.uses()):
        return "norms"
    name = (value.name or "").lower()
    return next((part for part, pattern in _PARTS.items() if pattern.search(name)), _OTHER)


def _memory(model: Model, parts: dict[str, int]) -> dict[str, int]:
    """Memory, with the scales that kernels keep for each key and value. Without kernels a cache is smaller by these."""
    per_token = KVCache(model, scale_bytes=model.kv.scale_bytes).bytes_per_position()
    return {
        "weights_bytes": sum(parts.values()),
        "kv_bytes_per_token": per_token,
        "kv_bytes_full_context": per_token * model.context_length,
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "prompt_tokens": speed.prompt_tokens,
        "prefill_tokens_per_s": round(speed.prefill_tokens_per_s, 1),
        "decode_tokens_per_s": round(speed.decode_tokens_per_s, 1),
        "threads": machine.default_threads(),
    }
