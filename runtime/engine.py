"""The engine: text in, text out. Joins prompts, response cache and decoding over one loaded bundle.

Three tiers: `Decoder` (ids to ids), `Engine.stream` (chunks of text), `Engine.generate` (a whole completion); the
latter two also for asyncio.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .bundle import folder as bundle_files
from .bundle.cuts import accepts_roundings, may_cut, what_is_off
from .bundle.folder import Bundle
from .caches.prefixes.cache import PrefixCache, PrefixCacheSettings, open_prefix_cache, prefix_settings
from .caches.responses.cache import ResponseCache, ResponseCacheSettings, open_response_cache
from .decoding.decoder import Decoder
from .errors import EngineClosedError
from .host.memory import give_back
from .results import Chunk, Completion
from .serving.answer import Request
from .serving.batches import MAX_ROWS, Prompt, completions, stream_batch
from .serving.requests import RequestMaker
from .serving.scheduler import Scheduler
from .serving.streams import Stream
from .sessions import numerics
from .sessions.loading import find_folder
from .sessions.protocol import Session
from .sessions.rows import rows_are_exact
from .settings import GenerationSettings
from .text.options import ChatOptions
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .serving.asynchronous import ChunkStream
    from .serving.requests import RequestKeywords
    from .text.messages import Message
    from .text.options import ChatKeywords


_logger = logging.getLogger(__name__)
# A program that embeds edgelm finds its users' conversations on the disk only if it asks.
IN_MEMORY = ResponseCacheSettings(disk=False)
PREFIXES_IN_MEMORY = PrefixCacheSettings(disk=False)


def load(
    path: str | Path,
    *,
    graph: str | None = None,
    threads: int | None = None,
    response_cache: bool | ResponseCacheSettings = IN_MEMORY,
    prefix_cache: bool | PrefixCacheSettings = PREFIXES_IN_MEMORY,
    prepare: bool | None = None,
    provider: str | None = None,
    exact: bool = True,
) -> Engine:
    """Open a bundle, or a folder of optimum's or transformers.js's, and make it ready to generate.

    graph: which ONNX file, relative to the folder, where a folder of another exporter holds several.
    threads: cores to compute with (None: physical cores that this process may use). provider: "cpu" or "cuda" (None:
    what the bundle was made for; one for a GPU runs on the CPU only when it is told to).
    exact: False allows batches, kept prefixes and draft tokens also where they change roundings (`bundle.cuts`), as
    with the schemes of float32 matrices.

    Nothing is written to the disk unless one of these asks for it:
    response_cache: keep finished answers and give them again for the same request: in memory (16 MiB) by default, False
    not at all, True also in a database below EDGELM_HOME (256 MiB, readable by this user alone, shared by the
    processes), or as settings say. prefix_cache: keep what was computed for prompts, for later ones that start alike:
    in memory (64 MiB) by default, False not at all, True also in files below EDGELM_HOME (512 MiB, as above), or as
    settings say. `edgelm cache budget` changes what True means for both.
    prepare: True keeps the weights as onnxruntime wants them on this machine below EDGELM_HOME (twice the bundle's
    size, in all at most 8 GiB), which later loads map, unless they say False: faster, in less memory of their own,
    shared by the processes.
    Every file that is read is checked, the weights while onnxruntime loads them: a bundle's against the manifest's
    digests, a prepared form against its own checksums.
    Raises: BundleError and below for the folder, SettingsError for threads and settings, SessionError from onnxruntime,
    MemoryShortageError, MissingExtraError for a Redis server without redis-py. A cache that cannot be used
    gives a warning, not an error.
    """
    responses, settings = open_response_cache(response_cache), prefix_settings(prefix_cache)
    bundle, load_model = find_folder(path, threads, graph, prepare, provider)
    bundle = dataclasses.replace(bundle, exact=exact)
    off = what_is_off(bundle.manifest) if bundle.has_manifest and not accepts_roundings(bundle) else None
    if off is not None:
        _logger.warning("%s: %s", bundle.path, off)
    # First, so that the graph takes the room between what parsing the tokenizer leaves: 5 MB less.
    tokenizer = Tokenizer(bundle.path / bundle_files.TOKENIZER_NAME)
    give_back()
    session = load_model()
    give_back()
    return Engine(bundle, session, tokenizer, responses, open_prefix_cache(settings, bundle, session))


class Engine:
    """One loaded model and one conversation's cache. Use it in a `with` block, or call `close()`.

    Threads and tasks may share an engine: with the scheme `int8-rowwise` their requests are rows of one running batch,
    otherwise they are answered one after the other, short prompts first. A prompt that starts as an earlier one did (a
    conversation that goes on, a common preamble) runs only what is new; with that scheme every answer is bit for bit
    the one of a fresh engine that has nothing else to do.
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
        self._session = session
        self._prefixes = prefixes
        self._responses = responses
        self._requests = RequestMaker(bundle, tokenizer, numerics.of_session(session))
        together = rows_are_exact(bundle.manifest, session.capabilities) or accepts_roundings(bundle)
        decoder = Decoder(
            session,
            bundle.manifest.model.context_length,
            prefixes=prefixes,
            max_rows=MAX_ROWS if together else 1,
            bounded_pieces=may_cut(bundle),
        )
        self._scheduler = Scheduler(decoder, bundle.manifest, tokenizer, responses, self._requests.key)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion:
        """The continuation of a prompt, as a whole. Exactly one of prompt, messages and token_ids is given.

        prompt: plain text; messages: [{"role": ..., "content": ...}, ...] for the model's chat template; token_ids:
        used as they are. Keywords are those of `GenerationSettings` (max_tokens, temperature, seed, stop, ...), which
        go before `settings`, and for messages those of `ChatOptions` (tools, template_variables,
        continue_final_message, ...). Without any the answer is greedy, whatever the bundle's generation_config.json
        says.
        Raises: PromptError, ContextLengthError, SettingsError, TemplateError, EngineError, SessionError,
        MissingExtraError.
        """
        request = self._new().one(prompt, messages, token_ids, settings, keywords)
        return completions([request], stream_batch(self._scheduler, [request], 1))[0]

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Stream:
        """The same as `generate`, in chunks as they come. Arguments are checked before this returns.

        Close the stream (or leave the loop) to cancel, from any thread: its row is free again after the step that is
        running.
        """
        return Stream(self._scheduler, self._new().one(prompt, messages, token_ids, settings, keywords))

    async def agenerate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Completion:
        """`generate` for asyncio: the event loop stays free, for tokenizing too. Cancelling the task frees the answer's
        row after the step that is running."""
        from .serving.asynchronous import answer  # asyncio costs a start-up 30 ms

        return await answer(self._scheduler, self._maker(prompt, messages, token_ids, settings, keywords))

    def astream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> ChunkStream:
        """`stream` for asyncio: `async for chunk in engine.astream(...)`. Cancelling the task, leaving the loop and
        `aclose` free the answer's row after the step that is running. Settings are checked before this returns, the
        prompt where the first chunk is awaited, since tokenizing may take long."""
        from .serving.asynchronous import ChunkStream

        return ChunkStream(self._scheduler, self._maker(prompt, messages, token_ids, settings, keywords))

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
        max_rows: int = MAX_ROWS,
        **keywords: Unpack[RequestKeywords],
    ) -> list[Completion]:
        """What `generate` gives for each of the prompts, in their order, computed several at once.

        prompts: texts, lists of messages or lists of token ids, of any lengths. settings: for all, or one for each.
        max_rows: so many are computed at once, the others wait for a place; the KV cache then takes the memory of so
        many texts as long as the longest one. Every answer is the one that `generate` gives. Where a batch could not
        hold that (`sessions.rows.rows_are_exact`), and for a session without `rows`, prompts are answered one by one.
        Raises: as `generate`, before anything is computed, naming the prompt by its index; an error of a step ends all.
        """
        requests = self._new().batch(prompts, settings, max_rows, keywords)
        return completions(requests, stream_batch(self._scheduler, requests, max_rows))

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
        max_rows: int = MAX_ROWS,
        **keywords: Unpack[RequestKeywords],
    ) -> Generator[tuple[int, Chunk], None, None]:
        """The same as `generate_batch`, in chunks as they come, each with the index of its prompt.

        Close the iterator (or leave the loop) to cancel: the engine is free again after the step that is running.
        """
        return stream_batch(self._scheduler, self._new().batch(prompts, settings, max_rows, keywords), max_rows)

    async def agenerate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
        max_rows: int = MAX_ROWS,
        **keywords: Unpack[RequestKeywords],
    ) -> list[Completion]:
        """`generate_batch` for asyncio, as `agenerate`."""
        from .serving.asynchronous import answer_batch

        new = self._new()
        return await answer_batch(self._scheduler, lambda: new.batch(prompts, settings, max_rows, keywords), max_rows)

    def encode(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[ChatKeywords],
    ) -> list[int]:
        """The token ids that `generate` would feed for these arguments. options: those of `ChatOptions`. Raises: as
        `generate`."""
        return self._requests.encode(prompt, messages, token_ids, options)

    @property
    def takes_messages(self) -> bool:
        """Whether the bundle has a chat template, without which there are prompts only."""
        return self._requests.prompts.templates is not None

    @property
    def template_variables(self) -> frozenset[str]:
        """The names that the chat template reads, such as "tools" or "enable_thinking"; none without a template."""
        return self._requests.prompts.template_variables

    @property
    def requests(self) -> tuple[int, int]:
        """Requests that are computed now, and those that wait for a row."""
        return self._scheduler.counts()

    def close(self) -> None:
        """Free the model and the response cache's file. Whole answers that other threads compute are finished first;
        streams and requests that wait end with EngineClosedError. Calling it again does nothing."""
        self._scheduler.close()
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

    def _new(self) -> RequestMaker:
        """Where requests are made, while the engine is open. Raises: EngineClosedError."""
        if self._scheduler.closed:
            raise EngineClosedError("the engine is closed: load the bundle again")
        return self._requests

    def _maker(
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
        settings: GenerationSettings | None,
        keywords: Mapping[str, Any],
    ) -> Callable[[], Request]:
        """What makes the request, whose time runs from now. Raises: SettingsError, EngineClosedError."""
        new, started = self._new(), time.perf_counter()
        GenerationSettings.of(settings, ChatOptions.split(keywords)[1])
        return lambda: dataclasses.replace(new.one(prompt, messages, token_ids, settings, keywords), started=started)
