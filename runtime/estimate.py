"""How much memory a bundle will take, before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bundle.folder import GRAPH_NAME, TOKENIZER_NAME, WEIGHTS_NAME, Bundle
from .errors import SettingsError, shown
from .host.memory import available_bytes
from .sessions import kernels
from .sessions.kv_cache import KVCache

# Python, numpy, onnxruntime and tokenizers with a small model, on Linux; 45 MB of it are mapped library files.
_PROGRAM_BYTES = 80_000_000
# Memory per byte of tokenizer.json and of the graph, once they are parsed.
_TOKENIZER_SHARE, _GRAPH_SHARE = 6.0, 4.0
# Memory for steps, as a part of the rest. Kernels need little; without them, onnxruntime widens keys and values, and
# holds two copies of a matrix while it loads.
_WORK_WITH_KERNELS, _WORK_WITHOUT = 0.05, 0.3


@dataclass(frozen=True)
class MemoryEstimate:
    """Physical memory, in bytes, of a process that runs a bundle on the CPU.

    program_bytes: Python, onnxruntime, the graph and the tokenizer; weights_bytes: with kernels, pages of the mapped
    file, which the system may drop and processes share, else a copy; cache_bytes: the KV cache of the given texts;
    work_bytes: extra memory for loading and steps; available_bytes: what is free now. The budgets of the response cache
    and the prefix cache come on top.
    """

    program_bytes: int
    weights_bytes: int
    cache_bytes: int
    work_bytes: int
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of the four parts."""
        return self.program_bytes + self.weights_bytes + self.cache_bytes + self.work_bytes

    @property
    def fits(self) -> bool:
        """Whether the machine has so much memory free."""
        return self.total_bytes <= self.available_bytes


def estimate_memory(path: str | Path, *, context: int | None = None, rows: int = 1) -> MemoryEstimate:
    """How much memory it takes to load a bundle and run texts in it. Nothing is loaded.

    context: tokens of the longest text (None: the model's whole context); rows: texts at once. Cost: some small reads.
    Raises: SettingsError; BundleMissingError, also for folders of other exporters, which have no manifest;
    BundleCorruptError, BundleVersionError; SessionError for kernels that cannot be used.
    """
    for name, value in (("context", 1 if context is None else context), ("rows", rows)):
        if type(value) is not int or value < 1:
            raise SettingsError(f"{name} must be 1 or more, found {shown(value)}")
    bundle = Bundle.open(path)
    use = kernels.use_in(bundle.path / GRAPH_NAME)
    model = bundle.manifest.model
    sizes = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    cache = KVCache(model, scale_bytes=model.kv.scale_bytes if use.attend else 0)
    positions = min(context or model.context_length, model.context_length)
    program = _PROGRAM_BYTES + round(_TOKENIZER_SHARE * sizes[TOKENIZER_NAME] + _GRAPH_SHARE * sizes[GRAPH_NAME])
    weights, text = sizes.get(WEIGHTS_NAME, 0), rows * positions * cache.bytes_per_position()
    work = _WORK_WITH_KERNELS if use.compute_layers else _WORK_WITHOUT
    return MemoryEstimate(program, weights, text, round(work * (program + weights + text)), available_bytes())
