"""`edgelm cache`: show, clear or check what edgelm keeps between runs, and set what it may take."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..caches.budgets import Budgets, read_budgets, write_budgets
from ..caches.kinds import CacheKind, PrefixKind, ResponseKind, cache_kinds
from ..caches.responses.store import StoreStats
from ..errors import SettingsError
from ..host.home import home

SUMMARY = "show, clear or check the caches on this machine, or set their budgets"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"": 1, "S": 1, "M": 60, "H": 3600, "D": 86400}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", re.ASCII)
_OFF = "off"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "action",
        choices=("stats", "clear", "check", "budget"),
        help="stats: show entries, sizes and budgets; clear: delete all entries; check: verify all; budget: show "
        "the default budgets, or set them by the options below",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    group = parser.add_argument_group("budget", "sizes such as 256MiB or 1GB, times such as 3600 or 7d")
    for part in ("responses", "prefixes"):
        group.add_argument(f"--{part}-memory", type=_size, metavar="SIZE", help=f"memory for {part}, for each process")
        group.add_argument(f"--{part}-disk", type=_disk, metavar="SIZE", help=f"disk for {part}, or off")
    group.add_argument("--responses-ttl", type=_time, metavar="TIME", help="how long an answer lives, or off")
    group.add_argument("--responses-policy", choices=("lru", "lfu"), help="which answers are evicted first")


def run(arguments: argparse.Namespace) -> int:
    """Do it for every kind of cache."""
    folder = home()
    changes = _changes(arguments)
    if arguments.action == "budget":
        return _budget(folder, changes, arguments.json)
    if any(changes.values()):
        raise SettingsError(f"budgets are set by  edgelm cache budget, not by  edgelm cache {arguments.action}")
    kinds = cache_kinds(folder)
    for kind in kinds:
        if arguments.action == "clear":
            kind.clear()
        elif arguments.action == "check":
            kind.check()
    if arguments.action == "check":
        read_budgets(folder)
    rows = [(kind, kind.stats()) for kind in kinds]
    if arguments.json:
        print(json.dumps({"home": str(folder), "caches": [_row(kind, stats) for kind, stats in rows]}))
        return 0
    print(f"{folder}{_DONE[arguments.action]}")
    for kind, stats in rows:
        print(f"  {kind.name:12}{_summary(stats)}")
    return 0


_DONE = {"stats": "", "clear": ": everything was forgotten", "check": ": no damage was found"}


def _budget(folder: Path, changes: dict[str, dict[str, Any]], as_json: bool) -> int:
    budgets = read_budgets(folder)
    if any(changes.values()):
        budgets = Budgets(
            dataclasses.replace(budgets.responses, **changes["responses"]),
            dataclasses.replace(budgets.prefixes, **changes["prefixes"]),
        )
        write_budgets(folder, budgets)
        ResponseKind(folder).limit(budgets.responses)
        PrefixKind(folder).limit(budgets.prefixes)
    if as_json:
        print(json.dumps({"home": str(folder), **budgets.values()}))
        return 0
    print(folder)
    for part, values in budgets.values().items():
        print(f"  {part:12}{', '.join(_words(values))}")
    return 0


def _words(values: dict[str, Any]) -> list[str]:
    words = [f"memory {values['memory_bytes'] / 2**20:,.4g} MiB"]
    words.append(f"disk {values['disk_bytes'] / 2**20:,.4g} MiB" if values["disk"] else "disk off")
    if "policy" in values:
        ttl = values["ttl_s"]
        words += ["answers live until evicted" if ttl is None else f"answers live {ttl:,g} s", values["policy"]]
    return words


def _changes(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options that were given, for each cache as fields of its settings."""
    changes: dict[str, dict[str, Any]] = {}
    for part in ("responses", "prefixes"):
        memory, disk = getattr(arguments, f"{part}_memory"), getattr(arguments, f"{part}_disk")
        changes[part] = {} if memory is None else {"memory_bytes": memory}
        if disk is not None:
            changes[part].update({"disk": False} if disk == _OFF else {"disk": True, "disk_bytes": disk})
    if arguments.responses_ttl is not None:
        changes["responses"]["ttl_s"] = None if arguments.responses_ttl == _OFF else arguments.responses_ttl
    if arguments.responses_policy is not None:
        changes["responses"]["policy"] = arguments.responses_policy
    return changes


def _size(text: str) -> int:
    number, unit = _amount(text, _UNITS, "a size such as 256MiB, 1GB or 1000000")
    return round(Fraction(number) * unit)


def _disk(text: str) -> int | str:
    return _OFF if text == _OFF else _size(text)


def _time(text: str) -> float | str:
    if text == _OFF:
        return _OFF
    number, unit = _amount(text, _SECONDS, "a time such as 3600, 90m, 12h or 7d")
    return float(number) * unit


def _amount(text: str, units: dict[str, int], kind: str) -> tuple[str, int]:
    """The number as it was written, and the factor of its unit."""
    found = _NUMBER.fullmatch(text.strip())
    unit = None if found is None else units.get(found.group(2).upper())
    if found is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.removeprefix('a ')}")
    return found.group(1), unit


def _row(kind: CacheKind, stats: StoreStats) -> dict[str, Any]:
    return {"kind": kind.name, "path": str(kind.path), **dataclasses.asdict(stats)}


def _summary(stats: StoreStats) -> str:
    entries = f"{stats.entries:,} entries" + ("" if stats.max_entries is None else f" of at most {stats.max_entries:,}")
    size = f"{stats.bytes / 1e6:,.1f} MB" + (
        "" if stats.max_bytes is None else f" of at most {stats.max_bytes / 1e6:,.1f}"
    )
    return f"{entries}, {size}"
