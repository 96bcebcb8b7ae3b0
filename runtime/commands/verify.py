"""`edgelm verify`: check that a bundle is unchanged, and that this machine computes what it promises."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.folder import TOKENIZER_NAME, Bundle
from ..bundle.manifest import Model
from ..errors import PromptError, VerificationError
from ..evaluation.scoring import DEFAULT_WINDOW, perplexity
from ..sessions.loading import open_folder
from ..sessions.protocol import Session
from ..text.tokenizer import Tokenizer
from .folder import add_folder, add_provider
from .text_file import read_text

SUMMARY = "check a bundle's files and its answers on this machine"

_CUT_TOKENS = 384
_CUTS = ((1,), (2, 3), (257,), (64, 1, 31))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_folder(parser)
    add_provider(parser)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure perplexity on, too")
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (the physical ones)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Load, which checks the digests; compare a text in pieces with the whole; measure perplexity if a text is
    given."""
    text = None if arguments.text is None else read_text(arguments.text)
    bundle, session = open_folder(arguments.bundle, arguments.threads, arguments.graph, provider=arguments.provider)
    manifest = bundle.manifest
    findings: dict[str, Any] = {"digest": manifest.digest, "files": len(manifest.files)}
    findings["cut_difference"] = cut_difference(session, _sample_ids(manifest.model))
    if text is not None:
        findings["perplexity"] = _perplexity(session, bundle, text)
    exact = findings["cut_difference"] == 0
    if manifest.exact_under_cuts and not exact:
        raise VerificationError(
            f"a text fed in pieces gives other logits than the whole, by up to {findings['cut_difference']:.3g}: "
            "onnxruntime computes differently on this machine; "
            "the answers are still valid, but depend on how a prompt is cut into pieces"
        )
    if arguments.json:
        print(json.dumps({**findings, "exact_under_cuts": exact}))
        return 0
    known = "all as exported" if bundle.has_manifest else "without a manifest to compare them with"
    print(f"files          {findings['files']}, {known} ({manifest.digest[:23]}...)")
    print(f"any cut        {_cut_words(exact, findings['cut_difference'])}")
    if "perplexity" in findings:
        figures = findings["perplexity"]
        where = f"window {figures['window']}, stride {figures['stride']}"
        print(f"perplexity     {figures['value']:.4f} on {figures['tokens']:,} tokens ({where})")
    return 0


def cut_difference(session: Session, token_ids: Sequence[int]) -> float:
    """Largest absolute difference of the logits of a text fed at once and fed in pieces of several sizes."""
    whole = _logits(session, token_ids, (len(token_ids),))
    return max(float(np.abs(_logits(session, token_ids, sizes) - whole).max()) for sizes in _CUTS)


def _logits(session: Session, token_ids: Sequence[int], sizes: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    session.rewind(0)
    rows, begin, turn = [], 0, 0
    while begin < len(token_ids):
        piece = token_ids[begin : begin + sizes[turn % len(sizes)]]
        rows.append(session.step(piece, len(piece)).copy())
        begin, turn = begin + len(piece), turn + 1
    session.rewind(0)
    return np.concatenate(rows)


def _sample_ids(model: Model) -> list[int]:
    """Token ids from the whole vocabulary. Any ids can be computed with."""
    count = min(_CUT_TOKENS, model.context_length)
    return [int(token) for token in np.random.default_rng(0).integers(0, model.vocab_size, count)]


def _perplexity(session: Session, bundle: Bundle, text: str) -> dict[str, Any]:
    ids = Tokenizer(bundle.path / TOKENIZER_NAME).encode(text)
    if len(ids) < 2:
        raise PromptError("the text has fewer than two tokens: give a longer one")
    window = min(DEFAULT_WINDOW, bundle.manifest.model.context_length)
    return dataclasses.asdict(perplexity(session, ids, window))


def _cut_words(exact: bool, difference: float) -> str:
    return (
        "the same logits, bit for bit"
        if exact
        else f"logits differ by up to {difference:.3g} (this scheme does not promise equality)"
    )
