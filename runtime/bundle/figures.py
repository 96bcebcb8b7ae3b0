"""The main figures of a report.json in words, for the terminal and for report.html. Standard library only.

A report may come from another version of edgelm: a figure with missing numbers is omitted, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

AGREEMENT = "Same first choice as fp32"
DISTANCE = "Distance from fp32"
ANSWERS = "Same answers as fp32"
PERPLEXITY = "Perplexity, lower is better"
_ANSWERS = ("equal", "prompts", "first_differs")
_SAME_PERCENT = 2.0  # speeds and sizes closer than this are called the same
_SAME_PERPLEXITY_PERCENT = 0.05
_LARGEST = 1e100


@dataclass(frozen=True)
class Figure:
    """One line of the report. before: the value of the fp32 graph, or None if there is nothing to compare; verdict: the
    change in words, or ""; better: True for an improvement, False for a loss, None for neither."""

    title: str
    before: str | None
    after: str
    verdict: str = ""
    better: bool | None = None


def was_changed(report: dict[str, Any]) -> bool:
    """Return True if the graph of the bundle differs from the fp32 graph: figures then have a before and an after."""
    return report.get("against_fp32") is not None


def main_figures(report: dict[str, Any]) -> list[Figure]:
    """Size, speed, memory and quality of an export."""
    changed = was_changed(report)
    figures = list(_compared(report))
    if not changed:
        figures = [Figure(figure.title, None, figure.after) for figure in figures]
    return [*figures, *_quality(report), *_arithmetic(report), *_cache(report), *_against_source(report)]


def plan_table(steps: Any) -> list[tuple[str, ...]]:
    """Titles, and a row for each step of a dry run: what it removes, and the size after it."""
    table: list[tuple[str, ...]] = [("step", "removes", "parameters", "size", "takes")]
    for step in tables_of(steps):
        if (seconds := number_of(step, "seconds")) is not None:
            counts = [number_of(step, side, "parameters") or 0 for side in ("before", "after")]
            gone = f"{counts[0] - counts[1]:,.0f} ({100 * (1 - counts[1] / max(1, counts[0])):.1f} %)"
            size = bytes_text(number_of(step, "after", "bytes") or 0)
            table.append((str(step.get("use")), gone, f"{counts[1]:,.0f}", size, duration_text(seconds)))
    return table


def compression_notes(steps: Any) -> list[str]:
    """Notes of the steps and a warning if the recipe's limit is exceeded, one sentence each."""
    notes = ((step.get("use"), step.get("details")) for step in tables_of(steps))
    found = [f"{use}: {details['note']}" for use, details in notes if isinstance(details, dict) and "note" in details]
    return [*found, *(note for step in tables_of(steps) for note in _limit_warning(step))]


def _limit_warning(step: dict[str, Any]) -> Iterator[str]:
    """The warning of the recipe's last step if its KL divergence exceeds the limit of the recipe."""
    most, lost = number_of(step, "promise", "max_kl"), number_of(step, "after", "kl")
    if most is not None and lost is not None and lost > most:
        yield (
            f"WARNING: the KL divergence from the source is {lost:.3f} nats a token, above the limit of the recipe "
            f"{step['promise'].get('recipe')} ({most:g}): use a milder recipe, or train afterwards"
        )


def bytes_text(count: float) -> str:
    """A number of bytes with a suitable unit: "68 bytes", "1.5 kB", "3.1 MB", "1.20 GB"."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:,.0f} bytes"


# Figures of a step: key, title, and format of the number.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", "{:,.0f}".format),
    ("bytes", "size", bytes_text),
    ("perplexity", "perplexity", "{:,.3f}".format),
    ("kl", "KL", "{:.4f}".format),
    ("agreement_percent", "same token", "{:.1f} %".format),
    ("last_words_percent", "last words", "{:.1f} %".format),
    ("decode_tokens_per_s", "tokens/s", "{:,.0f}".format),  # older records have it
)


def compression_table(steps: Any) -> list[tuple[str, ...]]:
    """Titles, a row for the source and one for each step of a compression. steps: report.json's `compression`. A figure
    missing in one row is a dash; a figure missing in all rows gets no column."""
    found = tables_of(steps)
    rows = (
        [("source", found[0].get("before")), *((str(step.get("use")), step.get("after")) for step in found)]
        if found
        else []
    )
    columns = [item for item in _COLUMNS if any(number_of(figures, item[0]) is not None for _, figures in rows)]
    table = [("after", *(title for _, title, _ in columns))]
    for name, figures in rows:
        numbers = [(number_of(figures, key), text) for key, _, text in columns]
        table.append((name, *("-" if number is None else text(number) for number, text in numbers)))
    return table


def duration_text(seconds: float) -> str:
    """A time with a suitable unit: "12 s", "3 min", "1.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def speed_text(tokens_per_s: float) -> str:
    """A speed: "155 tokens/s"; below 100 with one decimal."""
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 100 else f"{tokens_per_s:,.1f} tokens/s"


