"""Text to token ids and back, by Hugging Face `tokenizers`, the very code that transformers' fast tokenizers run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BundleCorruptError, PromptError

if TYPE_CHECKING:
    import tokenizers

# What an incomplete or invalid UTF-8 sequence decodes to.
REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer.json. Immutable, safe between threads."""

    def __init__(self, path: Path) -> None:
        """Load a file. Cost: some 50 ms for 50,000 entries. Raises: BundleCorruptError."""
        import tokenizers

        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception, nothing narrower
            raise BundleCorruptError(f"{path} is no tokenizer ({error}): export the bundle again") from error
        # A file may ask to cut or fill every text to one length, which suits batches of training texts only.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's vocabulary may be larger (padded)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: add what the tokenizer puts around a text, such as a first token.

        Raises: PromptError, if the text holds half a surrogate pair, which no encoding can represent.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the prompt is not valid Unicode text ({error}): remove lone surrogates") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; U+FFFD stands for bytes that are not UTF-8."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class Detokenizer:
    """Text of a growing sequence of tokens, in chunks that hold whole characters only.

    The chunks and `finish()`, joined, are what the tokens add to the decoded text of prompt and tokens together,
    except an unfinished character at the very end, which is never shown. A token costs the decoding of the tokens
    since the last chunk but one, whatever the length of the whole. Not safe between threads.

    Decoders look at neighbours: many strip a blank in front of a text's first token, and those with byte fallback
    turn a run of bytes into characters only where the whole run is valid. So the window that is decoded always starts
    where a chunk ended, which is between two characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        """prompt_ids: what stands before the new tokens, so that the first of them is not taken for a text's first."""
        self._tokenizer = tokenizer
        tail = self._clean_tail(prompt_ids)
        end = self._clean_end(tail)
        # What the prompt holds of an unfinished character waits like new tokens, so that the window stays clean.
        self._window, self._pending = tail[:end], tail[end:]
        self._shown = max(tokenizer.decode(self._window), tokenizer.decode(tail).rstrip(REPLACEMENT), key=len)

    def add(self, token_id: int) -> str:
        """The text that this token completes: empty while a character is unfinished."""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._window + self._pending)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._window, self._pending = self._pending, []
        self._shown = self._tokenizer.decode(self._window)
        return new

    def finish(self) -> str:
        """The text that was held back with an unfinished character, without that character."""
        return self._tokenizer.decode(self._window + self._pending).rstrip(REPLACEMENT)[len(self._shown) :]

    def _clean_end(self, token_ids: list[int]) -> int:
        """Where the whole characters end. An unfinished one has at most three bytes; more is no character at all."""
        for end in range(len(token_ids), max(-1, len(token_ids) - 4), -1):
            if not self._tokenizer.decode(token_ids[:end]).endswith(REPLACEMENT):
                return end
        return len(token_ids)

    def _clean_tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from a place that is not inside a character."""
        start = max(0, len(prompt_ids) - _PROMPT_TAIL)
        while start > 0 and self._tokenizer.decode(prompt_ids[start:]).startswith(REPLACEMENT):
            start -= 1
        return list(prompt_ids[start:])


_PROMPT_TAIL = 8
