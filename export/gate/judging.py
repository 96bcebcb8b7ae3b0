"""The texts and prompts that judge a quantized graph. None of them calibrates it.

edgelm's own were written for it: prose, a dialogue, code and French, a file each below `text/judging`, and everyday
questions in `text/chat.json`. `text/default.txt` and `text/calibrating` calibrate. A user's text is cut in two between
paragraphs: the first half calibrates in place of `text/default.txt`, the second judges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ...runtime.bundle import folder as names
from ...runtime.bundle.manifest import Tokens
from ...runtime.errors import TemplateError
from ...runtime.host.files import read_text
from ...runtime.text.chat import ChatTemplate
from ...runtime.text.templates import find_templates
from ...runtime.text.tokenizer import Tokenizer
from ..errors import RecipeError
from ..texts import Texts

WINDOW = 512
ANSWER_TOKENS = 32
# Windows of all texts together. Byte tokenizers, which have short windows, get more.
_MOST_WINDOWS = 12
_PROMPTS, _START_TOKENS = 12, 24


@dataclass(frozen=True)
class Judging:
    """What judges one model.

    texts: pairs of a kind and the tokens of a window, each read from an empty cache; prompts: pairs of the text for a
    reader and the tokens; stop_ids: tokens that end an answer; vocab_size: of the model.
    """

    texts: tuple[tuple[str, list[int]], ...]
    prompts: tuple[tuple[str, list[int]], ...]
    stop_ids: tuple[int, ...]
    vocab_size: int


def make_judging(
    texts: Texts, tokenizer: Tokenizer, folder: Path, tokens: Tokens, *, context_length: int, vocab_size: int
) -> Judging:
    """Windows of the texts and prompts for a model, none longer than its context.

    folder: with the bundle's tokenizer_config.json and chat template. Raises: RecipeError for texts that are too short
    to judge by.
    """
    window = min(WINDOW, context_length)
    most = max(1, _MOST_WINDOWS // len(texts.judging))
    windows = [
        (kind, ids)
        for kind, text in texts.judging
        for ids in _windows(tokenizer.encode(text), tokens.bos, window, most)
    ]
    found = sum(len(ids) for _, ids in windows)
    if found < window:
        raise RecipeError(
            f"{texts.origin} is too short to judge this model by: the half that does not calibrate has {found} tokens, "
            f"{window} are needed: give a text of {2 * window} tokens or more with --text"
        )
    room = context_length - ANSWER_TOKENS
    prompts = list(_chat_prompts(tokenizer, folder, room)) or list(_starts(windows, tokenizer, room))
    return Judging(tuple(windows), tuple(prompts), tuple(tokens.eos), vocab_size)


def chat_questions() -> list[str]:
    """The questions that come with edgelm."""
    text = (resources.files("edgelm.export") / "text" / "chat.json").read_text(encoding="utf-8")
    return [str(question) for question in json.loads(text)]


def _windows(ids: Sequence[int], bos: int | None, size: int, most: int) -> Iterator[list[int]]:
    """Up to `most` windows, evenly spread, each with the beginning-of-text token if the tokenizer adds one."""
    first = [bos] if bos is not None and len(ids) > 1 and ids[0] == bos else []
    body = ids[len(first) :]
    step = max(1, size - len(first))
    begins = range(0, len(body), step)
    chosen = [begins[index * len(begins) // most] for index in range(most)] if len(begins) > most else begins
    for begin in chosen:
        window = [*first, *body[begin : begin + step]]
        if len(window) > 1:
            yield window


def _chat_prompts(tokenizer: Tokenizer, folder: Path, room: int) -> Iterator[tuple[str, list[int]]]:
    template = chat_template(folder)
    if template is None:
        return
    for question in chat_questions():
        try:
            text = template.prompt(({"role": "user", "content": question},))
        except TemplateError:
            return
        ids = tokenizer.encode(text, special=False)
        if 0 < len(ids) <= room:
            yield question, ids


def chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template, if the model has one that works. A broken one is no error of the export; its users will be
    told."""
    template, config = folder / names.CHAT_TEMPLATE_NAME, folder / names.TOKENIZER_CONFIG_NAME
    try:
        found = find_templates(
            read_text(template) if template.is_file() else None,
            json.loads(read_text(config)),
        )
        return None if found is None else found.default
    except TemplateError:
        return None


def _starts(
    windows: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer, room: int
) -> Iterator[tuple[str, list[int]]]:
    """The first tokens of the windows, as prompts to continue."""
    for _, ids in windows[:_PROMPTS]:
        start = ids[: max(1, min(_START_TOKENS, room))]
        yield tokenizer.decode(start), start