def count_text(count: float) -> str:
    """A large count: "2.8 million"."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f}"


def change_text(before: float, after: float, more: str, less: str) -> str:
    """The change in words: "3.6 times smaller", "12 % faster", "the same". more, less: such as "larger", "smaller"."""
    low, high = sorted((before, after))
    if low <= 0 or 100 * (high / low - 1) < _SAME_PERCENT:
        return "the same" if low > 0 or low == high else ""
    word = more if after > before else less
    if high / low >= 1.5:
        return f"{high / low:.1f} times {word}"
    return f"{100 * abs(after / before - 1):.0f} % {word}"


def _compared(report: dict[str, Any]) -> Iterator[Figure]:
    """Figures with a number before and after. Columns of `rows`: title, keys, format, words for more and less, whether
    more is better."""
    rows = (
        ("Weights", ("memory", "weights_bytes"), bytes_text, ("larger", "smaller"), False),
        ("Writing an answer", ("speed", "decode_tokens_per_s"), speed_text, ("faster", "slower"), True),
        ("Reading a prompt", ("speed", "prefill_tokens_per_s"), speed_text, ("faster", "slower"), True),
        ("Cache, for each token", ("memory", "kv_bytes_per_token"), bytes_text, ("larger", "smaller"), False),
        ("Cache, full context", ("memory", "kv_bytes_full_context"), bytes_text, ("larger", "smaller"), False),
    )
    for title, (section, key), text, words, more_is_better in rows:
        before, after = (number_of(report, section, side, key) for side in ("before", "after"))
        if before is None or after is None:
            continue
        verdict = change_text(before, after, *words)
        better = None if verdict in ("", "the same") else (after > before) == more_is_better
        yield Figure(title, text(before), text(after), verdict, better)


def _quality(report: dict[str, Any]) -> Iterator[Figure]:
    before, after, percent = (
        number_of(report, "against_fp32", f"perplexity_{key}") for key in ("before", "after", "increase_percent")
    )
    if before is not None and after is not None and percent is not None:
        same = abs(percent) < _SAME_PERPLEXITY_PERCENT
        verdict = "the same" if same else f"{abs(percent):.2f} % {'worse' if percent > 0 else 'better'}"
        better = None if same or percent > 0 else True  # a small rise is the cost of INT8, within the tolerance
        yield Figure(PERPLEXITY, f"{before:.3f}", f"{after:.3f}", verdict, better)
    mean, worst = (number_of(report, "against_fp32", key) for key in ("mean_kl", "p99_kl"))
    if mean is not None and worst is not None:
        yield Figure(DISTANCE, None, f"{mean:.2g} nats a token", f"{worst:.2g} at the 99th percentile")
    agreement = number_of(report, "against_fp32", "agreement_percent")
    if agreement is not None:
        yield Figure(AGREEMENT, None, f"{agreement:.1f} % of tokens")
    decided, positions = (number_of(report, "against_fp32", key) for key in ("decided_percent", "decided_positions"))
    if decided is not None and positions:
        yield Figure("The same, where fp32 is clear", None, f"{decided:.1f} % of {positions:,.0f} tokens")
    equal, prompts, first = (number_of(report, "against_fp32", "answers", key) for key in _ANSWERS)
    if equal is not None and prompts and first is not None:
        verdict = f"the first word differs in {first:,.0f}" if first else "the first word is the same in all"
        yield Figure(ANSWERS, None, f"{equal:,.0f} of {prompts:,.0f}, to the end", verdict)


def _arithmetic(report: dict[str, Any]) -> Iterator[Figure]:
    """How many matrices have activations of 16 bits, and how much work the others save."""
    found = report.get("arithmetic")
    matrices = found.get("matrices") if isinstance(found, dict) else None
    bits = [number_of(matrix, "activations") for matrix in matrices] if isinstance(matrices, (list, tuple)) else []
    saved = number_of(report, "arithmetic", "multiply_adds_saved_percent")
    if bits and saved is not None:
        words = f"{bits.count(16)} of {len(bits)} matrices"
        yield Figure("Activations of 16 bits", None, words, f"{saved:.0f} % of the multiply-adds saved")


def _cache(report: dict[str, Any]) -> Iterator[Figure]:
    """The INT8 cache on prompts that are not used for calibration: values out of range, and the change of answers."""
    clipped, excess, widened = (
        number_of(report, "cache", key) for key in ("clipped_percent", "largest_excess", "widened_channels")
    )
    if clipped is not None and excess is not None and widened is not None:
        verdict = f"{widened:,.0f} channels widened" if widened else ""
        words = f"{clipped:.2g} % of values, up to {excess:.3g} times" if clipped else "none"
        yield Figure("Cache values beyond range", None, words, verdict)
    cache = report.get("cache")
    kinds = cache.get("kinds") if isinstance(cache, dict) else None
    known = [number_of(kind, "kl") for kind in kinds] if isinstance(kinds, (list, tuple)) else []
    worst = max((kl for kl in known if kl is not None), default=None)
    if worst is not None:
        yield Figure("Answers, INT8 cache", None, f"at most {worst:.1e} nats from a float32 cache")


def _against_source(report: dict[str, Any]) -> Iterator[Figure]:
    equal, steps = (number_of(report, "against_source", key) for key in ("equal_steps", "steps"))
    if equal is not None and steps is not None:
        yield Figure("fp32 tokens equal to PyTorch", None, f"{equal:,.0f} of {steps:,.0f} tokens")
    difference = number_of(report, "against_source", "logit_difference")
    if difference is not None:
        yield Figure("fp32 logits against PyTorch", None, f"differ by {difference:.1e} of the largest")


def tables_of(steps: Any) -> list[dict[str, Any]]:
    """The dictionaries in a list, or [] if it is not a list."""
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, (list, tuple)) else []


def number_of(report: Any, *keys: str) -> float | None:
    """The number at a path of keys, or None."""
    for key in keys:
        report = report.get(key) if isinstance(report, dict) else None
    number = isinstance(report, (int, float)) and not isinstance(report, bool)
    # Python reads Infinity and integers of any length; the comparison also rejects NaN.
    return report if number and -_LARGEST < report < _LARGEST else None
