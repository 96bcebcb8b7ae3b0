"""Keep special tokens that somebody writes into a message as plain text, so that roles cannot be forged.

As in transformers with `sanitize_control_tokens=True`: caller's text that looks like a control token is put between two
marks before the template runs, and text between marks in the prompt is encoded without special tokens. Control tokens
are the tokenizer's special tokens, and the other added tokens that the template writes.

Three attacks are handled here and not there: a token split over two parts of one content, a token in an object's key,
and a tokenizer that searches normalized text, where other characters turn into the token's.
An assistant's message may hold added tokens that are not special, such as <think>: the model wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import PromptError
from .options import ChatOptions
from .tokenizer import AddedToken, Tokenizer

# The marks: two letters of Linear B that the request does not contain. They have no upper or lower case and are not
# blanks. Python's repr, which templates print of objects, does not escape them, as it would private characters.
_LETTERS = [letter for code in range(0x10000, 0x10020) if (letter := chr(code)).isprintable()]
# The same letters as JSON escapes them in ASCII.
_ESCAPED = re.compile(r"\\ud800\\udc[01][0-9a-f]")
# A piece behind a mark is encoded behind this text, so that the tokenizer adds no blank for a text's first word.
_NEWLINE = "\n"

Spans = Collection[tuple[int, int]]


@dataclass
class Marks:
    """The marks of one request, and the texts between them."""

    start: str
    end: str
    texts: set[str] = field(default_factory=set)

    def put(self, text: str, spans: Spans) -> str:
        """A text with marks around its spans."""
        pieces, done = [], 0
        for begin, end in spans:
            pieces += [text[done:begin], self.start, text[begin:end], self.end]
            self.texts.add(text[begin:end])
            done = end
        return "".join([*pieces, text[done:]])


class _Kind:
    """A set of control tokens, and a search for texts that look like them."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[AddedToken]) -> None:
        self._tokenizer = tokenizer
        # The longest token first, as tokenizers do.
        texts = sorted((token.text for token in tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._normalized = {token.id for token in tokens if token.normalized}

    def spans(self, text: str) -> Spans:
        """The matches in a text, in order, without overlap."""
        spans = [found.span() for found in self._pattern.finditer(text)]
        return _merged([*spans, *self._tokenizer.spans_of(text, self._normalized)]) if self._normalized else spans


class ControlTokens:
    """The control tokens of a tokenizer and a template. Immutable, safe between threads."""

    def __init__(self, tokenizer: Tokenizer, template_texts: Sequence[str], named: Collection[str] | None) -> None:
        """template_texts: the texts that the template writes; named: the control tokens that "chat_control_tokens" in
        tokenizer_config.json lists, which replace those found in template_texts."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens()
        special = [token for token in added if token.special]
        written = [
            token
            for token in added
            if not token.special and (_is_written(token.text, template_texts) if named is None else token.text in named)
        ]
        self._all, self._special = _Kind(tokenizer, [*special, *written]), _Kind(tokenizer, special)

    def mark(
        self, messages: Sequence[dict[str, Any]], options: ChatOptions
    ) -> tuple[Sequence[dict[str, Any]], ChatOptions, Marks | None]:
        """Messages and options with marks; unchanged if nothing looks like a control token."""
        given = [list(messages), options.tools, options.documents, options.template_variables]
        texts = list(_texts(given))
        joined = [text for message in messages if (text := _joined(message))]
        if not any(self._all.spans(text) for text in (*texts, *joined)):
            return messages, options, None
        marks = Marks(*_unused(texts))
        marked = replace(
            options,
            tools=_marked(options.tools, self._all, marks),
            documents=_marked(options.documents, self._all, marks),
            template_variables=_marked(options.template_variables, self._all, marks),
        )
        return [self._marked_message(message, marks) for message in messages], marked, marks

    def encode(self, prompt: str, marks: Marks) -> list[int]:
        """Token ids of a prompt with marks. Raises: PromptError for a text that the tokenizer cannot write plainly."""
        between = "|".join(map(re.escape, sorted(marks.texts, key=len, reverse=True)))
        # A single mark, whose partner the template cut off, is dropped; the texts on its two sides are encoded
        # separately.
        pieces = re.split(f"{marks.start}({between}){marks.end}|[{marks.start}{marks.end}]", prompt)
        ids = self._tokenizer.encode(pieces[0], special=False)
        for index, piece in enumerate(pieces[1:], 1):
            if piece:
                ids += self._plainly(piece) if index % 2 else self._piece(piece, self._encode)
        return ids

    def _plainly(self, piece: str) -> list[int]:
        ids = self._piece(piece, self._tokenizer.encode_without_added)
        if self._tokenizer.id_of(piece) in ids:
            raise PromptError(
                f"a message holds {piece!r}, which this tokenizer cannot write as plain text: leave it out, or let it "
                "be the token with tokens_in_messages=True"
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)

    def _piece(self, piece: str, encode: Callable[[str], list[int]]) -> list[int]:
        newline, ids = self._encode(_NEWLINE), encode(_NEWLINE + piece)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)

    def _marked_message(self, message: Mapping[str, Any], marks: Marks) -> dict[str, Any]:
        kind = self._special if message.get("role") == "assistant" else self._all
        marked: dict[str, Any] = _marked(message, kind, marks)
        parts = marked.get("content")
        if isinstance(parts, list | tuple):
            _mark_joints(message["content"], parts, kind.spans(_joined(message)), marks)
        return marked


def _marked(value: Any, kind: _Kind, marks: Marks) -> Any:
    if isinstance(value, str):
        return marks.put(value, kind.spans(value))
    if isinstance(value, Mapping):
        return {_marked(key, kind, marks): _marked(item, kind, marks) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, kind, marks) for item in value]
    return value


def with_marks(escaped: str) -> str:
    """A text in JSON's ASCII form with the marks unescaped, since an escaped mark has no effect."""
    return _ESCAPED.sub(lambda found: str(json.loads(f'"{found[0]}"')), escaped)


def _is_written(token: str, texts: Sequence[str]) -> bool:
    return not token.isspace() and any(token in text for text in texts)


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _unused(texts: Sequence[str]) -> tuple[str, str]:
    free = [letter for letter in _LETTERS if not any(letter in text for text in texts)]
    if len(free) < 2:
        raise PromptError("the messages hold a special token, and every letter of Linear B: leave one out")
    return free[0], free[1]


def _text_of(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else None


def _joined(message: Mapping[str, Any]) -> str:
    parts = message.get("content")
    return "".join(_text_of(part) or "" for part in parts) if isinstance(parts, list | tuple) else ""


def _mark_joints(parts: Sequence[Any], marked: Sequence[Any], spans: Spans, marks: Marks) -> None:
    """Put a mark behind each part in which a control token begins that ends in a later part."""
    position = 0
    for part, target in zip(parts, marked, strict=True):
        text = _text_of(part)
        if text is not None:
            position += len(text)
            if any(begin < position < end for begin, end in spans):
                target["text"] += marks.end
