"""`edgelm inspect`: what a bundle is, from its manifest, and what its export measured, without loading the model.

A folder of another exporter has no manifest: its model is loaded to see what it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import html
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ..bundle.cuts import what_is_off
from ..bundle.figures import compression_notes, compression_table, main_figures
from ..bundle.folder import REPORT_NAME, REPORT_PAGE_NAME, Bundle
from ..bundle.manifest import LayerCache, Manifest
from ..bundle.side_by_side import Cut, examples, printable
from ..errors import BundleCorruptError, BundleMissingError
from .folder import add_folder

_CACHE_BYTES = {"int8": 1, "float16": 2, "float32": 4}
# Entry points whose functions make a page of a report.
_PAGES = "edgelm.pages"
_PLAIN_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body><pre>{text}</pre></body></html>
"""
SUMMARY = "show what a bundle is, or what its export measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_folder(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest and the digest as JSON, or the report")
    parser.add_argument("--report", action="store_true", help="show what was measured at export")
    parser.add_argument("--open", action="store_true", help="with --report: show its page in the browser too")


def run(arguments: argparse.Namespace) -> int:
    """Print the manifest or the report, for a person or a program."""
    bundle = _open(arguments)
    if arguments.report or arguments.open:
        _show_report(bundle, arguments.json)
        if arguments.open:
            _open_page(bundle)
    elif arguments.json:
        extra: dict[str, Any] = {"digest": bundle.manifest.digest}
        if not bundle.has_manifest:
            extra["has_manifest"] = False
        print(json.dumps({**extra, **dataclasses.asdict(bundle.manifest)}, ensure_ascii=False))
    else:
        _show_manifest(bundle)
    return 0


def _open(arguments: argparse.Namespace) -> Bundle:
    from ..bundle.foreign_graphs import is_foreign
    from ..sessions.loading import open_folder

    if arguments.graph is None and not is_foreign(Path(arguments.bundle)):
        return Bundle.open(arguments.bundle)
    bundle, session = open_folder(arguments.bundle, graph=arguments.graph)
    session.close()
    return bundle


def _show_report(bundle: Bundle, as_json: bool) -> None:
    text = _listed(bundle, REPORT_NAME)
    report = _parse(text)
    if as_json:
        print(text, end="")
        return
    manifest = bundle.manifest
    _print(f"{manifest.name} for {manifest.target.name}: {_quantization(manifest)}, {manifest.model.kv.type} cache")
    for figure in main_figures(report):
        amount = figure.after if figure.before is None else f"{figure.before} -> {figure.after}"
        _print(f"  {figure.title:30}{amount}{f'  ({figure.verdict})' if figure.verdict else ''}")
    not_run = report.get("not_run")
    for sentence in not_run if isinstance(not_run, list) else ():
        _print(f"  {'not run':30}{sentence}")
    _show_compression(report.get("compression"))
    _show_examples(report)


def _show_examples(report: dict[str, Any]) -> None:
    """Print prompts with the answers of both graphs, the first different word in brackets."""
    found = examples(report)
    if found:
        _print("Answers of the fp32 graph and of this bundle:")
    for example in found:
        _print(f"  > {_line(example.prompt)}")
        if example.equal:
            _print(f"      both  {_line(example.before.same)}")
        else:
            _print(f"      fp32  {_marked(example.before)}")
            _print(f"    bundle  {_marked(example.after)}")


def _marked(cut: Cut) -> str:
    return _line(f"{cut.same}[{cut.word}]{cut.rest}")


def _print(text: str) -> None:
    """Print a line with unprintable characters escaped: a terminal would obey them."""
    print(printable(text))


def _line(text: str) -> str:
    return text.replace("\n", "\\n")


def _show_compression(steps: Any) -> None:
    """Print what each step of a recipe changed before this export."""
    titles, *rows = compression_table(steps)
    if not rows:
        return
    _print("Compressed before, step by step:")
    for name, *cells in (titles, *rows):
        _print(f"  {name:18} " + "".join(f"{cell:>13} " for cell in cells).rstrip())
    for note in compression_notes(steps):
        _print(f"  {note}")


def _parse(text: str) -> dict[str, Any]:
    try:
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleCorruptError(f"{REPORT_NAME} is not valid JSON ({error}): export the bundle again") from error
    if not isinstance(report, dict):
        raise BundleCorruptError(f"{REPORT_NAME} holds no object: export the bundle again")
    return report


