"""Many requests at once: what a batch takes, its answers as chunks of text, and what the response cache knows of them.

The steps themselves are `batch_decode`'s, the graph is `batch_session`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from ..bundle.manifest import Manifest
from ..caches.responses.answers import CachedAnswer
from ..caches.responses.cache import ResponseCache
from ..decoding.batch import Batch, Row, RowPrefixes, RowsSession
from ..errors import InputError, PromptError, SettingsError, TemplateError, shown
from ..results import Chunk, Completion
from ..settings import GenerationSettings
from ..text.tokenizer import Tokenizer
from .answer import Answer, Request, completion, replay

if TYPE_CHECKING:
    from ..text.messages import Message

# onnxruntime's INT8 product takes six rows at a time on x86, so a step of 12 costs little more than one of 8
# (docs/benchmarks.md). Beyond, rows gain less, and each takes the memory of a text.
MAX_ROWS = 12
Prompt: TypeAlias = Union[str, "Sequence[Message]", Sequence[int]]
IndexedChunks = Iterator[tuple[int, Chunk]]


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
    """Not every value with a `__len__` has a length: numpy's arrays without an axis have none."""
    try:
        len(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Say in an error of the input which prompt it is about."""
    try:
        yield
    except (InputError, TemplateError) as error:
        raise type(error)(f"prompt {index} of the batch: {error}") from error


def answer_rows(
    requests: Mapping[int, Request],
    session: RowsSession,
    manifest: Manifest,
    tokenizer: Tokenizer,
    prefixes: RowPrefixes | None = None,
) -> IndexedChunks:
    """Compute all requests. Yields: chunks with their request's key. Raises: SessionError, SettingsError."""
    running: dict[Row, tuple[int, Answer]] = {}

    def rows() -> Iterator[Row]:
        for index, request in requests.items():
            answer = Answer(request, manifest, tokenizer)
            row = answer.row()
            running[row] = index, answer
            yield row

    batch = Batch(session, rows(), manifest.model.context_length, prefixes=prefixes)
    with closing(batch.tokens()) as tokens:
        for row, token in tokens:
            index, answer = running[row]
            if token is None:
                del running[row]
                yield index, answer.finish(row.reused)
            else:
                chunk = answer.add(token)
                row.ended = answer.ended
                if chunk is not None:
                    yield index, chunk


def completions(requests: Sequence[Request], chunks: Sequence[tuple[int, Chunk]]) -> list[Completion]:
    """The whole answers, in the order of their requests."""
    parts: list[list[Chunk]] = [[] for _ in requests]
    for index, chunk in chunks:
        parts[index].append(chunk)
    return [completion(request.settings, some) for request, some in zip(requests, parts, strict=True)]


def known_or_computed(
    requests: Sequence[Request],
    responses: ResponseCache | None,
    key_of: Callable[[Request], str],
    compute: Callable[[Mapping[int, Request]], IndexedChunks],
) -> IndexedChunks:
    """The chunks of all requests, from the response cache, or from `compute`, which is given those that it lacks and
    whose answers it then keeps. Equal requests are computed once."""
    if responses is None:
        yield from compute(dict(enumerate(requests)))
        return
    equal: dict[str | int, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        equal[key_of(request) if request.settings.cacheable else index].append(index)
    unknown: dict[int, str | int] = {}
    for key, indexes in equal.items():
        known = responses.get(key) if isinstance(key, str) else None
        if known is None:
            unknown[indexes[0]] = key
        else:
            yield from _replayed(requests, indexes, known)
    again: list[int] = []
    for index, chunk, answer in _with_answers(compute({index: requests[index] for index in unknown})):
        yield index, chunk
        key = unknown[index]
        if answer is not None and isinstance(key, str):
            responses.put(key, answer)
            yield from _replayed(requests, equal[key][1:], answer)
        elif chunk.finish_reason is not None:
            again += equal[key][1:]
    # Equal requests may have other deadlines, and the first of them may have run out of time.
    yield from compute({index: requests[index] for index in again})


def _replayed(requests: Sequence[Request], indexes: Sequence[int], answer: CachedAnswer) -> IndexedChunks:
    for index in indexes:
        for chunk in replay(requests[index], answer):
            yield index, chunk


def _with_answers(chunks: IndexedChunks) -> Iterator[tuple[int, Chunk, CachedAnswer | None]]:
    """Each chunk, and with the last one of an answer that is complete, the answer."""
    parts: dict[int, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for index, chunk in chunks:
        parts[index].append((chunk.text, chunk.token_ids))
        answer = None
        if chunk.finish_reason is not None and chunk.finish_reason != "deadline":
            answer = CachedAnswer(tuple(parts.pop(index)), chunk.finish_reason)
        yield index, chunk, answer
