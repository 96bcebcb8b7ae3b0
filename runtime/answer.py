"""One request from its validated form to the chunks of its answer: decoding, text, stop strings, why it ended, figures.

Knows no caches of answers and no turns between threads; those are the engine's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from . import machine
from .decode import Greedy, Sequencer
from .lookup import Lookup
from .manifest import Manifest
from .results import Chunk, FinishReason, Stats, TokenLogprob
from .sampling import Grammar, Sampler
from .session import least_rows
from .settings import GenerationSettings
from .stops import StopMatcher
from .tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True)
class Request:
    """A validated request. `started` is on the clock of `time.perf_counter`; setting `cancelled` ends the answer after
    the step that is running."""

    token_ids: list[int]
    settings: GenerationSettings
    started: float
    grammar: Grammar | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def seconds_left(self) -> float | None:
        """Until the deadline, 0 or less behind it; None where there is none."""
        timeout = self.settings.timeout
        return None if timeout is None else self.started + timeout - time.perf_counter()

    def interrupted(self) -> bool:
        """Whether the answer is to end with what is there."""
        left = self.seconds_left()
        return self.cancelled.is_set() or (left is not None and left <= 0)


class Answer:
    """The computation of one answer. Use it once."""

    def __init__(self, request: Request, manifest: Manifest, tokenizer: Tokenizer) -> None:
        settings = request.settings
        self._request = request
        self._context = manifest.model.context_length
        self._end_ids = {*manifest.tokens.eos, *settings.stop_token_ids}
        self._sampler = (
            None
            if settings.plain
            else Sampler(settings, request.token_ids, self._end_ids, manifest.model.vocab_size, request.grammar)
        )
        self._writer = _Writer(Detokenizer(tokenizer, request.token_ids), settings)
        # Guesses are exact for any chooser, since each row of logits is that of a plain run.
        looks = settings.lookup and manifest.exact_under_cuts
        self._lookup = Lookup(free=least_rows(manifest.model) - 1) if looks else None
        self._reported = 0

    def chunks(self, sequencer: Sequencer) -> Iterator[Chunk]:
        """Compute. The last chunk has the reason and the figures. Raises: SessionError, SettingsError."""
        reused = sequencer.reusable(self._request.token_ids)
        chosen, generated, first, ended = 0, 0, 0.0, False
        for token in self._tokens(sequencer):
            first = first or time.perf_counter()
            chosen += 1
            ended = token in self._end_ids
            if ended:
                break
            text, ids = self._writer.add(token)
            if text:
                generated += len(ids)
                yield Chunk(text, ids, logprobs=self._logprobs(ids))
            ended = self._writer.stopped or (self._sampler is not None and self._sampler.finished)
            if ended:
                break
        now = time.perf_counter()
        text, ids = self._writer.finish()
        stats = Stats(
            prompt_tokens=len(self._request.token_ids),
            reused_tokens=reused,
            generated_tokens=generated + len(ids),
            time_to_first_token_s=(first or now) - self._request.started,
            decode_tokens_per_s=(chosen - 1) / (now - first) if chosen > 1 else 0.0,
            resident_bytes=machine.resident_bytes(),
            response_cache_hit=False,
            guessed_tokens=self._lookup.guessed if self._lookup is not None else 0,
            accepted_tokens=self._lookup.accepted if self._lookup is not None else 0,
        )
        reason = self._reason(chosen, ended or self._writer.stopped)
        yield Chunk(text, ids, reason, stats, self._logprobs(ids))

    def _tokens(self, sequencer: Sequencer) -> Iterator[int]:
        request, settings = self._request, self._request.settings
        chooser = self._sampler or Greedy()
        if settings.context_full == "slide":
            return sequencer.generate_sliding(
                request.token_ids,
                settings.max_tokens,
                chooser,
                self._end_ids,
                request.interrupted,
                context_length=self._context,
                keep=settings.keep,
                lookup=self._lookup,
            )
        limit = min(settings.max_tokens, self._room())
        return sequencer.generate(
            request.token_ids, limit, chooser, self._end_ids, request.interrupted, lookup=self._lookup
        )

    def _room(self) -> int:
        """How many tokens the context leaves: the last one that is chosen needs no place, since nothing follows it."""
        return self._context - len(self._request.token_ids) + 1

    def _reason(self, chosen: int, ended: bool) -> FinishReason:
        if ended:
            return "stop"
        if chosen == self._request.settings.max_tokens:
            return "length"
        full = self._request.settings.context_full == "stop" and chosen == self._room()
        return "context_full" if full else "deadline"

    def _logprobs(self, ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
        if self._sampler is None or self._request.settings.logprobs is None:
            return ()
        self._reported += len(ids)
        return tuple(self._sampler.logprobs[self._reported - len(ids) : self._reported])


def unanswered(request: Request) -> Chunk:
    """The answer to a request whose deadline passed before it could begin."""
    elapsed = time.perf_counter() - request.started
    stats = Stats(len(request.token_ids), 0, 0, elapsed, 0.0, machine.resident_bytes(), False)
    return Chunk("", (), "deadline", stats)


class _Writer:
    """Tokens to text and the tokens that it completes, up to the first stop string."""

    def __init__(self, detokenizer: Detokenizer, settings: GenerationSettings) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(settings.stop) if settings.stop else None
        self._unmatched = settings.min_tokens
        self._waiting: list[int] = []
        # Tokens whose text is read and not all shown, with the length of the text up to their end.
        self._read: deque[tuple[int, list[int]]] = deque()
        self._read_length = self._shown_length = self._count = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._matcher is not None and self._matcher.stopped

    def add(self, token: int) -> tuple[str, tuple[int, ...]]:
        """The text that may be shown now, and the tokens that end within it; without text there are none."""
        self._count += 1
        self._waiting.append(token)
        return self._show(self._detokenizer.add(token))

    def finish(self) -> tuple[str, tuple[int, ...]]:
        """What was held back, and all tokens that remain, those of an unfinished character among them; nothing, where
        a stop string ended the text, whose tokens are dropped."""
        if self.stopped:
            return "", ()
        text, ids = self._show(self._detokenizer.finish())
        if self.stopped or self._matcher is None:
            return text, ids if self.stopped else (*ids, *self._waiting)
        rest = [token for _, tokens in self._read for token in tokens]
        return text + self._matcher.finish(), (*ids, *rest, *self._waiting)

    def _show(self, text: str) -> tuple[str, tuple[int, ...]]:
        if text:
            self._read_length += len(text)
            if self._matcher is not None and self._count - len(self._waiting) >= self._unmatched:
                text = self._matcher.add(text)
            self._read.append((self._read_length, self._waiting))
            self._waiting = []
            self._shown_length += len(text)
        ids: list[int] = []
        while self._read and self._read[0][0] <= self._shown_length:
            ids += self._read.popleft()[1]
        return text, tuple(ids)