def _open_page(bundle: Bundle) -> None:
    """Show the report in the browser, on a page that is made here: the bundle's own page could contain anything."""
    import webbrowser

    report = _parse(_listed(bundle, REPORT_NAME))
    page = Path(tempfile.mkdtemp(prefix="edgelm-report-")) / REPORT_PAGE_NAME
    page.write_text(_page(bundle, report), encoding="utf-8")
    if not webbrowser.open(page.as_uri()):
        raise BundleMissingError(f"no browser was found here: open it yourself: {page}")


def _page(bundle: Bundle, report: dict[str, Any]) -> str:
    """The exporter's page with charts, if the exporter is installed and knows this report; else the text of the
    terminal."""
    from importlib.metadata import entry_points

    from jinja2 import TemplateError

    for entry in entry_points(group=_PAGES):
        try:
            return str(entry.load()(report))
        except (ImportError, ArithmeticError, AttributeError, LookupError, TemplateError, TypeError, ValueError):
            break
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        _show_report(bundle, False)
    return _PLAIN_PAGE.format(title=html.escape(bundle.manifest.name), text=html.escape(text.getvalue()))


def _listed(bundle: Bundle, name: str) -> str:
    """The text of a file, checked against its digest. Bundles of an older edgelm may lack it."""
    if name not in bundle.manifest.files:
        raise BundleMissingError(f"{bundle.path} has no {name}: export it again with this edgelm to get one")
    bundle.check_files([name])
    return bundle.read_text(name) or ""


def _show_manifest(bundle: Bundle) -> None:
    manifest = bundle.manifest
    rows = {
        "name": manifest.name,
        "digest": manifest.digest,
        "source": _source(manifest),
        **(_export(manifest) if bundle.has_manifest else _no_manifest()),
        "vocabulary": f"{manifest.model.vocab_size:,} tokens",
        "context": f"{manifest.model.context_length:,} tokens",
        "layers": _layers(manifest),
        "cache": _cache(manifest),
        "size": f"{bundle.total_bytes() / 1e6:,.1f} MB",
        **_quality(manifest),
        **({"off": off} if (off := what_is_off(manifest)) else {}),
        **_made_with(manifest),
    }
    for key, value in [*rows.items(), *(("note", note) for note in manifest.notes)]:
        _print(f"{key:14}{value}")
    for name, entry in manifest.files.items():
        _print(f"  {entry.bytes:>14,}  {name}")


def _export(manifest: Manifest) -> dict[str, str]:
    return {
        "target": manifest.target.name,
        "quantization": _quantization(manifest),
        "parameters": f"{manifest.model.parameters:,}",
    }


def _no_manifest() -> dict[str, str]:
    return {"manifest": "none, so the digest is that of the files as they are now; another exporter wrote them"}


def _made_with(manifest: Manifest) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return {"made with": versions} if versions else {}


def _source(manifest: Manifest) -> str:
    source = manifest.source
    extra = [item for item in (source.revision, source.license) if item]
    return f"{source.model} ({', '.join([source.architecture, *extra])})"


def _quantization(manifest: Manifest) -> str:
    excluded = manifest.quantization.excluded
    return manifest.quantization.scheme + (f", {len(excluded)} matrices in a wider type" if excluded else "")


def _layers(manifest: Manifest) -> str:
    kinds = Counter(map(_layer, manifest.model.layers))
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _layer(layer: LayerCache | None) -> str:
    if layer is None:
        return "no attention"
    window = f", window {layer.window}" if layer.window else ""
    return f"{layer.kv_heads} KV heads of {layer.key_size}{window}"


def _cache(manifest: Manifest) -> str:
    kv = manifest.model.kv
    width = _CACHE_BYTES[kv.type]
    layers = [layer for layer in manifest.model.layers if layer is not None]
    values = sum(layer.kv_heads * (layer.key_size + layer.value_size) for layer in layers) * width
    scales = sum(2 * layer.kv_heads for layer in layers) * kv.scale_bytes
    return f"{kv.type}{' per ' + kv.granularity if kv.granularity else ''}, {values:,} bytes a token" + (
        f", {values + scales:,} with kernels" if scales else ""
    )


def _quality(manifest: Manifest) -> dict[str, str]:
    quality = manifest.quality.get("against_fp32")
    keys = ("perplexity_before", "perplexity_after", "perplexity_increase_percent", "agreement_percent")
    if not isinstance(quality, dict) or not all(isinstance(quality.get(key), (int, float)) for key in keys):
        return {}
    return {
        "quality": f"perplexity {quality['perplexity_before']:.3f} -> {quality['perplexity_after']:.3f} "
        f"({quality['perplexity_increase_percent']:+.2f} %), "
        f"same most likely token at {quality['agreement_percent']:.1f} %"
    }
