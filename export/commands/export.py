"""`edgelm export`: turn a model into a bundle, and show the progress of its stages."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.bundle.cuts import what_is_off
from ...runtime.bundle.folder import CHAT_TEMPLATE_NAME
from ...targets.abilities import KV_TYPES, SCHEMES
from ..config import ExportConfig
from ..libraries import quiet_libraries, require_extra
from .progress import RichProgress
from .sizes import print_sizes

if TYPE_CHECKING:
    from rich.console import Console

    from ..pipeline import ExportResult

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[kmg]i?)?b|)", re.IGNORECASE)
SUMMARY = "turn a Hugging Face model into a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", help="model folder, GGUF file, hub id such as owner/name, or builtin:tales")
    parser.add_argument("--target", help="machine that the bundle is for, see  edgelm targets  (this machine)")
    parser.add_argument("--scheme", help=f"{', '.join(SCHEMES)} (the target's)")
    parser.add_argument("--kv", help=f"type of the KV cache: {', '.join(KV_TYPES)} (the scheme's)")
    parser.add_argument("--compress", metavar="RECIPE", help="compress the model first, as  edgelm compress  does")
    parser.add_argument(
        "--size", type=_size, metavar="BYTES", help="size of the bundle, such as 90MB; weights get 4 to 8 bits"
    )
    parser.add_argument("--bits", type=float, help="the size as bits for each parameter, about 4.4 to 8.2")
    parser.add_argument("--sizes", action="store_true", help="show the loss at several sizes, and write nothing")
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="largest KL divergence from fp32 (the target's)")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to calibrate and judge with (edgelm's own)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (MODEL-TARGET)")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _size(text: str) -> int:
    """Bytes, as a number or with a unit."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with kB, MB, GB, MiB or GiB")
    return int(float(found.group(1)) * _UNITS[found.group(2).lower()])


def run(arguments: argparse.Namespace) -> int:
    """Export and print the report."""
    require_extra("edgelm export")
    names = (
        "model",
        "target",
        "scheme",
        "kv",
        "revision",
        "text",
        "out",
        "force",
        "compress",
        "size",
        "bits",
        "max_kl",
    )
    config = ExportConfig(**{name: getattr(arguments, name) for name in names})
    from rich.console import Console

    progress = RichProgress(Console(file=sys.stderr, highlight=False))
    if arguments.sizes:
        return _show_sizes(config, progress, arguments.json)
    from ..pipeline import export_model

    quiet_libraries()
    try:
        result = export_model(config, progress)
    finally:
        progress.stop()
    if arguments.json:
        print(json.dumps({"bundle": str(result.path), "digest": result.manifest.digest, **result.report}))
    else:
        _print_table(Console(highlight=False), result)
    return 0


def _show_sizes(config: ExportConfig, progress: RichProgress, as_json: bool) -> int:
    from rich.console import Console

    from ..sizes import measure_sizes

    quiet_libraries()
    try:
        points = measure_sizes(config, progress)
    finally:
        progress.stop()
    if as_json:
        print(json.dumps({"model": config.model, "sizes": [dataclasses.asdict(point) for point in points]}))
    else:
        print_sizes(Console(highlight=False), config.model, points)
    return 0


def _print_table(console: Console, result: ExportResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    report = result.report
    table = Table(title=f"{report['model']} for {report['target']}")
    table.add_column("")
    table.add_column("fp32 graph", justify="right")
    table.add_column(f"{report['scheme']}, {report['kv']} cache", justify="right")
    sizes, speed, quality = report["bytes"], report["speed"], report["against_fp32"]
    table.add_row("parameters", f"{report['parameters']:,}", f"{report['parameters']:,}")
    table.add_row("size", f"{sizes['before'] / 1e6:,.1f} MB", f"{sizes['after'] / 1e6:,.1f} MB")
    for title, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")):
        table.add_row(title, *(f"{speed[side][key]:,.0f} tokens/s" for side in ("before", "after")))
    if quality:
        table.add_row("perplexity", f"{quality['perplexity_before']:.3f}", f"{quality['perplexity_after']:.3f}")
        table.add_row("same most likely token", "", f"{quality['agreement_percent']:.1f} %")
        table.add_row("same, where fp32 is clear", "", f"{quality['decided_percent']:.1f} %")
    source = report["against_source"]
    table.add_row("greedy tokens as torch", f"{source['equal_steps']} of {source['steps']}", "")
    console.print(table)
    for sentence in report["not_run"]:
        console.print(f"[yellow]not run[/] {sentence}", soft_wrap=True)
    off = what_is_off(result.manifest)
    for sentence in [*report["notes"], *([off] if off else [])]:
        console.print("[yellow]note[/]", escape(sentence), soft_wrap=True)
    console.print(f"Wrote {result.path}. Try:  {_suggestion(result.path)}", soft_wrap=True)


def _suggestion(bundle: Path) -> str:
    """A command to try next: `chat` for a model with a chat template, else `run`."""
    if (bundle / CHAT_TEMPLATE_NAME).is_file():
        return f"edgelm chat {bundle}"
    return f'edgelm run {bundle} "Once upon a time"'
