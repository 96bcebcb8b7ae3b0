"""report.html: the report as one self-contained page with charts and style, which loads nothing.

Fills `templates/report.html` with the data of `report`, texts of `runtime.bundle.figures` and drawings of `charts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.figures import (
    AGREEMENT,
    PERPLEXITY,
    Figure,
    bytes_text,
    compression_notes,
    compression_table,
    count_text,
    main_figures,
    speed_text,
    was_changed,
)
from ...runtime.bundle.side_by_side import examples
from ...runtime.bundle.training import training_curves
from . import charts
from .charts import Row

if TYPE_CHECKING:
    import jinja2

_REPORT, _COMPRESSED = "report.html", "compressed.html"
_SHOWN_LAYERS = 20
_TILES = ("Weights", "Writing an answer", "Cache, full context", AGREEMENT)


def page(report: dict[str, Any]) -> str:
    """The page of a report, as text. Well-formed XML; the same report gives the same text."""
    figures = main_figures(report)
    return _template(_REPORT).render(
        report=report,
        changed=was_changed(report),
        figures=figures,
        tiles=_tiles(figures),
        perplexity=next((figure for figure in figures if figure.title == PERPLEXITY), None),
        parts=_parts(report),
        examples=examples(report),
        **_compression(report.get("compression")),
        charts=_charts(report),
        seconds=sum(stage["seconds"] for stage in report["stages"]),
        peak=max((stage["peak_bytes"] for stage in report["stages"]), default=0),
        bytes_text=bytes_text,
        count_text=count_text,
    )


def compressed_page(name: str, recipe: str, steps: Sequence[dict[str, Any]]) -> str:
    """The page of a compression, as `page`. name: of the model; steps: as a record holds them."""
    return _template(_COMPRESSED).render(name=name, recipe=recipe, **_compression(steps))


def _template(name: str) -> jinja2.Template:
    import jinja2

    def read(name: str) -> str:
        return (resources.files("edgelm.export") / "templates" / name).read_text(encoding="utf-8")

    loader = jinja2.FunctionLoader(read)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).get_template(name)


def _compression(steps: Any) -> dict[str, Any]:
    """What the template of a compression shows: rows, notes, and the curves and samples of each training."""
    trainings = [
        {
            "use": curve.use,
            "words": curve.words,
            "samples": curve.samples,
            "charts": [
                charts.curves(f"training{number}-{index}", title, curve.steps, series)
                for index, (title, series) in enumerate(curve.charts())
            ],
        }
        for number, curve in enumerate(training_curves(steps))
    ]
    return {"steps": compression_table(steps), "step_notes": compression_notes(steps), "trainings": trainings}


def _tiles(figures: list[Figure]) -> list[dict[str, Any]]:
    """The most important figures: a title, a large line, a small line, and whether it is better."""
    verdicts = {figure.title: figure.verdict for figure in figures}
    tiles = []
    for figure in figures:
        tile = {"title": figure.title, "large": figure.after, "small": figure.verdict, "better": figure.better}
        if figure.before is not None and figure.better is not None:
            tile.update(large=figure.verdict, small=f"{figure.after} instead of {figure.before}")
        if figure.title == AGREEMENT:
            tile.update(small=f"perplexity: {verdicts[PERPLEXITY]}")
        if figure.title in _TILES:
            tiles.append(tile)
    return tiles


def _parts(report: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """Colour, name, bytes before and after of each part of the model."""
    before, after = report["parts"]["before"], report["parts"]["after"]
    rows = [(f"part{index}", part, before[part], after[part]) for index, part in enumerate(before)]
    return [row for row in rows if row[2] or row[3]]


def _charts(report: dict[str, Any]) -> dict[str, str]:
    """SVG by name. Charts without figures in this report are left out."""
    drawn = {"size": _size(report), "speed": _speed(report), "memory": _memory(report), "stages": _stages(report)}
    quality = report["against_fp32"]
    if quality:
        percent = quality["agreement_percent"]
        drawn["agreement"] = charts.squares("agreement", f"{percent:.1f} of 100 squares are filled", percent)
        if quality.get("positions"):
            drawn["positions"] = _positions(quality["positions"])
    # Without groups nothing was measured: models that are fed token by token have 16 bits everywhere.
    if report.get("arithmetic") and report["arithmetic"]["matrices"]:
        drawn["arithmetic"] = _arithmetic(report["arithmetic"]["matrices"])
    if report.get("sensitivity"):
        drawn["sensitivity"] = _sensitivity(report["sensitivity"])
    return drawn


def _sides(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The sides to show ("before", "after"), each with its label."""
    after = ("after", report["scheme"])
    return [("before", "fp32"), after] if was_changed(report) else [after]


