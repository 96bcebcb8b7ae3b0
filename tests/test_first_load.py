"""The first model of `edgelm serve`, loaded while the server's modules are imported."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime.commands.serve import FirstLoad
from edgelm.runtime.errors import BundleCorruptError


class Opener:
    """Opens a fake engine that counts how often it was closed. begun: set when opening begins."""

    def __init__(self) -> None:
        self.begun, self.closed = threading.Event(), 0
        self.opened: list[Path] = []

    def __call__(self, path: Path) -> Any:
        self.begun.set()
        self.opened.append(path)
        if path.name == "broken":
            raise BundleCorruptError("it is broken")
        return self

    def close(self) -> None:
        self.closed += 1


def test_the_first_model_is_opened_early_and_once() -> None:
    opener = Opener()
    with FirstLoad(opener, Path("one")) as opening:
        assert opener.begun.wait(10)
        assert opening(Path("two")) is opening(Path("one")) is opener
        assert opener.opened == [Path("one"), Path("two")]
        opening(Path("one"))
        assert opener.opened[2:] == [Path("one")], "opened again after unloading"
    assert opener.closed == 0, "the caller closes it"


def test_an_unused_first_model_is_closed() -> None:
    opener = Opener()
    with pytest.raises(KeyError), FirstLoad(opener, Path("one")):
        raise KeyError
    assert opener.opened == [Path("one")] and opener.closed == 1


def test_an_error_is_raised_only_when_the_model_is_asked_for() -> None:
    opener = Opener()
    with FirstLoad(opener, Path("broken")) as opening, pytest.raises(BundleCorruptError):
        opening(Path("broken"))
    with FirstLoad(opener, Path("broken")):
        pass
    assert opener.closed == 0
