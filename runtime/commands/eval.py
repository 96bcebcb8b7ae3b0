"""`edgelm eval`: perplexity and last-word accuracy of a bundle, or of the model that a bundle is made of.

Bundles need nothing but the runtime. Models need the exporter, which offers itself by the entry point group
`edgelm.models`: a function from a model's name to a manifest's model, a tokenizer and a session.
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

from ..bundle import TOKENIZER_NAME
from ..errors import BundleMissingError, SettingsError
from ..evaluate import last_words, read_passages, text_perplexity
from ..foreign import is_foreign
from ..manifest import MANIFEST_NAME
from ..session import Session, open_folder
from ..tokenizer import Tokenizer
from .text_file import read_text

SUMMARY = "measure perplexity and LAMBADA accuracy of a bundle or a model"
_ENTRY_POINTS = "edgelm.models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        help="bundle, model folder, GGUF file, hub id such as owner/name, or builtin:tales; models need the exporter",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure perplexity on")
    parser.add_argument("--window", type=int, metavar="N", help="tokens of a window (512, or the context)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (half a window)")
    parser.add_argument(
        "--lambada", type=Path, metavar="FILE", help="JSON lines with the key text, whose last words are asked for"
    )
    parser.add_argument("--graph", metavar="FILE", help="the ONNX file to take, in a folder of another exporter")
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (physical cores)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Load, measure, print."""
    if arguments.text is None and arguments.lambada is None:
        raise SettingsError("there is nothing to measure on: give --text or --lambada")
    if arguments.text is None and (arguments.window, arguments.stride) != (None, None):
        raise SettingsError("--window and --stride belong to --text: give both")
    text = None if arguments.text is None else read_text(arguments.text)
    passages = None if arguments.lambada is None else read_passages(arguments.lambada)
    figures: dict[str, Any] = {"model": arguments.model}
    with _opened(arguments) as (context, tokenizer, session):
        if text is not None:
            sizes = {"window": arguments.window, "stride": arguments.stride}
            found = text_perplexity(session, tokenizer, text, context, **sizes)
            figures["perplexity"] = dataclasses.asdict(found)
        if passages is not None:
            figures["lambada"] = dataclasses.asdict(last_words(session, tokenizer, passages, context))
    if arguments.json:
        print(json.dumps(figures))
        return 0
    if "perplexity" in figures:
        row = figures["perplexity"]
        where = f"window {row['window']}, stride {row['stride']}"
        print(f"perplexity     {row['value']:.4f} on {row['tokens']:,} tokens ({where})")
    if "lambada" in figures:
        row = figures["lambada"]
        print(f"last words     {100 * row['accuracy']:.2f} % of {row['passages']:,} passages")
    return 0


@contextlib.contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[tuple[int, Tokenizer, Session]]:
    """Context length, tokenizer and session of a bundle, or of a model."""
    folder = Path(arguments.model)
    if (folder / MANIFEST_NAME).is_file() or arguments.graph is not None or (folder.is_dir() and is_foreign(folder)):
        bundle, session = open_folder(folder, arguments.threads, arguments.graph)
        try:
            yield bundle.manifest.model.context_length, Tokenizer(bundle.path / TOKENIZER_NAME), session
        finally:
            session.close()
        return
    found = importlib.metadata.entry_points(group=_ENTRY_POINTS, name="torch")
    if not found:
        raise BundleMissingError(
            f'{arguments.model} is no bundle, and models need the exporter: pip install "edgelm[export]"'
        )
    with next(iter(found)).load()(arguments.model, arguments.threads) as opened:
        yield opened
