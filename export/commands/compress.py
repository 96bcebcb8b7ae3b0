"""`edgelm compress`: apply a recipe to a model and print size and quality after each step."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.bundle.figures import compression_notes, compression_table, plan_table
from ..config import ExportConfig
from ..libraries import quiet_libraries, require_extra
from .progress import LogFile, RichProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ..source.compressed import Record

SUMMARY = "make a model smaller by a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", help="model folder, GGUF file, hub id such as owner/name, or builtin:tales")
    parser.add_argument("--recipe", required=True, help="light, balanced, small, smallest, or a path ending in .toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--target", help="target that bundle sizes are computed for (this machine)")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text; half to calibrate, half to measure on")
    parser.add_argument(
        "--lambada", type=Path, metavar="FILE", help="LAMBADA passages (JSON Lines) to measure last-word accuracy on"
    )
    parser.add_argument("--passages", type=int, default=100, metavar="N", help="number of LAMBADA passages (100)")
    parser.add_argument("--no-measure", action="store_true", help="do not measure quality, only sizes")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what each step would remove and how long it would take, without writing anything",
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="file to append progress lines to")
    parser.add_argument("--force", action="store_true", help="replace an existing compressed model")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compress the model and print the table of steps."""
    require_extra("edgelm compress")
    names = ("model", "target", "revision", "text", "out", "force")
    config = ExportConfig(**{name: getattr(arguments, name) for name in names}, compress=arguments.recipe)
    from rich.console import Console

    from ..compress.measure import Measuring
    from ..compress.processes import is_first
    from ..compress.run import compress_model, rehearse

    measuring = Measuring(not arguments.no_measure, arguments.lambada, arguments.passages)
    work = rehearse if arguments.dry_run else compress_model
    quiet_libraries()
    with LogFile(arguments.log) if arguments.log and is_first() else nullcontext() as log:
        console = Console(file=sys.stderr, highlight=False, quiet=not is_first())
        progress = RichProgress(console, log, announce=True)
        try:
            record = work(config, progress, progress.say, measuring)
        finally:
            progress.stop()
    if not is_first():
        return 0  # only the first of several processes prints
    if arguments.json:
        print(json.dumps({"folder": None if arguments.dry_run else str(arguments.out), **dataclasses.asdict(record)}))
    elif arguments.dry_run:
        print_table(Console(highlight=False), record, plan_table(record.steps))
        print("Nothing was written.")
    else:
        print_table(Console(highlight=False), record, compression_table(record.steps))
        print(f"Wrote {arguments.out}. Try:  edgelm export {arguments.out}")
    return 0


def print_table(console: Console, record: Record, table: Sequence[Sequence[str]]) -> None:
    """Print the table of steps and their notes."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=escape(f"{record.name}, recipe {record.recipe}"), box=None, pad_edge=False, title_justify="left"
    )
    titles, *rows = table
    for number, title in enumerate(titles):
        # Titles of two lines, so that all columns fit into a terminal of 80 characters.
        shown.add_column(title.replace(" ", "\n"), justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    for note in compression_notes(record.steps):
        console.print(escape(note), soft_wrap=True)
