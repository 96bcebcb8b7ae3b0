"""Text to token ids and back, by Hugging Face `tokenizers`, the very code that transformers' fast tokenizers run."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleCorruptError, MemoryShortageError, PromptError

if TYPE_CHECKING:
    import tokenizers

# What an incomplete or invalid UTF-8 sequence decodes to.
REPLACEMENT = "\ufffd"
# How tokenizers with byte fallback write a token that is one byte.
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

# How SentencePiece writes the blank in front of a word.
_WORD = "\u2581"


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before it is cut into others. special: not part of decoded text;
    normalized: looked for in the normalized text, not in the text as it is."""

    id: int
    text: str
    special: bool
    normalized: bool


class Tokenizer:
    """A tokenizer.json. Immutable, safe between threads."""

    def __init__(self, path: Path) -> None:
        """Load a file. Cost: some 50 ms for 50,000 entries. Raises: BundleCorruptError."""
        import tokenizers

        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception, nothing narrower
            raise BundleCorruptError(f"{path} is not a tokenizer ({error}): export the bundle again") from error
        # A file may ask to cut or fill every text to one length, which suits batches of training texts only.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's vocabulary may be larger (padded)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token(self, token_id: int) -> str:
        """How the vocabulary writes a token; empty for an id that it does not have."""
        return self._tokenizer.id_to_token(token_id) or ""

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None where it has no such token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is exactly this text, or None."""
        return self._special.get(text)

    def special_part(self, text: str) -> str | None:
        """A special token that is a part of a text, the longest of those at the first place; None without one."""
        found = [(text.find(token), -len(token), token) for token in self._special if token in text]
        return min(found)[2] if found else None

    @cached_property
    def _special(self) -> dict[str, int]:
        return {token.text: token.id for token in self.added_tokens() if token.special}

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that goes on, in UTF-8; empty, if it is special or does not exist."""
        data = self._bytes(token_id)
        # Decoders strip the blank in front of a text's first word, which this is not.
        starts_word = self.token(token_id).startswith(_WORD)
        return b" " + data if starts_word and not data.startswith((b" ", _WORD.encode())) else data

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: add what the tokenizer puts around a text, such as a first token.

        Raises: PromptError, if the text holds half a surrogate pair, which no encoding can represent;
        MemoryShortageError.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the prompt is not valid Unicode text ({error}): remove lone surrogates") from error
        except MemoryError as error:
            raise MemoryShortageError(
                f"a prompt of {len(text):,} characters takes more memory than there is: close other programs, or cut it"
            ) from error

    def least_tokens(self, text: str) -> int:
        """So many tokens a text has at least, at the cost of reading it once; encoding long texts without blanks takes
        seconds. 0 for tokenizers that may leave something out.

        Blanks are not counted, since tokens may strip them.
        """
        if not self._longest:
            return 0
        return -(-len(_without_blanks(text).encode("utf-8", "surrogatepass")) // self._longest)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token, blanks not counted, where tokens hold every byte of a text; 0 elsewhere."""
        data = json.loads(self._tokenizer.to_str())
        kinds = {step["type"] for step in _steps(data["normalizer"])}
        byte_level = "ByteLevel" in {step["type"] for step in _steps(data["pre_tokenizer"])}
        if data["model"].get("byte_fallback"):
            whole = kinds <= {"Prepend", "Replace"} and all(map(_keeps_text, _steps(data["normalizer"])))
        else:
            whole = byte_level and kinds <= {"NFC"}
        if not whole or data["model"]["type"] != "BPE":
            return 0
        texts = map(_without_blanks, self._tokenizer.get_vocab())
        # Byte-level tokenizers write a character for each byte.
        lengths = (len(text) if byte_level else len(text.encode("utf-8", "surrogatepass")) for text in texts)
        # Composing makes a third of the bytes at most, as in Korean.
        return max(lengths, default=0) * (3 if kinds == {"NFC"} else 1)

    def encode_without_added(self, text: str) -> list[int]:
        """Token ids of a text in which no added token is looked for, special or not."""
        parts = self._tokenizer
        if parts.normalizer is not None:
            text = parts.normalizer.normalize_str(text)
        words = [text]
        if parts.pre_tokenizer is not None:
            words = [word for word, _ in parts.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in parts.model.tokenize(word)]

    def added_tokens(self) -> list[AddedToken]:
        """All added tokens, special or not."""
        normalizes = self._tokenizer.normalizer is not None
        return [
            AddedToken(token_id, token.content, token.special, normalizes and token.normalized)
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        ]

    def spans_of(self, text: str, token_ids: Collection[int]) -> list[tuple[int, int]]:
        """Where these tokens are found in a text, as positions of characters. Costs an encoding."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return [span for token, span in zip(found.ids, found.offsets, strict=True) if token in token_ids]

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids; U+FFFD stands for bytes that are not UTF-8. special: with the text of special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    def decode_whole(self, token_ids: Sequence[int], special: bool = False) -> tuple[str, bool]:
        """Text of token ids without an unfinished character at its end, and whether there is one.

        The text alone cannot tell: U+FFFD may be the beginning of a character, a character that somebody wrote, or
        bytes that no further byte makes a character. Only the first of these is unfinished.
        """
        text = self.decode(token_ids, special)
        if not text.endswith(REPLACEMENT):
            return text, False
        missing = len(_unfinished(self._last_bytes(token_ids)))
        if not missing:
            return text, False
        if not self._is_byte(token_ids[-1]):
            return text[:-1], True  # byte-level decoders put one U+FFFD for the unfinished character as a whole
        # With byte fallback each byte is a token, and one byte too few spoils the whole run.
        end = len(token_ids)
        while missing:
            end -= 1
            missing -= self._is_byte(token_ids[end])
        return self.decode(token_ids[:end], special), True

    def starts_inside_character(self, token_ids: Sequence[int]) -> bool:
        """Whether the first byte of the tokens belongs to a character that began before them."""
        first = next((byte for token_id in token_ids for byte in self._bytes(token_id)), 0)
        return 0x80 <= first < 0xC0

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The last three bytes or more of the text: an unfinished character has no more."""
        found = b""
        for token_id in reversed(token_ids):
            found = self._bytes(token_id) + found
            if len(found) > 2:
                break
        return found

    def _bytes(self, token_id: int) -> bytes:
        """What a token adds to a text: nothing, if it is special or does not exist."""
        text = self.decode([token_id])
        if REPLACEMENT not in text:
            return text.encode()
        token = self._tokenizer.id_to_token(token_id) or ""
        if byte := _BYTE.fullmatch(token):
            return bytes.fromhex(byte.group(1))
        table = _byte_level_alphabet()
        return bytes(table[character] for character in token) if set(token) <= table.keys() else token.encode()

    def _is_byte(self, token_id: int) -> bool:
        return bool(_BYTE.fullmatch(self._tokenizer.id_to_token(token_id) or ""))


def _without_blanks(text: str) -> str:
    """A text, or a token, without blanks, one of which may be SentencePiece's sign for them."""
    return "".join(text.replace("\u2581", " ").split())


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of its steps."""
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [part] if inner is None else [step for item in inner for step in _steps(item)]


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a step of a normalizer makes no text shorter: one that writes blanks as SentencePiece does."""
    return step["type"] == "Prepend" or (step.get("pattern") == {"String": " "} and bool(step.get("content")))


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end that more bytes can make a character of."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte: itself if it is printable, else the next free one
    from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class Detokenizer:
    """Text of a growing sequence of tokens, in chunks that hold whole characters only.

    The chunks and `finish()`, joined, are what the tokens add to the decoded text of prompt and tokens together,
    except an unfinished character at the very end, which is never shown. A token costs the decoding of the tokens
    since the last chunk but one, whatever the length of the whole. Not safe between threads.

    Decoders look at neighbours: many strip a blank in front of a text's first token, and those with byte fallback
    turn a run of bytes into characters only where the whole run is valid. So the window that is decoded always starts
    where a chunk ended, which is between two characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], special: bool = False) -> None:
        """prompt_ids: what stands before the new tokens, so that the first of them is not taken for a text's first.
        special: special tokens are part of the text."""
        self._tokenizer = tokenizer
        self._special = special
        tail = self._clean_tail(prompt_ids)
        self._shown, _ = tokenizer.decode_whole(tail, special)
        # What the prompt holds of an unfinished character waits like new tokens, so that the window stays clean.
        end = next(end for end in range(len(tail), -1, -1) if not tokenizer.decode_whole(tail[:end], special)[1])
        self._window, self._pending = tail[:end], tail[end:]

    def add(self, token_id: int) -> str:
        """The text that this token completes: empty while a character is unfinished."""
        self._pending.append(token_id)
        text, unfinished = self._tokenizer.decode_whole(self._window + self._pending, self._special)
        if unfinished or len(text) <= len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._window, self._pending = self._pending, []
        self._shown = self._tokenizer.decode(self._window, self._special)
        return new

    def finish(self) -> str:
        """The text that was held back with an unfinished character, without that character."""
        text, _ = self._tokenizer.decode_whole(self._window + self._pending, self._special)
        return text[len(self._shown) :]

    def _clean_tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from a place that is not inside a character."""
        start = max(0, len(prompt_ids) - _PROMPT_TAIL)
        while start > 0 and self._tokenizer.starts_inside_character(prompt_ids[start:]):
            start -= 1
        return list(prompt_ids[start:])


_PROMPT_TAIL = 8
