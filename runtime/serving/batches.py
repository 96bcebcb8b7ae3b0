"""Several requests of one caller: check the arguments of a batch, and give its answers in chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from ..errors import InputError, PromptError, SettingsError, TemplateError, shown
from ..results import Chunk, Completion
from ..settings import GenerationSettings
from .answer import Request, completion
from .listener import Listener
from .scheduler import Scheduler

if TYPE_CHECKING:
    from ..text.messages import Message

# onnxruntime's INT8 product takes six rows at a time on x86, so a step of 12 costs little more than one of 8
# (docs/benchmarks.md). Beyond, rows gain less, and each takes the memory of a text.
MAX_ROWS = 12
Prompt: TypeAlias = Union[str, "Sequence[Message]", Sequence[int]]
IndexedChunks = Generator[tuple[int, Chunk], None, None]


def check_batch(prompts: Sequence[Prompt], max_rows: int) -> None:
    """Raises: PromptError for a text in place of a list of prompts, SettingsError."""
    if isinstance(prompts, str | bytes | Mapping) or not _has_length(prompts):
        raise PromptError(f"prompts must be a list, found {shown(prompts)}: put a single one into a list")
    if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
        raise SettingsError(f"max_rows must be a whole number, 1 or more, found {shown(max_rows)}")


def settings_of_each(
    count: int, given: GenerationSettings | Sequence[GenerationSettings] | None, keywords: Mapping[str, Any]
) -> list[GenerationSettings]:
    """The settings of each prompt, from those for all or those for each. Raises: SettingsError."""
    if given is None or isinstance(given, GenerationSettings) or not isinstance(given, Sequence):
        return [GenerationSettings.of(given, keywords)] * count
    if len(given) != count:
        raise SettingsError(f"there are {len(given)} settings for {count} prompts: give one for all, or one for each")
    each = []
    for index, base in enumerate(given):
        with naming(index):
            each.append(GenerationSettings.of(base, keywords))
    return each


def kind_of(prompt: Prompt) -> tuple[str | None, Any, Any]:
    """A prompt as `generate` takes it: prompt, messages, token_ids, of which one is not None."""
    if isinstance(prompt, str):
        return prompt, None, None
    if not _has_length(prompt) or isinstance(prompt, set | frozenset):
        raise PromptError(f"a prompt is a text, a list of messages or a list of token ids, found {shown(prompt)}")
    if isinstance(prompt, Mapping):  # one message in the place of a list of them, which is refused by name
        return None, prompt, None
    messages = isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    return (None, prompt, None) if messages else (None, None, prompt)


def _has_length(value: object) -> bool:
    """Whether `len` works: a numpy array without axes has `__len__` but no length."""
    try:
        len(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Name the prompt's index in an error about the input."""
    try:
        yield
    except (InputError, TemplateError) as error:
        raise type(error)(f"prompt {index} of the batch: {error}") from error


def stream_batch(scheduler: Scheduler, requests: Sequence[Request], max_rows: int) -> IndexedChunks:
    """The chunks of all requests as they come, each with its request's index; at most `max_rows` are asked for at once.

    Raises: as `Scheduler`; an error ends all.
    """
    waiting = deque(enumerate(requests))
    asked: dict[Listener, int] = {}
    try:
        while waiting or asked:
            while waiting and len(asked) < max_rows:
                index, request = waiting.popleft()
                asked[scheduler.submit(request, whole=True)] = index
            found = scheduler.next(list(asked))
            assert found is not None, "the last chunk of each is handed on before it counts as ended"
            listener, chunk = found
            yield asked[listener], chunk
            if chunk.finish_reason is not None:
                del asked[listener]
    finally:
        scheduler.cancel(list(asked))


def completions(requests: Sequence[Request], chunks: Iterable[tuple[int, Chunk]]) -> list[Completion]:
    """The whole answers, in the order of their requests."""
    parts: list[list[Chunk]] = [[] for _ in requests]
    for index, chunk in chunks:
        parts[index].append(chunk)
    return [completion(request.settings, some) for request, some in zip(requests, parts, strict=True)]
