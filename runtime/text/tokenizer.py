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

# The character for an incomplete or invalid UTF-8 sequence.
REPLACEMENT = "\ufffd"
# How tokenizers with byte fallback write a token that is one byte.
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

# How SentencePiece writes the blank in front of a word.
_WORD = "\u2581"


@dataclass(frozen=True)
class AddedToken:
    """A token that is searched in a text before the text is split into others. special: not part of decoded text;
    normalized: searched in the normalized text, not in the original."""

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
        # A file may ask to truncate or pad every text to one length, which is only useful in training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's vocabulary may be larger (padded)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token(self, token_id: int) -> str:
        """A token's name in the vocabulary; empty for an unknown id."""
        return self._tokenizer.id_to_token(token_id) or ""

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is exactly this text, or None."""
        return self._special.get(text)

    def special_part(self, text: str) -> str | None:
        """The first special token in a text, the longest if several begin there; None without one."""
        found = [(text.find(token), -len(token), token) for token in self._special if token in text]
        return min(found)[2] if found else None

    @cached_property
    def _special(self) -> dict[str, int]:
        return {token.text: token.id for token in self.added_tokens() if token.special}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds in the middle of a text, in UTF-8; empty if it is special or unknown."""
        data = self._bytes(token_id)
        # Decoders strip the blank of a text's first word; here the token is not the first.
        starts_word = self.token(token_id).startswith(_WORD)
        return b" " + data if starts_word and not data.startswith((b" ", _WORD.encode())) else data

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: add the tokens that the tokenizer puts around a text, such as a first token.

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
        """A lower bound for the number of tokens of a text, at the cost of reading it once: encoding a long text
        without blanks takes seconds. 0 for tokenizers that may drop characters.

        Blanks are not counted, since tokens may strip them.
        """
        if not self._longest:
            return 0
        return -(-len(_without_blanks(text).encode("utf-8", "surrogatepass")) // self._longest)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token without blanks, if tokens preserve every byte of a text; else 0."""
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
        # Unicode composition shortens a text to a third of its bytes at most, as in Korean.
        return max(lengths, default=0) * (3 if kinds == {"NFC"} else 1)

    def encode_without_added(self, text: str) -> list[int]:
        """Token ids of a text without searching for added tokens, special or not."""
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
        """Where these tokens occur in a text, as ranges of characters. Cost: an encoding."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return [span for token, span in zip(found.ids, found.offsets, strict=True) if token in token_ids]

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; U+FFFD stands for bytes that are not UTF-8. special: include special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    def decode_whole(self, token_ids: Sequence[int], special: bool = False) -> tuple[str, bool]:
        """The text of token ids without an unfinished character at the end, and whether there is one.

        The text alone does not show it: U+FFFD may be the beginning of a character, a real U+FFFD, or invalid bytes.
        Only the first is unfinished.
        """
        text = self.decode(token_ids, special)
        if not text.endswith(REPLACEMENT):
            return text, False
        missing = len(_unfinished(self._last_bytes(token_ids)))
        if not missing:
            return text, False
        if not self._is_byte(token_ids[-1]):
            return text[:-1], True  # byte-level decoders write one U+FFFD for the whole unfinished character
        # With byte fallback each byte is a token, and a missing byte invalidates the whole run.
        end = len(token_ids)
        while missing:
            end -= 1
            missing -= self._is_byte(token_ids[end])
        return self.decode(token_ids[:end], special), True

    def starts_inside_character(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens begin inside a character that began before them."""
        first = next((byte for token_id in token_ids for byte in self._bytes(token_id)), 0)
        return 0x80 <= first < 0xC0

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """At least the last three bytes of the text: an unfinished character has at most three."""
        found = b""
        for token_id in reversed(token_ids):
            found = self._bytes(token_id) + found
            if len(found) > 2:
                break
        return found

    def _bytes(self, token_id: int) -> bytes:
        """The bytes of a token; empty if it is special or unknown."""
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
    """A text or a token without blanks, including SentencePiece's sign for a blank."""
    return "".join(text.replace("\u2581", " ").split())


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of its steps."""
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [part] if inner is None else [step for item in inner for step in _steps(item)]


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a step of a normalizer never shortens a text: it only replaces blanks by SentencePiece's sign."""
    return step["type"] == "Prepend" or (step.get("pattern") == {"String": " "} and bool(step.get("content")))


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end that are an unfinished character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    rest = decoder.getstate()[0]
    # Python's decoder also waits for the third byte of a surrogate, which is no character (ED A0 to ED BF).
    return b"" if rest[:1] == b"\xed" and rest[1:] >= b"\xa0" else rest


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers use for each byte: itself if printable, else the next free one from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class Detokenizer:
    """The text of a growing sequence of tokens, in chunks of whole characters.

    All chunks and `finish()` together are the text that the tokens add to the prompt's, except an unfinished character
    at the very end, which is never shown. Cost of a token: decoding the tokens since the second to last chunk, for any
    length of the whole. Not safe between threads.

    The text of a token depends on its neighbours: many decoders strip the blank of the first token, and those with byte
    fallback decode a run of bytes only if the whole run is valid. So the decoded window always begins at the end of a
    chunk, which is between two characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], special: bool = False) -> None:
        """prompt_ids: the tokens in front, so that the first new token is not decoded as a text's first. special:
        special tokens are part of the text."""
        self._tokenizer = tokenizer
        self._special = special
        tail = self._clean_tail(prompt_ids)
        self._shown, _ = tokenizer.decode_whole(tail, special)
        # An unfinished character at the prompt's end waits like new tokens, so that the window begins between
        # characters.
        end = next(end for end in range(len(tail), -1, -1) if not tokenizer.decode_whole(tail[:end], special)[1])
        self._window, self._pending = tail[:end], tail[end:]

    def add(self, token_id: int) -> str:
        """Add a token. Returns the text that it completes; empty while a character is unfinished."""
        self._pending.append(token_id)
        text, unfinished = self._tokenizer.decode_whole(self._window + self._pending, self._special)
        if unfinished or len(text) <= len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._window, self._pending = self._pending, []
        self._shown = self._tokenizer.decode(self._window, self._special)
        return new

    def finish(self) -> str:
        """The text that was held back, without an unfinished character."""
        text, _ = self._tokenizer.decode_whole(self._window + self._pending, self._special)
        return text[len(self._shown) :]

    def _clean_tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from a token that does not begin inside a character."""
        start = max(0, len(prompt_ids) - _PROMPT_TAIL)
        while start > 0 and self._tokenizer.starts_inside_character(prompt_ids[start:]):
            start -= 1
        return list(prompt_ids[start:])


_PROMPT_TAIL = 8
