"""docs/architecture.md names only files, classes and functions that exist."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edgelm.runtime import load

from .conftest import ROOT, TEXT

DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = {"A prompt's way": "runtime", "A model's way": "export"}


def names_of(path: str) -> set[str]:
    """Functions, classes, methods as Class.method, and constants."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def section(title: str) -> str:
    return DOCUMENT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("title", PACKAGES)
def test_each_step_of_a_tour_names_the_right_file(title: str) -> None:
    package, text = PACKAGES[title], section(title)
    files = re.findall(r"`([a-z_/0-9]+\.py)`", text)
    assert len(files) >= 8
    everything = set().union(*(names_of(f"{package}/{file}") for file in files))
    named = set(re.findall(r"`((?:[A-Z]\w+(?:\.[a-z_]+)?)|[a-z0-9]+(?:_[a-z0-9]+)+)`", text))
    assert len(named) >= 4
    assert named <= everything | {"Request", "Queue"}, named - everything
    # Names after "file:" are defined in that file.
    behind = re.findall(r"`([a-z_/0-9]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len({file for file, _ in behind}) == len(behind) >= 12, "each file occurs once"
    for file, names in behind:
        assert set(re.findall(r"[\w.]+", names)) <= names_of(f"{package}/{file}"), file


def test_a_prompt_enters_the_files_in_the_order_of_its_tour(tiny_bundle: Path) -> None:
    steps = re.findall(r"^\d+\. `([a-z_/]+\.py)`: `([\w.]+)`", section("A prompt's way"), re.MULTILINE)
    called: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        step = (frame.f_code.co_filename, frame.f_code.co_qualname)
        if event == "call" and step not in called:
            called.append(step)

    with load(tiny_bundle, threads=1) as engine:
        sys.setprofile(note)
        engine.generate(TEXT[:100], max_tokens=2)
        sys.setprofile(None)
    places = [called.index((str(ROOT / "runtime" / file), name)) for file, name in steps]
    assert len(places) >= 12 and places == sorted(places)


def test_names_in_brackets_are_in_the_file_in_front_of_them() -> None:
    found = re.findall(r"`([a-z_/]+\.py)` \(((?:`[\w.]+`(?:, )?)+)\)", section("Where to change what"))
    assert len(found) >= 20
    for path, names in found:
        assert set(re.findall(r"[\w.]+", names)) <= names_of(path), path


def test_every_path_of_the_document_is_there() -> None:
    paths = set(re.findall(r"`((?:runtime|export|targets|tests|scripts|docs)/[a-z0-9_/-]+\.(?:py|toml|md))`", DOCUMENT))
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).is_file(), path
    for title, package in (("The runtime's folders", "runtime"), ("The exporter's folders", "export")):
        folders = set(re.findall(r"^\| `([a-z]+)/`", section(title), re.MULTILINE))
        there = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")} - {"commands"}
        assert folders - {"commands"} == there
