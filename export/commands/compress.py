"""`edgelm compress`: make a model smaller by a recipe, and show the progress of its steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.bundle.figures import COMPRESSION_COLUMNS, compression_notes, compression_rows
from ..config import ExportConfig
from .progress import RichProgress, quiet_libraries, require_extra

if TYPE_CHECKING:
    from rich.console import Console

    from ..compress.folder import Record

SUMMARY = "make a model smaller by a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", help="model folder, GGUF file, hub id such as owner/name, or builtin:tales")
    parser.add_argument("--recipe", required=True, help="light, balanced, small, smallest, or a TOML file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--target", help="target whose scheme the figures are measured with (this machine's)")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to calibrate and measure on")
    parser.add_argument("--force", action="store_true", help="replace an existing compressed model")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compress, and print the figures before and after each step."""
    require_extra("edgelm compress")
    names = ("model", "target", "revision", "text", "out", "force")
    config = ExportConfig(**{name: getattr(arguments, name) for name in names}, compress=arguments.recipe)
    from rich.console import Console

    from ..compress.processes import is_first
    from ..compress.run import compress_model

    progress = RichProgress(Console(file=sys.stderr, highlight=False, quiet=not is_first()))
    quiet_libraries()
    try:
        record = compress_model(config, progress, progress.say)
    finally:
        progress.stop()
    if not is_first():
        return 0  # of several processes that train together, only the first one prints
    if arguments.json:
        print(json.dumps({"folder": str(arguments.out), **dataclasses.asdict(record)}))
    else:
        print_steps(Console(highlight=False), record)
        print(f"Wrote {arguments.out}. Try:  edgelm export {arguments.out}")
    return 0


def print_steps(console: Console, record: Record) -> None:
    """Print a table with a row for the source and one for each step, and the steps' notes."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{record.name}, recipe {record.recipe}"), box=None, title_justify="left")
    for number, title in enumerate(COMPRESSION_COLUMNS):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in compression_rows(record.steps):
        table.add_row(*map(escape, row))
    console.print(table)
    for note in compression_notes(record.steps):
        console.print(escape(note))
