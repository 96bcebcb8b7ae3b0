"""Quality of a model: perplexity of a text, distance from another model on it, accuracy of the last word on LAMBADA.

Works on any `Session`, so that the same code judges a bundle and its source model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError, SettingsError, VerificationError
from ..host.files import read_text
from ..sessions.protocol import Session
from ..text.tokenizer import Tokenizer
from .divergence import divergence, log_softmax
from .scoring import DEFAULT_WINDOW, Perplexity, default_stride, negative_log_likelihood, perplexity, score

# Rows of logits whose divergence is computed at once, to limit memory.
_ROWS = 16


@dataclass(frozen=True)
class Against:
    """A model compared with a reference, on the same tokens in the same windows.

    perplexity: of the reference; increase_percent: how much higher the model's is; kl, kl_p99: KL divergence of the
    next token's distribution from the reference's, mean and 99th percentile, in nats a token; same: share of the
    tokens, 0 to 1, at which both have the same most likely token.
    """

    perplexity: float
    increase_percent: float
    kl: float
    kl_p99: float
    same: float


@dataclass(frozen=True)
class LastWords:
    """accuracy: share of the passages, 0 to 1, whose last word greedy decoding gives; passages: their number."""

    accuracy: float
    passages: int


def text_perplexity(
    session: Session,
    tokenizer: Tokenizer,
    text: str,
    context_length: int,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of a text, special tokens of the tokenizer included, in windows as `runtime.scoring` says.

    window: 512 tokens if not given, or the context where that is shorter; stride: half of it. Raises: SettingsError for
    a window that the context does not hold; PromptError for a text of less than two tokens.
    """
    ids, window = _windowed(tokenizer, text, context_length, window)
    return perplexity(session, ids, window, stride)


def text_against(
    session: Session,
    reference: Session,
    tokenizer: Tokenizer,
    text: str,
    context_length: int,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> tuple[Perplexity, Against]:
    """Perplexity of a text, and the comparison with a reference, which runs the same tokens in lockstep.

    context_length: the shorter of the two. Memory: the logits of one piece of each, and three numbers a token. Raises:
    as `text_perplexity`; SettingsError for vocabularies of two sizes; VerificationError for logits that are no numbers.
    """
    ids, window = _windowed(tokenizer, text, context_length, window)
    stride = default_stride(window) if stride is None else stride
    rows: list[NDArray[np.float64]] = []
    for (targets, ours), (_, theirs) in zip(
        score(session, ids, window, stride), score(reference, ids, window, stride), strict=True
    ):
        if ours.shape != theirs.shape:
            raise SettingsError(
                f"the vocabularies have {ours.shape[1]} and {theirs.shape[1]} tokens: compare with a model of the same"
            )
        for begin in range(0, len(targets), _ROWS):
            part = slice(begin, begin + _ROWS)
            rows.append(_compared(targets[part], ours[part], theirs[part]))
    losses, expected_losses, divergences, same = np.concatenate(rows, axis=1)
    if not np.isfinite(divergences).all():
        token = int(np.argmin(np.isfinite(divergences)))
        raise VerificationError(f"the logits at token {token + 1} are not all numbers, in one of both models")
    value, expected = np.exp(losses.mean()), np.exp(expected_losses.mean())
    return Perplexity(float(value), losses.size, window, stride), Against(
        perplexity=float(expected),
        increase_percent=float(100 * (value / expected - 1)),
        kl=float(divergences.mean()),
        kl_p99=float(np.percentile(divergences, 99)),
        same=float(same.mean()),
    )


def _compared(
    targets: NDArray[np.int64], ours: NDArray[np.float32], theirs: NDArray[np.float32]
) -> NDArray[np.float64]:
    """For each row: both negative log-likelihoods, the divergence, whether the first choices are equal; (4, n)."""
    losses = [negative_log_likelihood(logits, targets) for logits in (ours, theirs)]
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    return np.stack([*losses, divergence(log_softmax(theirs), log_softmax(ours)), same.astype(np.float64)])


def _windowed(tokenizer: Tokenizer, text: str, context_length: int, window: int | None) -> tuple[list[int], int]:
    """The text's tokens, and the window to score them in."""
    if window is not None and not 2 <= window <= context_length:
        raise SettingsError(f"the window must be 2 to {context_length} tokens for this model, found {window}")
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise PromptError("the text has fewer than two tokens: give a longer one")
    return ids, min(DEFAULT_WINDOW, context_length) if window is None else window


def last_words(session: Session, tokenizer: Tokenizer, passages: Iterable[str], context_length: int) -> LastWords:
    """Accuracy of the last word (LAMBADA, Paperno et al., arXiv 1606.06031), as EleutherAI's lm-evaluation-harness
    defines it for `lambada_openai`.

    A passage is cut at its last blank. The word counts if, after the tokens of what stands before the blank, each token
    of blank and word is the most likely one given those before it. Passages that the context does not hold lose their
    beginning. Raises: PromptError where there are none, or one is a single word.
    """
    right = count = 0
    for passage in passages:
        before, blank, _ = passage.rstrip().rpartition(" ")
        if not blank or not before:
            raise PromptError(f"passage {count + 1} has no blank in front of a last word: {passage[:60]!r}")
        ids = tokenizer.encode(passage.rstrip())
        # If the tokenizer joins the blank with the text before it, at least the last token is scored.
        begin = min(len(tokenizer.encode(before)), len(ids) - 1)
        right += _is_said(session, ids[-context_length:], len(ids) - begin)
        count += 1
    if not count:
        raise PromptError("there are no passages")
    return LastWords(right / count, count)


def read_passages(path: Path) -> list[str]:
    """The texts of a file of JSON lines, each an object with the key `text`. Raises: PromptError."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}): give a file of JSON lines") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PromptError(f"{path}, line {number} is not a JSON object with the key text") from error
    return found


def _is_said(session: Session, ids: Sequence[int], target: int) -> bool:
    """Whether greedy decoding gives the last `target` tokens after those before them."""
    target = min(target, len(ids) - 1)
    session.rewind(0)
    logits = session.step(ids[:-1], target)
    return [int(token) for token in logits.argmax(axis=1)] == list(ids[-target:])
