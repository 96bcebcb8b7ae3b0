"""Make quantized graphs from the fp32 graph's files, as often as needed, each with other matrices left out.

The fp32 weights stay in their file: onnx_ir maps them when they are read, and int8 matrices are computed one at a time,
when they are written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..codes.blocks import BLOCK_SCHEMES, BlockQuantizer
from ..passes import narrowing_passes, quantizing_passes


@dataclass(frozen=True)
class Quantizer:
    """graph: path of the fp32 graph; ranges: magnitudes for the scales of an INT8 cache, empty for others; activations:
    float32 or float16; blocks: for the schemes that store weights in blocks, how (None: as the scheme says); rounded:
    files of int8 matrices that are not rounded to the nearest, by name; narrow: files of those that are written in 4
    bits (`nibbles`)."""

    graph: Path
    scheme: str
    weight_bits: int
    ranges: Mapping[str, NDArray[np.float32]]
    activations: str = "float32"
    blocks: BlockQuantizer | None = None
    rounded: Mapping[str, Path] = field(default_factory=dict)
    narrow: Mapping[str, Path] = field(default_factory=dict)

    def quantized(self, excluded: Collection[str] = (), wide: Collection[str] = ()) -> ir.Model:
        """The graph that ships. excluded: names of matrices that keep the type of the activations; wide: names of
        matrices whose activations have 16 bits."""
        graph = self._apply(excluded, self.ranges, wide)
        if self.activations == "float16":
            ir.passes.PassManager(narrowing_passes())(graph)
        return graph

    @cached_property
    def matrices(self) -> list[str]:
        """Names of all matrices that the scheme quantizes: those that are missing in a quantized graph."""
        left = self._apply((), {}).graph.initializers
        # Fusing also removes constants, such as the sizes of a gate's halves: count only matrices.
        weights = ir.load(self.graph).graph.initializers.items()
        return [name for name, value in weights if name not in left and len(value.shape or ()) > 1]

    def alone(self, names: Collection[str], wide: Collection[str] = ()) -> ir.Model:
        """The fp32 graph with only these matrices quantized. Activations between them stay float32. wide: as of
        `quantized`."""
        return self._apply([name for name in self.matrices if name not in names], {}, wide)

    def _apply(
        self, excluded: Collection[str], ranges: Mapping[str, NDArray[np.float32]], wide: Collection[str] = ()
    ) -> ir.Model:
        graph = ir.load(self.graph)
        passes = quantizing_passes(
            self.scheme,
            self.weight_bits,
            ranges,
            excluded,
            self._blocks,
            rounded=self.rounded,
            wide=wide,
            narrow=self.narrow,
        )
        if passes:
            ir.passes.PassManager(passes)(graph)
        return graph

    @cached_property
    def _blocks(self) -> BlockQuantizer | None:
        settings = BLOCK_SCHEMES.get(self.scheme)
        return self.blocks or (BlockQuantizer(settings) if settings is not None else None)
