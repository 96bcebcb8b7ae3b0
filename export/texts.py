"""The texts of an export: those that calibrate, and those that judge.

They come with edgelm, in its own words. Rounding is fitted to `text/calibrating`: encyclopedic articles (the places,
people and events in them are invented), stories, dialogue, code and other languages; scales of an INT8 cache to
`text/default.txt`. None of them judges; `text/judging` does. Imports nothing heavy: commands read it as they start.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from itertools import accumulate

# Where a text may be cut: between paragraphs, else lines, else words.
_SEPARATORS = ("\n\n", "\n", " ")


@dataclass(frozen=True)
class Texts:
    """calibrating: what scales and roundings are chosen by; judging: pairs of a kind of text and a text; origin: where
    they are from, in words."""

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
    """Cut a text in two, as near to its middle as whole paragraphs allow; between lines, else words, where paragraphs
    leave less than a quarter on one side.

    origin: of the text, for errors. A text of a single word leaves nothing to judge by, which `make_judging` refuses.
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
    """What rounding is fitted to, in the order of the files' names."""
    folder = resources.files(__package__) / "text" / "calibrating"
    names = sorted(item.name for item in folder.iterdir())
    return [(folder / name).read_text(encoding="utf-8") for name in names]
