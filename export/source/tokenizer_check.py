"""Check on hard texts that the bundle's tokenizer is equal to the one that transformers uses.

The bundle's tokenizer.json is only the core of a transformers tokenizer: a class, or a setting of
tokenizer_config.json, may change ids or text in Python, which a device without transformers cannot do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...runtime.text.tokenizer import Tokenizer
from ..errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that tokenizers treat differently: contractions and digits, leading and repeated blanks, control characters,
# blanks before punctuation, accents in both forms, ligatures, scripts without blanks or from right to left, emoji of
# several characters, a character outside the first plane, SentencePiece's mark, a U+FFFD, code, names of tokens.
HARD_TEXTS = (
    "Hello, World! I'll say it's 3.14159 of 1,234,567.",
    " one blank in front",
    "   three  blanks\n\n\n \t\tand tabs \r\n ",
    "\x00\x01\x7f\x85\xa0\u2028\u200b\ufeff",
    "He said , ' I do n't know ' . Why ? They 've gone !",
    "e\u0301 é \ufb01 \u212b ½ Ⅷ",
    "你好\uff0c世界。日本語のテキスト 한국어",
    "שלום עולם مرحبا नमस्ते ไทย",
    "👩🏽\u200d🚀👨\u200d👩\u200d👧🇵🇱 ❤\ufe0f",
    "\U0001d573 ▁ \ufffd x",
    "def f(x):\n    return {'a': [x ** 2, None]}  # 0x1F\n",
    "<0x0A> <s> </s> <unk> [INST] <|endoftext|> <|im_start|>user",
)
_MOST_ADDED_TOKENS = 64


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, bundled: Tokenizer, text: str) -> None:
    """Compare ids and decoded text of `text` and of hard texts, with special tokens and without.

    The hard texts include the tokenizer's added tokens, as in a chat's prompt. Raises: SourceError, which names the
    first different text.
    """
    added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().get)[:_MOST_ADDED_TOKENS]
    for sample in (text, *HARD_TEXTS, *(f"a {token} b{token}{token}\nc" for token in added)):
        for special in (True, False):
            ids = list(tokenizer(sample, add_special_tokens=special, verbose=False)["input_ids"])
            found = bundled.encode(sample, special=special)
            if found != ids:
                raise _difference("gives other ids", sample, ids, found)
        expected, decoded = tokenizer.decode(ids, skip_special_tokens=True), bundled.decode(ids)
        if decoded != expected:
            raise _difference("decodes ids to another text", sample, expected, decoded)


def _difference(what: str, sample: str, expected: object, found: object) -> SourceError:
    return SourceError(
        f"the model's tokenizer.json {what} than its transformers tokenizer for {sample!r:.60} "
        f"({_short(found)}, not {_short(expected)}): take settings such as split_special_tokens and "
        "clean_up_tokenization_spaces out of tokenizer_config.json, or give the tokenizer that belongs to the model"
    )


def _short(value: object) -> str:
    return f"{value!r:.60}"
