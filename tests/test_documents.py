"""Every document has one title, its links lead to existing files, and its commands and options exist.

`test_readme` runs the README's commands.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.runtime import cli
from scripts import list_commands

from .conftest import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def without_code(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_has_one_title(path: Path) -> None:
    assert len(re.findall(r"^# ", without_code(path), re.MULTILINE)) == 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}"


# Notes describe experiments whose commands may no longer exist.
CURRENT = [path for path in DOCUMENTS if path.parent.name != "notes" and path.name != "CHANGELOG.md"]
# Options of pip, pytest, PyInstaller and accelerate that documents name; accelerate's other options have underscores.
FOREIGN = {
    "--no-deps",
    "--slow",
    "--extra-index-url",
    "--config-settings",
    "--upgrade",
    "--cpu",
    "--onefile",
    "--hidden-import",
}


def command_lines(path: Path) -> Iterator[list[str]]:
    """The words of all lines with one of our commands."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    code = [
        *re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL),
        *re.findall(r"^ {4}\S.*$", text, re.MULTILINE),
    ]
    command = r"(?:edgelm [a-z]|python scripts/|scripts/).*"
    for line in re.findall(rf"^ *((?:\w+=\S+ )*{command})$", "\n".join(code), re.MULTILINE):
        words = shlex.split(line, comments=True)
        while "=" in words[0]:
            words.pop(0)
        yield words


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_commands_are_understood(path: Path) -> None:
    for words in command_lines(path):
        if words[0] == "edgelm":
            module = cli._find(words[1])
            assert module is not None, f"{path.name} names {shlex.join(words)}"
            cli.make_parser(words[1], module).parse_intermixed_args(words[2:])
            continue
        script = ROOT / next(word for word in words if word.startswith("scripts/"))
        assert script.is_file(), f"{path.name} names {script}"
        source = script.read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert option in source, f"{script} has no {option}, which {path.name} names"


def test_options_in_running_text_exist() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*") if is_text(path))
    known = set(re.findall(r"--[a-z][a-z0-9-]*", scripts)) | FOREIGN | {"--help", "--version"}
    for name in cli._names():
        known |= {
            option for action in actions(cli.make_parser(name, cli._find(name))) for option in action.option_strings
        }
    for path in CURRENT:
        for option in re.findall(r"`(--[a-z][a-z0-9-]*)\b(?!_)", without_code(path)):
            assert option in known, f"{path.name} names {option}"


def test_the_page_of_commands_is_what_help_says() -> None:
    """docs/commands.md has every argument of `--help` with its text, and no other."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == list_commands.document(), "run  python scripts/list_commands.py"
    for name in cli._names():
        section = page.split(f"## edgelm {name}\n", 1)[1].split("\n## ", 1)[0]
        listed = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
        shown = cli.make_parser(name, cli._find(name)).format_help()
        assert listed == set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", shown, re.MULTILINE)) - {"--help", "--debug"}


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its subcommands' parsers."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)


def is_text(path: Path) -> bool:
    return path.is_file() and path.suffix in {"", ".py"} and "__pycache__" not in path.parts
