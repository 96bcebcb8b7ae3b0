"""The report of the case study: ratios within a round, and yes or no for each promise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from .conftest import ROOT

TITLES = {"transformers": "float32", "int8": "INT8", "pruned": "smaller"}


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import case_study_report

    yield case_study_report
    sys.path.remove(str(ROOT / "scripts"))


def figures(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "transformers/bytes": 400_000_000,
        "int8/bytes": 100_000_000,
        "int8/parameters": 100_000_000,
        "pruned/bytes": 220_000_000,
        "pruned/parameters": 69_000_000,
    }
    for name, seconds in (("transformers", (10.0, 20.0)), ("int8", (2.0, 3.0)), ("pruned", (1.0, 2.0))):
        for index, value in enumerate(seconds):
            found[f"{name}/speed/{index}"] = {"answer_s": value, "first_s": 0.1, "peak_mb": 300.0}
    for name, perplexity, accuracy in (("transformers", 20.0, 0.4), ("int8", 20.5, 0.38), ("pruned", 24.0, 0.36)):
        found[f"{name}/perplexity/wiki"] = {"perplexity": {"value": perplexity, "tokens": 1000}}
        found[f"{name}/lambada"] = {"lambada": {"accuracy": accuracy}}
    return {**found, **changes}


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {title: values for title, *values in cells}


def test_promises_are_kept_or_not(report: ModuleType) -> None:
    found = rows(report.markdown(figures(), TITLES))
    assert found["an answer 5.3 times as fast"] == ["yes", "yes"]  # medians of 5 and 6.7, of 10 and 10
    assert found["half the size"] == ["yes", "no"]
    assert found["30 % fewer parameters"] == ["no", "yes"]
    assert found["quality kept: perplexity +3 %, LAMBADA 3 points, or less"] == ["yes", "no"]
    assert found["perplexity, wiki"] == ["20.00", "20.50 (+2.5 %)", "24.00 (+20.0 %)"]
    assert found["times as fast, same round"][1] == "5.8 (5.0 to 6.7)"


def test_perplexity_is_per_token_of_the_source(report: ModuleType) -> None:
    """A trimmed vocabulary needs more tokens for a text, each easier to predict."""
    longer = {"pruned/perplexity/wiki": {"perplexity": {"value": 20.0, "tokens": 1100}}}
    found = rows(report.markdown(figures(**longer), TITLES))
    assert found["perplexity, wiki"][2] == "26.99 (+34.9 %)"  # 20 to the power of 1.1


def test_missing_figures_keep_no_promise(report: ModuleType) -> None:
    some = {key: value for key, value in figures().items() if "lambada" not in key and "speed" not in key}
    found = rows(report.markdown(some, TITLES))
    assert found["an answer 5.3 times as fast"] == ["-", "-"]
    assert found["quality kept: perplexity +3 %, LAMBADA 3 points, or less"] == ["-", "-"]


def test_answers_stand_side_by_side(report: ModuleType) -> None:
    answers = {f"{name}/answers": [["Why?", f"Because\n{name}."]] for name in TITLES}
    text = report.markdown(figures(**answers), TITLES)
    assert "**Why?**\n\n- float32: Because transformers.\n- INT8: Because int8.\n- smaller: Because pruned." in text
