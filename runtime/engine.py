"""The engine: text in, text out. Joins tokenizer, chat template, response cache and decoding over one loaded bundle.

Three tiers: `decode.Sequencer` (ids to ids), `Engine.stream` (chunks of text), `Engine.generate` (a whole completion).
"""

from __future__ import annotations

import json
import operator
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from . import bundle as bundle_files
from . import machine
from .bundle import Bundle
from .decode import Sequencer
from .errors import (
    BundleCorruptError,
    ContextLengthError,
    EngineBusyError,
    EngineClosedError,
    PromptError,
    SettingsError,
    TemplateError,
)
from .response_cache import (
    CachedAnswer,
    FinishReason,
    ResponseCache,
    ResponseCacheSettings,
    open_response_cache,
    response_key,
)
from .session import Session, open_session
from .tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from .chat import ChatTemplate, Message

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Stats:
    """What a request cost. Times in seconds, measured from the call; rates over the tokens after the first one.

    prompt_tokens: tokens of the prompt; reused_tokens: those of them that were in the cache already;
    generated_tokens: tokens of the answer, an end token not counted; time_to_first_token_s: includes tokenization and
    waiting for another thread's request; decode_tokens_per_s: 0.0 where fewer than two tokens were computed;
    resident_bytes: physical memory of the process at the end; response_cache_hit: nothing was computed.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    time_to_first_token_s: float
    decode_tokens_per_s: float
    resident_bytes: int
    response_cache_hit: bool


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: whole characters only. `finish_reason` and `stats` are set on the last chunk alone, whose
    text may be empty."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. finish_reason: "stop" (the model ended it), "length" (max_tokens) or "context_full"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


@dataclass(frozen=True)
class _Request:
    """A validated request. `limit` is max_tokens, or less where the context ends first."""

    token_ids: list[int]
    max_tokens: int
    limit: int
    started: float


def load(
    path: str | Path, *, threads: int | None = None, response_cache: bool | ResponseCacheSettings = True
) -> Engine:
    """Open a bundle and make it ready to generate.

    threads: cores to compute with (None: physical cores that this process may use). response_cache: keep finished
    answers and give them again for the same request: True in memory (16 MiB) and in a database below EDGELM_HOME
    (256 MiB, readable by this user alone, shared by the processes), False not at all, or as settings say.
    Every file is checked against the manifest's digests; the weights' are computed while onnxruntime prepares them.
    Raises: BundleError and below for the folder, SettingsError for threads and settings, SessionError from onnxruntime,
    MissingExtraError for a Redis server without redis-py. A cache that cannot be used is no error: it is warned of.
    """
    responses = open_response_cache(response_cache)
    bundle = Bundle.open(path)
    session = open_session(bundle, threads)
    tokenizer = Tokenizer(bundle.path / bundle_files.TOKENIZER_NAME)
    return Engine(bundle, session, tokenizer, responses)


class Engine:
    """One loaded model and one conversation's cache. Use it in a `with` block, or call `close()`.

    Threads may share an engine: requests take turns. A prompt that starts as the last one did (a conversation that goes
    on, a common preamble) runs only what is new; with the scheme `int8-rowwise` the answer is bit for bit the one of a
    fresh engine.
    """

    def __init__(self, bundle: Bundle, session: Session, tokenizer: Tokenizer, responses: ResponseCache | None) -> None:
        """For those who bring their own session; everyone else calls `load`."""
        self.bundle = bundle
        self.tokenizer = tokenizer
        self._digest = bundle.manifest.digest
        self._session = session
        self._sequencer = Sequencer(session)
        self._responses = responses
        self._template = _bundle_template(bundle)
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._closed = False
        self._numerics = machine.numerics()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> Completion:
        """The greedy continuation of a prompt, as a whole. Exactly one of prompt, messages and token_ids is given.

        prompt: plain text; messages: [{"role": ..., "content": ...}, ...] for the model's chat template; token_ids:
        used as they are. max_tokens: the most tokens to generate.
        Raises: PromptError, ContextLengthError, SettingsError, TemplateError, EngineError, SessionError.
        """
        chunks = list(self.stream(prompt, messages=messages, token_ids=token_ids, max_tokens=max_tokens))
        last = chunks[-1]
        assert last.finish_reason is not None and last.stats is not None, "the last chunk of a stream carries both"
        ids = tuple(token for chunk in chunks for token in chunk.token_ids)
        return Completion("".join(chunk.text for chunk in chunks), ids, last.finish_reason, last.stats)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> Iterator[Chunk]:
        """The same as `generate`, in chunks as they come. Arguments are checked before this returns.

        Close the iterator (or leave the loop) to cancel: the engine is free again after the step that is running.
        """
        request = self._request(prompt, messages, token_ids, max_tokens)
        return self._cached_or_computed(request)

    def encode(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """The token ids that `generate` would feed for these arguments. Raises: as `generate`."""
        given = [
            name
            for name, value in (("prompt", prompt), ("messages", messages), ("token_ids", token_ids))
            if value is not None
        ]
        if len(given) != 1:
            raise PromptError(
                f"give exactly one of prompt, messages and token_ids, found {' and '.join(given) or 'none'}"
            )
        if prompt is not None:
            ids = self.tokenizer.encode(prompt) if prompt else []
        elif messages is not None:
            ids = self.tokenizer.encode(self._render(messages), special=False) if messages else []
        else:
            ids = self._checked_ids(token_ids if token_ids is not None else ())
        if not ids:
            raise PromptError(f"the {given[0]} is empty: give at least one token to continue from")
        return ids

    def close(self) -> None:
        """Free the model and the response cache's file. Waits for a request that runs in another thread. Calling it
        again does nothing."""
        if self._owner == threading.get_ident():
            raise EngineBusyError("this thread still iterates over a stream of the engine: close the stream first")
        with self._turn:
            self._closed = True
            self._session.close()
        if self._responses is not None:
            self._responses.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
        max_tokens: int,
    ) -> _Request:
        started = time.perf_counter()
        if self._closed:
            raise EngineClosedError("the engine is closed: load the bundle again")
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise SettingsError(f"max_tokens must be a whole number of 1 or more, found {max_tokens!r}")
        ids = self.encode(prompt, messages=messages, token_ids=token_ids)
        context = self.bundle.manifest.model.context_length
        if len(ids) > context:
            raise ContextLengthError(
                f"the prompt has {len(ids):,} tokens, the model's context holds {context:,}: shorten it"
            )
        # The last token that is chosen needs no place in the context, since nothing follows it.
        return _Request(ids, max_tokens, min(max_tokens, context - len(ids) + 1), started)

    def _cached_or_computed(self, request: _Request) -> Iterator[Chunk]:
        if self._responses is None:
            yield from self._compute(request)
            return
        # A thread that holds the turn must not wait for another's computation, which may be waiting for the turn.
        patience = 0.0 if self._owner == threading.get_ident() else None
        with self._responses.look_up(self._response_key(request), timeout_s=patience) as found:
            known = found.answer
            if known is None:
                chunks: list[Chunk] = []
                for chunk in self._compute(request):
                    chunks.append(chunk)
                    if chunk.finish_reason is not None:
                        found.keep(_answer_of(chunks))
                    yield chunk
        if known is not None:
            yield from self._replay(request, known)

    def _response_key(self, request: _Request) -> str:
        """Everything that can change the answer: what the manifest says beside the files' digest, too."""
        settings = {
            "max_tokens": request.max_tokens,
            "limit": request.limit,
            "stop_ids": sorted(self.bundle.manifest.tokens.eos),
            "numerics": self._numerics,
        }
        return response_key(self._digest, request.token_ids, settings)

    def _compute(self, request: _Request) -> Iterator[Chunk]:
        """Run the model while holding the turn, from the first `next` to the end or the closing of the iterator."""
        self._take_turn()
        try:
            yield from self._decode(request)
        finally:
            self._owner = None
            self._turn.release()

    def _decode(self, request: _Request) -> Iterator[Chunk]:
        reused = self._sequencer.reusable(request.token_ids)
        eos = self.bundle.manifest.tokens.eos
        detokenizer = Detokenizer(self.tokenizer, request.token_ids)
        generated, waiting, first, reason = 0, [], 0.0, self._end_without_stop(request)
        for token in self._sequencer.greedy(request.token_ids, request.limit, eos):
            first = first or time.perf_counter()
            if token in eos:
                reason = "stop"
                break
            generated += 1
            waiting.append(token)
            text = detokenizer.add(token)
            if text:
                yield Chunk(text, tuple(waiting))
                waiting = []
        elapsed = time.perf_counter() - first
        computed = generated - 1 + (reason == "stop")
        stats = Stats(
            prompt_tokens=len(request.token_ids),
            reused_tokens=reused,
            generated_tokens=generated,
            time_to_first_token_s=first - request.started,
            decode_tokens_per_s=computed / elapsed if computed > 0 else 0.0,
            resident_bytes=machine.resident_bytes(),
            response_cache_hit=False,
        )
        yield Chunk(detokenizer.finish(), tuple(waiting), reason, stats)

    def _replay(self, request: _Request, answer: CachedAnswer) -> Iterator[Chunk]:
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

    def _end_without_stop(self, request: _Request) -> FinishReason:
        return "length" if request.limit == request.max_tokens else "context_full"

    def _take_turn(self) -> None:
        if self._owner == threading.get_ident():
            raise EngineBusyError(
                "this thread still iterates over another stream of the engine: finish or close it first"
            )
        self._turn.acquire()
        if self._closed:
            self._turn.release()
            raise EngineClosedError("the engine was closed while this request waited: load the bundle again")
        self._owner = threading.get_ident()

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        vocab_size = self.bundle.manifest.model.vocab_size
        try:
            ids = [operator.index(token) for token in token_ids]
        except TypeError as error:
            raise PromptError(f"token_ids must be a sequence of whole numbers ({error})") from error
        for token in ids:
            if not 0 <= token < vocab_size:
                raise PromptError(f"token id {token} is out of range: the model has ids 0 to {vocab_size - 1}")
        return ids

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise TemplateError("the bundle has no chat template, so it takes no messages: give a prompt instead")
        return self._template.render(messages)


def _answer_of(chunks: Sequence[Chunk]) -> CachedAnswer:
    reason = chunks[-1].finish_reason
    assert reason is not None, "only a finished stream is stored"
    return CachedAnswer(tuple((chunk.text, chunk.token_ids) for chunk in chunks), reason)


def _bundle_template(bundle: Bundle) -> ChatTemplate | None:
    text = bundle.read_text(bundle_files.TOKENIZER_CONFIG_NAME)
    name = bundle.path / bundle_files.TOKENIZER_CONFIG_NAME
    try:
        config = json.loads("{}" if text is None else text)
    except (ValueError, RecursionError) as error:
        raise BundleCorruptError(f"{name} is not valid JSON ({error}): export the bundle again") from error
    if not isinstance(config, dict):
        raise BundleCorruptError(f"{name} is not a JSON object: export the bundle again")
    template = bundle.read_text(bundle_files.CHAT_TEMPLATE_NAME)
    if not template and not config.get("chat_template"):
        return None
    from .chat import find_template

    return find_template(template, config)
