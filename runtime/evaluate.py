"""How good a model is at language: perplexity of a text, and the accuracy of the last word on LAMBADA.

Works on any `Session`, so that a bundle and the model that it was made of are judged by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import PromptError, SettingsError
from .scoring import DEFAULT_WINDOW, Perplexity, perplexity
from .session import Session
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class LastWords:
    """accuracy: share of the passages, 0 to 1, whose last word is what greedy decoding says; passages: how many."""

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
    if window is not None and not 2 <= window <= context_length:
        raise SettingsError(f"the window must be 2 to {context_length} tokens for this model, found {window}")
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise PromptError("the text has fewer than two tokens: give a longer one")
    return perplexity(session, ids, window or min(DEFAULT_WINDOW, context_length), stride)


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
        # Where the tokenizer joins the blank with what is before it, at least the last token is asked for.
        begin = min(len(tokenizer.encode(before)), len(ids) - 1)
        right += _is_said(session, ids[-context_length:], len(ids) - begin)
        count += 1
    if not count:
        raise PromptError("there are no passages")
    return LastWords(right / count, count)


def read_passages(path: Path) -> list[str]:
    """The texts of a file of JSON lines, each an object with the key `text`. Raises: PromptError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}): give a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PromptError(f"{path}, line {number} is no JSON object with the key text") from error
    return found


def _is_said(session: Session, ids: Sequence[int], target: int) -> bool:
    """Whether greedy decoding gives the last `target` tokens after those before them."""
    target = min(target, len(ids) - 1)
    session.rewind(0)
    logits = session.step(ids[:-1], target)
    return [int(token) for token in logits.argmax(axis=1)] == list(ids[-target:])
