"""The texts of an export: some calibrate, others judge.

edgelm's own were written for it. `text/calibrating` calibrates rounding: encyclopedic articles (about invented places,
people and events), stories, dialogue, code and other languages. `text/default.txt` calibrates the scales of an INT8
cache. `text/judging` judges, and calibrates nothing. Imports nothing heavy: commands import it at their start.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from itertools import accumulate

# Where a text may be cut: between paragraphs, else between lines, else between words.
_SEPARATORS = ("\n\n", "\n", " ")


@dataclass(frozen=True)
class Texts:
    """calibrating: text that scales and roundings are chosen by; judging: pairs of a kind of text and a text; origin:
    where they come from, in words."""

    calibrating: str
    judging: tuple[tuple[str, str], ...]
    origin: str


def built_in_texts() -> Texts:
    """The texts that come with edgelm."""
    folder = resources.files(__package__) / "text"
    files = sorted((item for item in (folder / "judging").iterdir()), key=lambda item: item.name)
    judging = tuple((item.name.removesuffix(".txt"), item.read_text(encoding="utf-8")) for item in files)
    return Texts((folder / "default.txt").read_text(encoding="utf-8"), judging, "the text that comes with edgelm")


def cut_text(text: str, origin: str) -> Texts:
    """Cut a text in two, between paragraphs near its middle; between lines, else words, if one side would have less
    than a quarter.

    origin: of the text, for errors. A single word leaves nothing to judge with; `make_judging` refuses that.
    """
    text = text.strip()
    for separator in _SEPARATORS:
        parts = text.split(separator)
        ends = list(accumulate(len(part) + len(separator) for part in parts))[:-1]
        end = min(ends, key=lambda place: abs(2 * place - len(text)), default=0)
        halves = text[:end].strip(), text[end:].strip()
        if all(halves) and (separator == _SEPARATORS[-1] or min(map(len, halves)) >= len(text) / 4):
            return Texts(halves[0], (("text", halves[1]),), origin)
    return Texts(text, (("text", ""),), origin)


def calibrating_texts() -> list[str]:
    """The texts that calibrate rounding, in the order of the files' names."""
    folder = resources.files(__package__) / "text" / "calibrating"
    names = sorted(item.name for item in folder.iterdir())
    return [(folder / name).read_text(encoding="utf-8") for name in names]
