"""The engine: text in, text out. Joins prompts, caches and decoding over one loaded bundle.

Three tiers: `Decoder` (ids to ids), `Engine.stream` (chunks of text), `Engine.generate` (a whole completion); the
latter two also for asyncio.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .bundle.cuts import accepts_roundings, may_cut
from .bundle.folder import Bundle
from .caches.prefixes.cache import PrefixCache
from .caches.responses.cache import ResponseCache
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
_ONE_TOKEN = GenerationSettings(max_tokens=1, logprobs=0)


class Engine:
    """One loaded model and one conversation's cache. Use it in a `with` block, or call `close()`.

    Threads and tasks may share an engine. With a row-wise scheme, and an INT8 cache or compiled kernels, their requests
    are rows of one running batch; otherwise they are answered one after the other, short prompts first. A prompt that
    begins like an earlier one (a conversation that goes on, a common preamble) runs only its new part. With a row-wise
    scheme every answer is bit for bit the one that a fresh, idle engine gives.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        tokenizer: Tokenizer,
        responses: ResponseCache | None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """For callers who bring their own session; all others call `load`."""
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
        """The whole continuation of a prompt. Give exactly one of prompt, messages and token_ids.

        prompt: plain text; messages: [{"role": ..., "content": ...}, ...] for the model's chat template; token_ids:
        used as they are. Keywords: those of `GenerationSettings` (max_tokens, temperature, seed, stop, ...), which
        override `settings`, and with messages those of `ChatOptions` (tools, template_variables,
        continue_final_message, ...). By default the answer is greedy, whatever the bundle's generation_config.json
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
        """As `generate`, in chunks as they come. Arguments are checked before this returns.

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
        `aclose` free the answer's row after the step that is running. Settings are checked before this returns; the
        prompt is checked when the first chunk is awaited, since tokenizing may take long."""
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
        """`generate` for several prompts at once. The completions have the order of the prompts.

        prompts: texts, lists of messages or lists of token ids, of any lengths. settings: for all, or one for each.
        max_rows: so many are computed at once, the others wait; the KV cache takes the memory of so many texts as long
        as the longest. Every answer is the one that `generate` gives. If a batch could not promise that
        (`sessions.rows.rows_are_exact`), or the session has no `rows`, prompts are answered one by one. Raises: as
        `generate`, before anything is computed, naming the prompt by its index; an error in a step ends all.
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
        """As `generate_batch`, in chunks as they come, each with the index of its prompt.

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
        """The token ids that `generate` would feed for these arguments; their number is the prompt's length in tokens.
        options: those of `ChatOptions`. Nothing is computed. Raises: as `generate`."""
        return self._requests.encode(prompt, messages, token_ids, options)

    def render(self, messages: Sequence[Message], **options: Unpack[ChatKeywords]) -> str:
        """The text that the chat template makes of messages. options: those of `ChatOptions`. Nothing is computed.
        Raises: PromptError, TemplateError, SettingsError."""
        return self._requests.render(messages, options)

    def warm_up(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[ChatKeywords],
    ) -> None:
        """Run the model once, so that the first answer comes as soon as later ones.

        Without arguments one token is fed, which reads all weights. With a prompt, such as the messages that begin
        every conversation, that prompt is read and kept in the prefix cache. Cost: that of reading the prompt. Raises:
        as `generate`.
        """
        if prompt is None and messages is None and token_ids is None:
            token_ids = [0]
        # An answer with log-probabilities is never kept, nor taken from the response cache.
        self.generate(prompt, messages=messages, token_ids=token_ids, settings=_ONE_TOKEN, **options)

    @property
    def context_length(self) -> int:
        """The most tokens that a prompt and its answer have together."""
        return self.bundle.manifest.model.context_length

    @property
    def takes_messages(self) -> bool:
        """Whether the bundle has a chat template. Without one, `messages` are refused."""
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
        give_back()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._scheduler.closed

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new(self) -> RequestMaker:
        """The maker of requests, while the engine is open. Raises: EngineClosedError."""
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
        """A function that makes the request; its time runs from now. Raises: SettingsError, EngineClosedError."""
        new, started = self._new(), time.perf_counter()
        GenerationSettings.of(settings, ChatOptions.split(keywords)[1])
        return lambda: dataclasses.replace(new.one(prompt, messages, token_ids, settings, keywords), started=started)
