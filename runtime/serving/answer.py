"""From a validated request to the chunks of its answer: text, stop strings, finish reason, figures.

Knows neither the response cache nor other callers; the scheduler does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..bundle.manifest import Manifest
from ..caches.responses.answers import CachedAnswer
from ..decoding.prompt_lookup import Lookup
from ..decoding.row import Greedy, Row
from ..decoding.sampling import Grammar, Sampler
from ..host import machine
from ..results import Chunk, Completion, FinishReason, Stats, TokenLogprob
from ..settings import GenerationSettings
from ..text.stops import StopMatcher
from ..text.tokenizer import Detokenizer, Tokenizer


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
        """Seconds until the deadline, 0 or less after it; None without one."""
        timeout = self.settings.timeout
        return None if timeout is None else self.started + timeout - time.perf_counter()

    def interrupted(self) -> bool:
        """Whether the answer should end as it is: cancelled, or past its deadline."""
        left = self.seconds_left()
        return self.cancelled.is_set() or (left is not None and left <= 0)


class Answer:
    """Collects the tokens of one answer. Use it once."""

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
        self._writer = _Writer(Detokenizer(tokenizer, request.token_ids, settings.special_tokens), settings)
        # Draft tokens are exact with any chooser, since each row of logits is that of a run without them.
        self._lookup = Lookup() if settings.lookup else None
        self._reported = self._chosen = self._generated = 0
        self._first = 0.0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the last token that was added ended the answer."""
        return self._ended

    def row(self, interrupted: Callable[[], bool], seconds_left: Callable[[], float | None]) -> Row:
        """The row to decode. Its tokens must be given to `add`."""
        settings = self._request.settings
        slides = settings.context_full == "slide"
        return Row(
            self._request.token_ids,
            settings.max_tokens if slides else min(settings.max_tokens, self._room()),
            self._sampler or Greedy(),
            self._end_ids,
            interrupted,
            seconds_left,
            settings.keep if slides else None,
            self._lookup,
        )

    def add(self, token: int) -> Chunk | None:
        """The chunk that the next token completes, if any."""
        self._first = self._first or time.perf_counter()
        self._chosen += 1
        self._ended = token in self._end_ids
        if self._ended:
            return None
        text, ids = self._writer.add(token)
        self._ended = self._writer.stopped or (self._sampler is not None and self._sampler.finished)
        self._generated += len(ids)
        return Chunk(text, ids, logprobs=self._logprobs(ids)) if text else None

    def finish(self, reused: int) -> Chunk:
        """The last chunk. reused: tokens of the prompt that were in the cache."""
        now = time.perf_counter()
        text, ids = self._writer.finish()
        stats = Stats(
            prompt_tokens=len(self._request.token_ids),
            reused_tokens=reused,
            generated_tokens=self._generated + len(ids),
            time_to_first_token_s=(self._first or now) - self._request.started,
            decode_tokens_per_s=(self._chosen - 1) / (now - self._first) if self._chosen > 1 else 0.0,
            resident_bytes=machine.resident_bytes(),
            response_cache_hit=False,
            guessed_tokens=self._lookup.drafted if self._lookup is not None else 0,
            accepted_tokens=self._lookup.accepted if self._lookup is not None else 0,
        )
        reason = self._reason(self._ended or self._writer.stopped)
        return Chunk(text, ids, reason, stats, self._logprobs(ids))

    def _room(self) -> int:
        """Tokens that fit into the context. The last one is never fed, so it needs no position."""
        return self._context - len(self._request.token_ids) + 1

    def _reason(self, ended: bool) -> FinishReason:
        if ended:
            return "stop"
        if self._chosen == self._request.settings.max_tokens:
            return "length"
        full = self._request.settings.context_full == "stop" and self._chosen == self._room()
        return "context_full" if full else "deadline"

    def _logprobs(self, ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
        if self._sampler is None or self._request.settings.logprobs is None:
            return ()
        self._reported += len(ids)
        return tuple(self._sampler.logprobs[self._reported - len(ids) : self._reported])


def unanswered(request: Request) -> Chunk:
    """The empty answer to a request whose deadline passed before it began."""
    elapsed = time.perf_counter() - request.started
    stats = Stats(len(request.token_ids), 0, 0, elapsed, 0.0, machine.resident_bytes(), False)
    return Chunk("", (), "deadline", stats)


def replay(request: Request, answer: CachedAnswer) -> Iterator[Chunk]:
    """The chunks of a cached answer."""
    stats = Stats(
        prompt_tokens=len(request.token_ids),
        reused_tokens=len(request.token_ids),
        generated_tokens=len(answer.token_ids),
        time_to_first_token_s=time.perf_counter() - request.started,
        decode_tokens_per_s=0.0,
        resident_bytes=machine.resident_bytes(),
        response_cache_hit=True,
    )
    *streamed, (text, ids) = answer.chunks
    for part, part_ids in streamed:
        yield Chunk(part, part_ids)
    yield Chunk(text, ids, answer.finish_reason, stats)


def completion(settings: GenerationSettings, chunks: Sequence[Chunk]) -> Completion:
    """All chunks of an answer as one."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.stats is not None, "the last chunk of a stream carries both"
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    logprobs = tuple(entry for chunk in chunks for entry in chunk.logprobs)
    asked = settings.logprobs is not None
    return Completion(
        "".join(chunk.text for chunk in chunks), ids, last.finish_reason, last.stats, logprobs if asked else None
    )


class _Writer:
    """Turns tokens into text up to the first stop string, and finds the tokens that end within each piece of text."""

    def __init__(self, detokenizer: Detokenizer, settings: GenerationSettings) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(settings.stop) if settings.stop else None
        self._unmatched = settings.min_tokens
        self._waiting: list[int] = []
        # Tokens whose text is decoded but not fully shown, with the length of the text up to their end.
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
        """The text that was held back, and all remaining tokens, including those of an unfinished character. Empty if a
        stop string ended the text: its tokens are dropped."""
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
