"""`edgelm eval`: perplexity and last-word accuracy of a bundle or of a source model, and its distance from another one.

Bundles need only the runtime. Source models need the exporter, which is found by the entry point group `edgelm.models`:
a function from a model's name to its shape, a tokenizer and a session.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bundle.folder import TOKENIZER_NAME
from ..bundle.foreign_graphs import is_foreign
from ..bundle.manifest import MANIFEST_NAME
from ..errors import BundleMissingError, SettingsError
from ..evaluation.quality import last_words, read_passages, text_against, text_perplexity
from ..evaluation.scoring import Perplexity
from ..sessions.loading import open_folder
from ..sessions.protocol import Session
from ..text.tokenizer import Tokenizer
from .text_file import read_text

SUMMARY = "measure perplexity and LAMBADA accuracy of a bundle or a model"
_ENTRY_POINTS = "edgelm.models"
_Opened = tuple[int, Tokenizer, Session]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        help="bundle, model folder, GGUF file, hub id such as owner/name, or builtin:tales; models need the exporter",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure perplexity on")
    parser.add_argument("--window", type=int, metavar="N", help="tokens in a window (512, or the context)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from one window to the next (half a window)")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="a bundle or a model to compare with on --text: prints how far the first is from it",
    )
    parser.add_argument(
        "--lambada",
        type=Path,
        metavar="FILE",
        help="JSON lines with the key text, whose last words are to be predicted",
    )
    parser.add_argument(
        "--graph", metavar="FILE", help="the ONNX file to use, if a folder of another exporter has several"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (the physical ones)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Load, measure, print."""
    if arguments.text is None and arguments.lambada is None:
        raise SettingsError("there is nothing to measure: give --text or --lambada")
    if arguments.text is None and (arguments.window, arguments.stride) != (None, None):
        raise SettingsError("--window and --stride belong to --text: give both")
    if arguments.text is None and arguments.against is not None:
        raise SettingsError("--against compares two models on --text: give both")
    text = None if arguments.text is None else read_text(arguments.text)
    passages = None if arguments.lambada is None else read_passages(arguments.lambada)
    figures: dict[str, Any] = {"model": arguments.model}
    with _opened(arguments.model, arguments.threads, arguments.graph) as opened:
        context, tokenizer, session = opened
        if text is not None:
            figures |= _on_text(opened, text, arguments)
        if passages is not None:
            figures["lambada"] = dataclasses.asdict(last_words(session, tokenizer, passages, context))
    if arguments.json:
        print(json.dumps(figures))
        return 0
    _print(figures)
    return 0


def _on_text(opened: _Opened, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, and the comparison with the reference, if there is one."""
    context, tokenizer, session = opened
    sizes = {"window": arguments.window, "stride": arguments.stride}
    if arguments.against is None:
        found = text_perplexity(session, tokenizer, text, context, **sizes)
        return _perplexity(found, text)
    with _opened(arguments.against, arguments.threads) as (other_context, other_tokenizer, reference):
        if other_tokenizer.encode(text) != tokenizer.encode(text):
            raise SettingsError(
                f"{arguments.against} cuts the text into other tokens: compare with the model's own source, or run "
                "edgelm eval for each of both and compare bits per byte"
            )
        found, against = text_against(session, reference, tokenizer, text, min(context, other_context), **sizes)
    return _perplexity(found, text) | {"against": {"model": arguments.against, **dataclasses.asdict(against)}}


def _perplexity(found: Perplexity, text: str) -> dict[str, Any]:
    return {"perplexity": dataclasses.asdict(found), "bits_per_byte": found.bits_per_byte(text)}


def _print(figures: dict[str, Any]) -> None:
    if "perplexity" in figures:
        row = figures["perplexity"]
        where = f"window {row['window']}, stride {row['stride']}"
        print(f"perplexity     {row['value']:.4f} on {row['tokens']:,} tokens ({where})")
        print(f"bits per byte  {figures['bits_per_byte']:.4f}, comparable between tokenizers")
    if "against" in figures:
        row = figures["against"]
        print(f"against        {row['perplexity']:.4f} of {row['model']} ({row['increase_percent']:+.2f} %)")
        print(f"KL divergence  {row['kl']:.5f} nats a token, 99th percentile {row['kl_p99']:.4f}")
        print(f"same token     {100 * row['same']:.2f} % of the tokens have one most likely token in both")
    if "lambada" in figures:
        row = figures["lambada"]
        print(f"last words     {100 * row['accuracy']:.2f} % of {row['passages']:,} passages")


@contextlib.contextmanager
def _opened(model: str, threads: int | None, graph: str | None = None) -> Iterator[_Opened]:
    """Context length, tokenizer and session of a bundle, or of a model."""
    folder = Path(model)
    if (folder / MANIFEST_NAME).is_file() or graph is not None or (folder.is_dir() and is_foreign(folder)):
        bundle, session = open_folder(folder, threads, graph)
        try:
            yield bundle.manifest.model.context_length, Tokenizer(bundle.path / TOKENIZER_NAME), session
        finally:
            session.close()
        return
    try:
        found = [entry.load() for entry in importlib.metadata.entry_points(group=_ENTRY_POINTS, name="torch")]
    except ImportError:  # a frozen program without it
        found = []
    if not found:
        raise BundleMissingError(f'{model} is not a bundle, and models need the exporter: pip install "edgelm[export]"')
    with found[0](model, threads) as opened:
        yield opened
