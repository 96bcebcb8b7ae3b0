"""The texts that calibrate an export: what rounding and the scales of an INT8 cache are fitted to.

They come with edgelm, in its own words: encyclopedic articles (the places, people and events in them are invented),
stories, dialogue, code and other languages. None of them judges.
"""

from __future__ import annotations

from importlib import resources

_FOLDER = "text"
_CALIBRATING = "calibrating"


def calibrating_texts() -> list[str]:
    """All of them, in the order of their names."""
    folder = resources.files(__package__) / _FOLDER / _CALIBRATING
    names = sorted(item.name for item in folder.iterdir())
    return [(folder / name).read_text(encoding="utf-8") for name in names]
