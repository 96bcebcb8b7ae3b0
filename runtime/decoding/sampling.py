"""From a row of logits to a token: settings that change logits, narrow the choice and draw. Knows no text and no
session.

The order is transformers': logit bias, repetition penalty, presence and frequency penalty, min_tokens, grammar,
temperature, top-k, top-p, min-p. The functions change the row that they are given; a logit of -inf bans a token.
`docs/generation.md` has the formulas and their sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import SessionError, SettingsError
from ..results import TokenLogprob
from ..settings import GenerationSettings

Row = NDArray[np.floating[Any]]
_BANNED = -np.inf


def require_numbers(largest: np.float32) -> None:
    """Raise SessionError if the largest logit is NaN or infinite. If any logit is NaN, argmax finds a NaN."""
    if not largest < np.inf:
        raise SessionError("the model's logits are NaN or infinite: export the bundle again, and check its source")


class Grammar(Protocol):
    """A constraint on an answer, token by token."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete: nothing can follow."""

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab_size) bool: the tokens that may come next."""

    def accept(self, token: int) -> None:
        """Advance by a token that was allowed."""


class Sampler:
    """Chooses the tokens of one answer under its settings. Each row is chosen from once, in the order of the text."""

    def __init__(
        self,
        settings: GenerationSettings,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        vocab_size: int,
        grammar: Grammar | None = None,
    ) -> None:
        """prompt_ids: repetition_penalty counts them as said; end_ids: min_tokens bans them at first."""
        self._settings = settings
        self._grammar = grammar
        self._random = np.random.Generator(np.random.PCG64(settings.seed))
        self._end_ids = sorted(end_ids)
        self._bias_ids = list(settings.logit_bias)
        self._bias = np.array(list(settings.logit_bias.values()), np.float32)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[list(prompt_ids)] = True
        self._counts = np.zeros(vocab_size, np.int64)
        self._changes = grammar is not None or not dataclasses.replace(settings, min_tokens=0, logprobs=None).plain
        self._chosen = 0
        self.logprobs: list[TokenLogprob] = []

    @property
    def finished(self) -> bool:
        """Whether the answer is complete because its grammar allows nothing more."""
        return self._grammar is not None and self._grammar.finished

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token. logits: (vocab_size) float32, left as they are.

        Raises: SettingsError, if the settings leave no token; SessionError for logits that are NaN.
        """
        row, best = self._best(logits)
        require_numbers(row[best])
        if row[best] == _BANNED:
            raise SettingsError("no token is left to choose: logit_bias, min_tokens, or schema and regex ban them all")
        token = best if self._settings.deterministic else self._drawn(row)
        if self._settings.logprobs is not None:
            self.logprobs.append(log_probabilities(logits, token, self._settings.logprobs))
        self._chosen += 1
        self._seen[token] = True
        self._counts[token] += 1
        if self._grammar is not None and token not in self._end_ids:
            self._grammar.accept(token)
        return token

    def _best(self, logits: NDArray[np.float32]) -> tuple[Row, int]:
        """The row to choose from, and its most likely token. If only min_tokens changes logits, the row is copied only
        when an end token is the most likely one."""
        if not self._changes:
            best = int(logits.argmax())
            if self._chosen >= self._settings.min_tokens or best not in self._end_ids:
                return logits, best
        row = self._adjusted(logits)
        return row, int(row.argmax())

    def _adjusted(self, logits: NDArray[np.float32]) -> Row:
        settings, row = self._settings, logits.copy()
        if self._bias_ids:
            row[self._bias_ids] += self._bias
        if settings.repetition_penalty != 1:
            penalize_repetition(row, self._seen, settings.repetition_penalty)
        if settings.presence_penalty or settings.frequency_penalty:
            penalize_use(row, self._counts, settings.presence_penalty, settings.frequency_penalty)
        if self._chosen < settings.min_tokens:
            row[self._end_ids] = _BANNED
        if self._grammar is not None:
            row[~self._grammar.allowed()] = _BANNED
        return row

    def _drawn(self, logits: Row) -> int:
        settings = self._settings
        if settings.top_k:
            keep_top_k(logits, settings.top_k)
        # Temperature keeps the order of tokens, so it is applied after top-k, where it costs less.
        tokens = _left(logits)
        row = with_temperature(logits if tokens is None else logits[tokens], settings.temperature)
        if settings.top_p < 1:
            keep_top_p(row, settings.top_p)
        if settings.min_p:
            keep_min_p(row, settings.min_p)
        place = draw(row, self._random.random())
        return place if tokens is None else int(tokens[place])


