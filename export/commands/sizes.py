"""The output of `edgelm export --sizes`: a table of sizes and their loss, and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..sizes import SizePoint

_WIDTH, _HEIGHT = 60, 12


def print_sizes(console: Console, model: str, points: Sequence[SizePoint]) -> None:
    """Print a row for each point, the plot, and the command that exports one of them."""
    from rich.table import Table

    table = Table(title=f"{model}: what a size costs")
    for title in ("size", "bits a parameter", "4-bit matrices", "distance from fp32", "perplexity", "decode"):
        table.add_column(title, justify="right")
    for point in points:
        table.add_row(
            f"{point.bytes / 1e6:,.2f} MB",
            f"{point.bits:.2f}",
            f"{point.narrow} of {point.matrices}",
            f"{point.mean_kl:.4f} nats",
            f"{point.perplexity_increase_percent:+.2f} %",
            f"{point.decode_tokens_per_s:,.0f} tokens/s",
        )
    console.print(table)
    console.print(picture(points), markup=False)
    middle = points[len(points) // 2]
    console.print(f"Nothing was written. To write one:  edgelm export {model} --size {middle.bytes / 1e6:.2f}MB")


def picture(points: Sequence[SizePoint]) -> str:
    """A plot in characters: distance from fp32 (logarithmic) over size."""
    sizes = [point.bytes for point in points]
    heights = [math.log(max(point.mean_kl, 1e-9)) for point in points]
    rows = [[" "] * (_WIDTH + 1) for _ in range(_HEIGHT + 1)]
    for size, height in zip(sizes, heights, strict=True):
        x = round(_WIDTH * _share(size, sizes))
        rows[round(_HEIGHT * (1 - _share(height, heights)))][x] = "●"
    labels = {0: f"{math.exp(max(heights)):.4f} nats", _HEIGHT: f"{math.exp(min(heights)):.4f} nats"}
    lines = [f"{labels.get(index, ''):>12} │{''.join(row).rstrip()}" for index, row in enumerate(rows)]
    left, right = f"{min(sizes) / 1e6:,.2f} MB", f"{max(sizes) / 1e6:,.2f} MB"
    axis = [f"{'':>12} └{'─' * (_WIDTH + 1)}", f"{'':>14}{left}{right:>{_WIDTH + 1 - len(left)}}"]
    return "\n".join([*lines, *axis])


def _share(value: float, among: Sequence[float]) -> float:
    low, high = min(among), max(among)
    return 0.0 if high == low else (value - low) / (high - low)
