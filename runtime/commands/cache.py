"""`edgelm cache`: show, clear or check what edgelm keeps between runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from ..caches.kinds import CacheKind, cache_kinds
from ..caches.store import StoreStats
from ..home import home

SUMMARY = "show, clear or check what is kept between runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "action",
        choices=("stats", "clear", "check"),
        help="stats: entries, sizes and budgets; clear: forget everything; check: verify every entry",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Do it for every kind of cache."""
    folder = home()
    kinds = cache_kinds(folder)
    for kind in kinds:
        if arguments.action == "clear":
            kind.clear()
        elif arguments.action == "check":
            kind.check()
    rows = [(kind, kind.stats()) for kind in kinds]
    if arguments.json:
        print(json.dumps({"home": str(folder), "caches": [_row(kind, stats) for kind, stats in rows]}))
        return 0
    print(f"{folder}{_DONE[arguments.action]}")
    for kind, stats in rows:
        print(f"  {kind.name:12}{_summary(stats)}")
    return 0


_DONE = {"stats": "", "clear": ": everything was forgotten", "check": ": no damage was found"}


def _row(kind: CacheKind, stats: StoreStats) -> dict[str, Any]:
    return {"kind": kind.name, "path": str(kind.path), **dataclasses.asdict(stats)}


def _summary(stats: StoreStats) -> str:
    entries = f"{stats.entries:,} entries" + ("" if stats.max_entries is None else f" of at most {stats.max_entries:,}")
    size = f"{stats.bytes / 1e6:,.1f} MB" + (
        "" if stats.max_bytes is None else f" of at most {stats.max_bytes / 1e6:,.1f}"
    )
    return f"{entries}, {size}"