def penalize_repetition(row: Row, seen: NDArray[np.bool_], penalty: float) -> None:
    """Divide the positive logits of seen tokens by the penalty and multiply the others. seen: (vocab_size) bool."""
    values = row[seen]
    row[seen] = np.where(values > 0, values / penalty, values * penalty)


def penalize_use(row: Row, counts: NDArray[np.int64], presence: float, frequency: float) -> None:
    """Subtract `presence` once and `frequency` for each use. counts: (vocab_size) int64, uses in the answer."""
    used = np.flatnonzero(counts)
    row[used] -= presence + frequency * counts[used]


def with_temperature(row: Row, temperature: float) -> NDArray[np.float64]:
    """The logits divided by a temperature above 0, in float64. Their maximum is subtracted first, so that nothing
    overflows; probabilities stay the same."""
    with np.errstate(over="ignore"):
        return np.asarray((row - row.max()).astype(np.float64) / temperature)


def keep_top_k(row: Row, k: int) -> None:
    """Ban all but the k highest logits; ties with the k-th one stay too."""
    if k < len(row):
        row[row < np.partition(row, -k)[-k]] = _BANNED


def keep_top_p(row: Row, p: float) -> None:
    """Ban the least likely tokens whose probabilities sum to at most 1 - p; the most likely one always stays."""
    probabilities = _softmax(row)
    # Tokens below (1 - p) / n are banned in any case, since together they have at most 1 - p. Only the few others are
    # sorted.
    rest = np.flatnonzero(probabilities > (1 - p) / len(row))
    order = rest[np.argsort(probabilities[rest], kind="stable")]
    below = probabilities.sum() - probabilities[rest].sum()
    banned = order[below + np.cumsum(probabilities[order]) <= 1 - p]
    best = int(row.argmax())
    keep = np.zeros(len(row), bool)
    keep[rest] = True
    keep[banned] = False
    keep[best] = True
    row[~keep] = _BANNED


def keep_min_p(row: Row, p: float) -> None:
    """Ban tokens whose probability is less than p times that of the most likely one."""
    row[np.exp(row - row.max()) < p] = _BANNED


def draw(row: Row, number: float) -> int:
    """The token at which the cumulative probabilities, in the order of ids, pass a number from [0, 1)."""
    tokens = _left(row)
    cumulative = np.cumsum(np.exp((row if tokens is None else row[tokens]) - row.max()))
    place = min(int(np.searchsorted(cumulative, number * cumulative[-1], side="right")), len(cumulative) - 1)
    return place if tokens is None else int(tokens[place])


def log_probabilities(logits: NDArray[np.float32], token: int, alternatives: int) -> TokenLogprob:
    """The log-probability of a token and of the most likely ones, under the model's own distribution: softmax of the
    logits before any setting."""
    largest = logits.max()
    total = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    count = min(alternatives, len(logits))
    best = np.argpartition(logits, -count)[-count:] if count else np.zeros(0, np.int64)
    top = sorted(((int(index), float(logits[index]) - total) for index in best), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, float(logits[token]) - total, tuple(top))


def check_token_ids(settings: GenerationSettings, vocab_size: int) -> None:
    """Raises: SettingsError for ids that a model of this vocabulary does not have."""
    for name, ids in (("stop_token_ids", settings.stop_token_ids), ("logit_bias", settings.logit_bias)):
        beyond = [token for token in ids if token >= vocab_size]
        if beyond:
            raise SettingsError(f"{name} names token {beyond[0]}: the model has ids 0 to {vocab_size - 1}")


def _left(row: Row) -> NDArray[np.intp] | None:
    """The tokens that are not banned; None if no token is banned."""
    left = row > _BANNED
    return None if left.all() else np.flatnonzero(left)


def _softmax(row: Row) -> NDArray[np.float64]:
    weights = np.exp(np.asarray(row, np.float64) - row.max())
    return np.asarray(weights / weights.sum())
