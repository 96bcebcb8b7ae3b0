"""Write docs/commands.md: every command with its arguments, in the words of its `--help`.

python scripts/list_commands.py [--print]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from edgelm.runtime import cli

ROOT = Path(__file__).parents[1]
_HEAD = """# Commands

Written by `python scripts/list_commands.py` from `edgelm COMMAND --help`. Every command also has `--help`, and
`--debug`, which shows the traceback of an error. Exit status: 0 done, 1 failed, 2 wrong usage.
"""
_EVERYWHERE = {"--help", "--debug"}


def document() -> str:
    """The whole text of docs/commands.md."""
    return "\n".join([_HEAD, *(line for name in cli._names() for line in _section(name))])


def _section(name: str) -> Iterator[str]:
    parser = cli.make_parser(name, cli._find(name))
    summary = parser.description or ""
    yield from (f"## edgelm {name}", "", f"{summary[:1].upper()}{summary[1:]}.", "", "| argument | |", "|---|---|")
    formatter = parser._get_formatter()
    for action in parser._actions:
        if not _EVERYWHERE & set(action.option_strings):
            text = formatter._expand_help(action) if action.help else ""
            yield f"| `{_spelling(action)}` | {text.replace('|', chr(92) + '|')} |"
    yield ""


def _spelling(action: argparse.Action) -> str:
    """`--threads N`, or the name of an argument without dashes."""
    if action.choices is not None:
        value = ",".join(map(str, action.choices))
    else:
        value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return value if action.choices is not None else str(action.metavar or action.dest)
    return action.option_strings[-1] if action.nargs == 0 else f"{action.option_strings[-1]} {value}"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--print", action="store_true", help="print the text, and write nothing")
    if arguments.parse_args().print:
        print(document(), end="")
    else:
        (ROOT / "docs" / "commands.md").write_text(document(), encoding="utf-8")
