"""Medians, ratios, tables and a plot from the rounds' figures. Starts no process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFERENCE = "edgelm-int8"
_EDGELM = "edgelm"
_SPEED = "prefill", "decode"


@dataclass(frozen=True)
class Peer:
    """name: on the command line and in results; label: in tables; adapter: its module; variant: its form, in the
    adapter's terms; weights: "int8", "int4" or "fp32"."""

    name: str
    label: str
    adapter: str
    variant: str
    weights: str


def summarize(
    peers: Sequence[Peer],
    rounds: Sequence[Mapping[str, Mapping[str, Any]]],
    failures: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Medians and ranges of each peer's figures, medians of each round's ratios to `REFERENCE`, and edgelm's ratio to
    the best peer with weights of the same kind, figure by figure.

    rounds: figures by peer; a figure is missing if its measurement failed. failures: reasons, by peer and stage. Ratios
    are edgelm's figure divided by the peer's.
    """
    rows = {peer.name: _row(peer, rounds) | {"failures": dict(failures.get(peer.name, {}))} for peer in peers}
    return {
        "rounds": len(rounds),
        "peers": rows,
        "to_best": {name: _to_best(name, rows) for name, row in rows.items() if _is_edgelm(name)},
        "all": list(rounds),
    }


def _is_edgelm(name: str) -> bool:
    return name.startswith(_EDGELM)


def _row(peer: Peer, rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for one in rounds:
        for key, value in one.get(peer.name, {}).items():
            if not isinstance(value, int | float):
                continue
            values.setdefault(key, []).append(value)
            if key in one.get(REFERENCE, {}) and value:
                ratios.setdefault(key, []).append(one[REFERENCE][key] / value)
    return {
        "label": peer.label,
        "weights": peer.weights,
        "medians": {key: statistics.median(found) for key, found in values.items()},
        "ranges": {key: [min(found), max(found)] for key, found in values.items()},
        "ratios": {key: statistics.median(found) for key, found in ratios.items()},
    }


def _to_best(name: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By figure: the peer with weights of the same kind and the best median, and edgelm's median divided by it."""
    weights = rows[name]["weights"]
    others = {key: row["medians"] for key, row in rows.items() if row["weights"] == weights and not _is_edgelm(key)}
    found = {}
    for key, own in rows[name]["medians"].items():
        known = {peer: medians[key] for peer, medians in others.items() if key in medians}
        if known:
            best = (max if key.startswith(_SPEED) else min)(known, key=lambda peer: known[peer])
            found[key] = {"peer": best, "ratio": own / known[best]}
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables: speed, start and size, ratios, and failures."""
    contexts = _contexts(report)
    speeds = {f"{kind}_{context}": f"{kind} {context:,}" for kind in _SPEED for context in contexts}
    costs = {"file_mb": "weights, MB", "load_s": "load, s", "first_token_s": "first token, s"}
    costs |= {f"peak_mb_{context}": f"peak MB at {context:,}" for context in contexts}
    rows = report["peers"]
    machine = report["machine"]
    conditions = [f"{machine['cpu']} ({', '.join(machine['features'])})", f"{machine['threads']} threads"]
    conditions += [f"rounds: {report['rounds']}", report["date"][:10]]
    parts = [f"{', '.join(conditions)}: {_versions(report['versions'])}.\n"]
    if contexts:
        parts.append(
            "Tokens per second, medians (range):\n\n" + _table(rows, speeds, lambda row, key: _spread(row, key, 1))
        )
        parts.append(
            "Start and memory, medians (range):\n\n" + _table(rows, costs, lambda row, key: _spread(row, key, 2))
        )
        both = {**speeds, **costs}
        others = {name: row for name, row in rows.items() if name != REFERENCE}
        if REFERENCE in rows:
            label = rows[REFERENCE]["label"]
            parts.append(f"{label}, divided by each:\n\n" + _table(others, both, _ratio))
        parts.append("Divided by the best peer with weights of as many bits:\n\n" + _best(report, both))
    if report.get("quality"):
        parts.append("Beside the fp32 model, on the same token ids:\n\n" + _quality(report["quality"]))
    failed = [
        f"- {row['label']}, {_doing(stage)}: {reason}"
        for row in rows.values()
        for stage, reason in row["failures"].items()
    ]
    if failed:
        parts.append("Not measured:\n\n" + "\n".join(failed) + "\n")
    return "\n".join(parts)


def _quality(rows: Mapping[str, Mapping[str, Any]]) -> str:
    titles = [
        "",
        "KL, nats a token",
        "99th percentile",
        "perplexity",
        "same token",
        "equal answers",
        "equal first tokens",
    ]
    lines = [titles, ["---"] * len(titles)]
    for row in rows.values():
        on_text = ["-"] * 4
        if "kl" in row:
            on_text = [
                f"{row['kl']:.5f}",
                f"{row['kl_p99']:.4f}",
                f"{row['perplexity']:.3f}",
                f"{row['same_token']:.2%}",
            ]
        answers = [f"{row[key]} of {row['answer_count']}" for key in ("equal_answers", "equal_first")]
        lines.append([row["label"], *on_text, *(answers if row["answer_count"] else ["-", "-"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _contexts(report: Mapping[str, Any]) -> list[int]:
    keys = {key for row in report["peers"].values() for key in row["medians"]}
    return sorted(int(key.removeprefix("decode_")) for key in keys if key.startswith("decode_"))


def _versions(versions: Mapping[str, Mapping[str, str]]) -> str:
    """The peers' own packages; dependencies such as torch are listed in the JSON."""
    leading = [next(iter(found.items())) for found in versions.values() if found]
    return ", ".join(f"{name} {number}" for name, number in leading)


def _table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str],
    cell: Callable[[Mapping[str, Any], str], str],
) -> str:
    lines = [["", *columns.values()], ["---"] * (len(columns) + 1)]
    lines += [[row["label"], *(cell(row, key) for key in columns)] for row in rows.values() if row["medians"]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _spread(row: Mapping[str, Any], key: str, digits: int) -> str:
    if key not in row["medians"]:
        return "-"
    low, high = (_number(value, digits) for value in row["ranges"][key])
    middle = _number(row["medians"][key], digits)
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float, digits: int) -> str:
    """Three significant digits; large figures need no decimals."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.{digits if value < 10 else 1}f}"


def _ratio(row: Mapping[str, Any], key: str) -> str:
    return f"{row['ratios'][key]:.2f}" if key in row["ratios"] else "-"


def _best(report: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    rows = {}
    for name, found in report["to_best"].items():
        texts = {key: f"{one['ratio']:.2f} ({one['peer']})" for key, one in found.items()}
        rows[name] = {"label": report["peers"][name]["label"], "medians": texts}
    return _table(rows, columns, lambda row, key: row["medians"].get(key, "-"))


def _doing(stage: str) -> str:
    if stage.isdigit():
        return f"measurement at {int(stage):,} tokens"
    return "first token" if stage == "first" else stage


def plot(report: Mapping[str, Any], file: Path) -> None:
    """Bars of the main figures, one panel each, with the rounds' ranges; an SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in report["peers"].values() if row["medians"]]
    contexts = _contexts(report)
    panels = [
        ("prefill, tokens/s", [f"prefill_{context}" for context in contexts]),
        ("decode, tokens/s", [f"decode_{context}" for context in contexts]),
        ("load to first token, s", ["first_token_s"]),
        *((f"peak MB at {context:,}", [f"peak_mb_{context}"]) for context in contexts[-1:]),
    ]
    with mpl.rc_context({"svg.hashsalt": "edgelm", "font.size": 8}):
        figure = Figure(figsize=(13, 0.8 + 0.42 * len(rows)), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
            _bars(axes, rows, keys, contexts)
            axes.set_title(title, fontsize=9)
        figure.axes[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
        figure.axes[0].invert_yaxis()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            labels = [f"{label} tokens of context" for label in labels]
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], contexts: Sequence[int]) -> None:
    height = 0.8 / max(len(keys), 1)
    for number, key in enumerate(keys):
        found = [(place, row) for place, row in enumerate(rows) if key in row["medians"]]
        values = [row["medians"][key] for _, row in found]
        ranges = [row["ranges"][key] for _, row in found]
        axes.barh(
            [place + (number - (len(keys) - 1) / 2) * height for place, _ in found],
            values,
            height * 0.9,
            xerr=[
                [value - low for value, (low, _) in zip(values, ranges, strict=True)],
                [high - value for value, (_, high) in zip(values, ranges, strict=True)],
            ],
            color=[_color(row["label"], number) for _, row in found],
            error_kw={"linewidth": 0.7},
            label=f"{contexts[number]:,}" if len(keys) > 1 else None,
        )
    axes.spines[["top", "right"]].set_visible(False)


def _color(label: str, number: int) -> tuple[float, float, float]:
    """Blue for edgelm, grey for others, lighter with each longer context."""
    base = (0.10, 0.37, 0.66) if _is_edgelm(label) else (0.35, 0.35, 0.35)
    light = 0.27 * min(number, 3)
    return base[0] + (1 - base[0]) * light, base[1] + (1 - base[1]) * light, base[2] + (1 - base[2]) * light