def _size(report: dict[str, Any]) -> str:
    whole = max(sum(parts.values()) for parts in report["parts"].values()) or 1
    rows = []
    for side, words in _sides(report):
        sizes = report["parts"][side]
        segments = [(size / whole, f"part{index}") for index, size in enumerate(sizes.values())]
        rows.append(Row(words, bytes_text(sum(sizes.values())), segments))
    return charts.bars("size", "Size of the weights by part", rows)


def _speed(report: dict[str, Any]) -> str:
    rows = []
    for title, key in (("Writing", "decode_tokens_per_s"), ("Reading", "prefill_tokens_per_s")):
        fastest = max(report["speed"][side][key] for side, _ in _sides(report))
        for side, words in _sides(report):
            speed = report["speed"][side][key]
            rows.append(Row(f"{title}, {words}", speed_text(speed), [(speed / fastest, side)]))
    return charts.bars("speed", "Tokens a second", rows)


def _memory(report: dict[str, Any]) -> str:
    sides = {side: report["memory"][side] for side, _ in _sides(report)}
    ends = {side: memory["weights_bytes"] + memory["kv_bytes_full_context"] for side, memory in sides.items()}
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next(((unit, size) for unit, size in units if max(ends.values()) >= size), units[-1])
    series = [(words, sides[side]["weights_bytes"] / size, ends[side] / size, side) for side, words in _sides(report)]
    series.sort(key=lambda item: -item[2])
    return charts.lines("memory", "Weights and cache by length of the text", report["context_length"], series, unit)


def _stages(report: dict[str, Any]) -> str:
    longest = max((stage["seconds"] for stage in report["stages"]), default=0) or 1
    rows = [
        Row(
            stage["name"],
            f"{stage['seconds']:,.1f} s, {bytes_text(stage['peak_bytes'])}",
            [(stage["seconds"] / longest, "after")],
        )
        for stage in report["stages"]
    ]
    return charts.bars("stages", "Time and peak memory of each stage", rows)


def _positions(positions: list[dict[str, Any]]) -> str:
    worst = max(float(item["mean_kl"]) for item in positions) or 1
    rows = [
        Row(
            f"token {item['end']}"
            if item["end"] - item["begin"] == 1
            else f"tokens {item['begin'] + 1} to {item['end']}",
            f"{item['mean_kl']:.2g}",
            [(max(float(item["mean_kl"]), 0) / worst, "after")],
        )
        for item in positions
    ]
    return charts.bars("positions", "Distance from fp32 by position in the text", rows)


def _arithmetic(matrices: list[dict[str, Any]]) -> str:
    """The matrices that would lose most with activations of 8 bits, with the bits that they got."""
    ranked = sorted(matrices, key=lambda matrix: -float(matrix["kl_if_8"]))[:_SHOWN_LAYERS]
    worst = max((float(matrix["kl_if_8"]) for matrix in ranked), default=0) or 1
    rows = [
        Row(
            str(matrix["name"]),
            f"{matrix['kl_if_8']:.1e}, {matrix['activations']} bits",
            [(max(float(matrix["kl_if_8"]), 0) / worst, "before" if matrix["activations"] == 8 else "after")],
        )
        for matrix in ranked
    ]
    return charts.bars("arithmetic", "What activations of 8 bits would cost each matrix", rows)


def _sensitivity(layers: list[dict[str, Any]]) -> str:
    """The most sensitive layers first, by rise of perplexity in percent or by KL divergence."""
    key, text = ("perplexity_increase_percent", "{:+.3f} %")
    if any(key not in layer for layer in layers):
        key, text = ("kl", "{:.2e}")
    ranked = sorted(layers, key=lambda layer: -float(layer[key]))[:_SHOWN_LAYERS]
    worst = max(float(ranked[0][key]), 0) or 1
    rows = [
        Row(str(layer["name"]), text.format(layer[key]), [(max(float(layer[key]), 0) / worst, "after")])
        for layer in ranked
    ]
    return charts.bars("sensitivity", "What each layer costs when it alone is quantized", rows)
