"""The engine: text in, text out. Joins prompts, response cache and decoding over one loaded bundle.

Three tiers: `decode.Sequencer` (ids to ids), `Engine.stream` (chunks of text), `Engine.generate` (a whole completion);
the latter two also for asyncio.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import bundle as bundle_files
from . import machine
from .answer import Answer, Request, unanswered
from .bundle import Bundle
from .decode import Sequencer
from .errors import EngineClosedError, SettingsError
from .prefix_cache import PrefixCache, PrefixCacheSettings, open_prefix_cache, prefix_settings
from .prompts import PromptEncoder
from .response_cache import CachedAnswer, ResponseCache, ResponseCacheSettings, open_response_cache, response_key
from .results import Chunk, Completion, Stats
from .sampling import check_token_ids
from .session import Session, open_folder
from .settings import GenerationSettings, SettingsKeywords
from .structured import GrammarCompiler
from .tokenizer import Tokenizer
from .turns import Caller, Turns

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .asynchronous import ChunkStream
    from .chat import Message


def load(
    path: str | Path,
    *,
    graph: str | None = None,
    threads: int | None = None,
    response_cache: bool | ResponseCacheSettings = True,
    prefix_cache: bool | PrefixCacheSettings = True,
) -> Engine:
    """Open a bundle, or a folder of optimum's or transformers.js's, and make it ready to generate.

    graph: which ONNX file, relative to the folder, where a folder of another exporter holds several.
    threads: cores to compute with (None: physical cores that this process may use). response_cache: keep finished
    answers and give them again for the same request: True in memory (16 MiB) and in a database below EDGELM_HOME
    (256 MiB, readable by this user alone, shared by the processes), False not at all, or as settings say. prefix_cache:
    keep what was computed for prompts, for later ones that start alike: True in memory (64 MiB) and in files below
    EDGELM_HOME (512 MiB, as above), False not at all, or as settings say; only where it changes no bit, which is with
    the scheme `int8-rowwise`.
    Every file is checked against the manifest's digests; the weights' are computed while onnxruntime prepares them.
    Raises: BundleError and below for the folder, SettingsError for threads and settings, SessionError from onnxruntime,
    MissingExtraError for a Redis server without redis-py. A cache that cannot be used is no error: it is warned of.
    """
    responses, settings = open_response_cache(response_cache), prefix_settings(prefix_cache)
    bundle, session = open_folder(path, threads, graph)
    tokenizer = Tokenizer(bundle.path / bundle_files.TOKENIZER_NAME)
    return Engine(bundle, session, tokenizer, responses, open_prefix_cache(settings, bundle, session))


class Engine:
    """One loaded model and one conversation's cache. Use it in a `with` block, or call `close()`.

    Threads may share an engine: requests take turns. A prompt that starts as the last one did (a conversation that goes
    on, a common preamble) runs only what is new; with the scheme `int8-rowwise` the answer is bit for bit the one of a
    fresh engine.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        tokenizer: Tokenizer,
        responses: ResponseCache | None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """For those who bring their own session; everyone else calls `load`."""
        self.bundle = bundle
        self.tokenizer = tokenizer
        self._digest = bundle.manifest.digest
        self._session = session
        self._sequencer = Sequencer(session, prefixes=prefixes)
        self._prefixes = prefixes
        self._responses = responses
        self._prompts = PromptEncoder(bundle, tokenizer)
        self._grammars = GrammarCompiler(bundle)
        self._turns = Turns()
        self._numerics = machine.numerics()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[SettingsKeywords],
    ) -> Completion:
        """The continuation of a prompt, as a whole. Exactly one of prompt, messages and token_ids is given.

        prompt: plain text; messages: [{"role": ..., "content": ...}, ...] for the model's chat template; token_ids:
        used as they are. Keywords are those of `GenerationSettings` (max_tokens, temperature, seed, stop, ...) and go
        before `settings`. Without any the answer is greedy, whatever the bundle's generation_config.json says.
        Raises: PromptError, ContextLengthError, SettingsError, TemplateError, EngineError, SessionError,
        MissingExtraError.
        """
        request = self._request(prompt, messages, token_ids, settings, keywords)
        return _completion(request, list(self._run(request, None)))

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[SettingsKeywords],
    ) -> Generator[Chunk, None, None]:
        """The same as `generate`, in chunks as they come. Arguments are checked before this returns.

        Close the iterator (or leave the loop) to cancel: the engine is free again after the step that is running.
        """
        return self._run(self._request(prompt, messages, token_ids, settings, keywords), None)

    async def agenerate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[SettingsKeywords],
    ) -> Completion:
        """`generate` for asyncio: computed in a thread, so that the event loop stays free. Cancelling the task frees
        the engine after the step that is running."""
        request = self._request(prompt, messages, token_ids, settings, keywords)
        return _completion(request, [chunk async for chunk in self._run_in_worker(request)])

    def astream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[SettingsKeywords],
    ) -> ChunkStream:
        """`stream` for asyncio: `async for chunk in engine.astream(...)`. Cancelling the task, leaving the loop and
        `aclose` free the engine after the step that is running. Arguments are checked before this returns."""
        return self._run_in_worker(self._request(prompt, messages, token_ids, settings, keywords))

    def encode(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """The token ids that `generate` would feed for these arguments. Raises: as `generate`."""
        return self._prompts.encode(prompt, messages, token_ids)

    @property
    def takes_messages(self) -> bool:
        """Whether the bundle has a chat template, without which there are prompts only."""
        return self._prompts.template is not None

    def close(self) -> None:
        """Free the model and the response cache's file. Waits for a request that runs in another thread. Calling it
        again does nothing."""
        self._turns.close()
        if self._prefixes is not None:
            self._prefixes.close()
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
        base: GenerationSettings | None,
        keywords: Mapping[str, Any],
    ) -> Request:
        started = time.perf_counter()
        if self._turns.closed:
            raise EngineClosedError("the engine is closed: load the bundle again")
        settings = GenerationSettings.of(base, keywords)
        model = self.bundle.manifest.model
        check_token_ids(settings, model.vocab_size)
        if settings.keep >= model.context_length:
            raise SettingsError(f"keep must be less than the context of {model.context_length:,} tokens")
        ids = self._prompts.encode(prompt, messages, token_ids)
        self._prompts.check_length(ids)
        return Request(ids, settings, started, self._grammars.compile(settings))

    def _run(self, request: Request, caller: Caller | None) -> Generator[Chunk, None, None]:
        """The chunks from the response cache, or computed. caller: None for the thread that iterates."""
        settings = request.settings
        if self._responses is None or not settings.deterministic or settings.logprobs is not None:
            yield from self._compute(request, caller)
            return
        # A caller that holds the turn must not wait for another's computation, which may be waiting for the turn.
        patience = 0.0 if self._turns.waits_for_itself(caller or Caller()) else request.seconds_left()
        with self._responses.look_up(self._response_key(request), timeout_s=patience) as found:
            known = found.answer
            if known is None:
                chunks: list[Chunk] = []
                for chunk in self._compute(request, caller):
                    chunks.append(chunk)
                    if chunk.finish_reason is not None and chunk.finish_reason != "deadline":
                        parts = tuple((chunk.text, chunk.token_ids) for chunk in chunks)
                        found.keep(CachedAnswer(parts, chunk.finish_reason))
                    yield chunk
        if known is not None:
            yield from _replay(request, known)

    def _response_key(self, request: Request) -> str:
        """Everything that can change the answer: what the manifest says beside the files' digest, too."""
        model = self.bundle.manifest.model
        settings = {
            **request.settings.cache_key(),
            "end_ids": sorted(self.bundle.manifest.tokens.eos),
            "context_length": model.context_length,
            "numerics": self._numerics,
        }
        return response_key(self._digest, request.token_ids, settings)

    def _compute(self, request: Request, caller: Caller | None) -> Generator[Chunk, None, None]:
        """Run the model while holding the turn, from the first `next` to the end or the closing of the iterator."""
        if not self._turns.take(caller or Caller(), request.seconds_left()):
            yield unanswered(request)
            return
        try:
            if request.interrupted():
                yield unanswered(request)
            else:
                with self._sequencer.keeping():
                    yield from Answer(request, self.bundle.manifest, self.tokenizer).chunks(self._sequencer)
        finally:
            self._turns.release()

    def _run_in_worker(self, request: Request) -> ChunkStream:
        from .asynchronous import ChunkStream  # asyncio costs a start-up 30 ms

        return ChunkStream(lambda caller: self._run(request, caller), request.cancelled)


def _completion(request: Request, chunks: Sequence[Chunk]) -> Completion:
    last = chunks[-1]
    assert last.finish_reason is not None and last.stats is not None, "the last chunk of a stream carries both"
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    logprobs = tuple(entry for chunk in chunks for entry in chunk.logprobs)
    asked = request.settings.logprobs is not None
    return Completion(
        "".join(chunk.text for chunk in chunks), ids, last.finish_reason, last.stats, logprobs if asked else None
    )


def _replay(request: Request, answer: CachedAnswer) -> Iterator[Chunk]:
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
