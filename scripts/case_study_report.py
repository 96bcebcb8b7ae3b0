"""The report of case_study.py: a table of all forms of the model, their promises, and their answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SOURCE = "transformers"
# The promise: 800 to 150 ms, half the size, 30 % fewer parameters, quality kept. For perplexity, "kept" means within
# the export gate's limit; for LAMBADA, within the resolution of 500 passages.
_TIMES, _SIZE, _PARAMETERS = 800 / 150, 0.5, 0.7
_PERPLEXITY_PERCENT, _POINTS = 3.0, 3.0
_MISSING = "-"

Figures = Mapping[str, Any]


def markdown(figures: Figures, titles: Mapping[str, str]) -> str:
    """The whole report. figures: from case_study.py; titles: of the forms by name, the source's first."""
    return "\n".join([*_table(figures, titles), "", *_promises(figures, titles), "", *_answers(figures, titles)])


def _table(figures: Figures, titles: Mapping[str, str]) -> Iterator[str]:
    texts = sorted({key.rsplit("/", 1)[1] for key in figures if "/perplexity/" in key})
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("parameters, million", lambda name: _number(_parameters(figures, name), 1, 1e-6)),
        ("weights and graph, MB", lambda name: _number(figures.get(f"{name}/bytes"), 1, 1e-6)),
        ("share of the float32 bytes", lambda name: _percent(_share(figures, name))),
        ("200 tokens, s", lambda name: _number(_median(figures, name, "answer_s"), 2)),
        ("times as fast, same round", lambda name: _spread(_times(figures, name))),
        ("first token, ms", lambda name: _number(_median(figures, name, "first_s"), 0, 1e3)),
        ("memory, largest, MB", lambda name: _number(_median(figures, name, "peak_mb"), 0)),
    ]
    rows.extend((f"perplexity, {text}", lambda name, text=text: _against(figures, name, text)) for text in texts)
    rows.append(("LAMBADA, percent", lambda name: _number(_last_words(figures, name), 1)))
    yield "| | " + " | ".join(titles.values()) + " |"
    yield "|---|" + "---|" * len(titles)
    for title, cell in rows:
        yield f"| {title} | " + " | ".join(cell(name) for name in titles) + " |"


def _promises(figures: Figures, titles: Mapping[str, str]) -> Iterator[str]:
    """A row for each promised figure, with yes or no."""
    others = [name for name in titles if name != SOURCE]
    rows: list[tuple[str, Callable[[str], bool | None]]] = [
        (f"an answer {_TIMES:.1f} times as fast", lambda name: _holds(_middle(_times(figures, name)), _TIMES)),
        ("half the size", lambda name: _holds(_SIZE, _share(figures, name))),
        ("30 % fewer parameters", lambda name: _holds(_PARAMETERS, _ratio(figures, name))),
        (
            f"quality kept: perplexity +{_PERPLEXITY_PERCENT:.0f} %, LAMBADA {_POINTS:.0f} points, or less",
            lambda name: _kept(figures, name),
        ),
    ]
    yield "| promised | " + " | ".join(titles[name] for name in others) + " |"
    yield "|---|" + "---|" * len(others)
    for title, holds in rows:
        words = {True: "yes", False: "no", None: _MISSING}
        yield f"| {title} | " + " | ".join(words[holds(name)] for name in others) + " |"


def _answers(figures: Figures, titles: Mapping[str, str]) -> Iterator[str]:
    found = {name: figures[f"{name}/answers"] for name in titles if f"{name}/answers" in figures}
    for place, (question, _) in enumerate(next(iter(found.values()), [])):
        yield f"**{_line(question)}**\n"
        for name, answers in found.items():
            yield f"- {titles[name]}: {_line(answers[place][1])}"
        yield ""


def _kept(figures: Figures, name: str) -> bool | None:
    """Whether every perplexity and LAMBADA are within bounds of the source's; None if one was not measured."""
    texts = [key.rsplit("/", 1)[1] for key in figures if key.startswith(f"{SOURCE}/perplexity/")]
    rises = [_rise(figures, name, text) for text in texts]
    words = (_last_words(figures, SOURCE), _last_words(figures, name))
    if not rises or None in rises or None in words:
        return None
    return max(rises) <= _PERPLEXITY_PERCENT and words[0] - words[1] <= _POINTS


def _rise(figures: Figures, name: str, text: str) -> Any:
    """Percent by which a text's perplexity exceeds the source's."""
    whole, own = _perplexity(figures, SOURCE, text), _perplexity(figures, name, text)
    return None if whole is None or own is None else 100 * (own / whole - 1)


def _against(figures: Figures, name: str, text: str) -> str:
    own, rise = _perplexity(figures, name, text), _rise(figures, name, text)
    return _number(own, 2) + ("" if name == SOURCE or rise is None else f" ({rise:+.1f} %)")


def _perplexity(figures: Figures, name: str, text: str) -> Any:
    """Per token of the source: a form whose vocabulary was trimmed has more tokens."""
    found, whole = (figures.get(f"{form}/perplexity/{text}", {}).get("perplexity") for form in (name, SOURCE))
    if found is None or whole is None:
        return None
    return math.exp(math.log(found["value"]) * found["tokens"] / whole["tokens"])


def _last_words(figures: Figures, name: str) -> Any:
    found = figures.get(f"{name}/lambada", {}).get("lambada", {}).get("accuracy")
    return None if found is None else 100 * found


def _parameters(figures: Figures, name: str) -> Any:
    """The source's number is that of the form without pruning."""
    return figures.get("int8/parameters" if name == SOURCE else f"{name}/parameters")


def _ratio(figures: Figures, name: str) -> float | None:
    whole, own = _parameters(figures, SOURCE), _parameters(figures, name)
    return None if whole is None or own is None else own / whole


def _share(figures: Figures, name: str) -> float | None:
    whole, own = figures.get(f"{SOURCE}/bytes"), figures.get(f"{name}/bytes")
    return None if whole is None or own is None else own / whole


def _median(figures: Figures, name: str, key: str) -> float | None:
    return _middle([value[key] for at, value in figures.items() if at.startswith(f"{name}/speed/")])


def _times(figures: Figures, name: str) -> list[float]:
    """The source's answer time divided by this form's, for each round with both."""
    rounds = [at.rsplit("/", 1)[1] for at in figures if at.startswith(f"{name}/speed/")]
    pairs = [(figures.get(f"{SOURCE}/speed/{index}"), figures[f"{name}/speed/{index}"]) for index in rounds]
    return [whole["answer_s"] / own["answer_s"] for whole, own in pairs if whole]


def _middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _holds(most: float | None, least: float | None) -> bool | None:
    return None if most is None or least is None else most >= least


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else _MISSING


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return _MISSING if value is None else f"{value * unit:,.{digits}f}"


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f} %"


def _line(text: str) -> str:
    return " ".join(text.split())
