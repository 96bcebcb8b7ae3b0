"""The recipe of the example model, and its cleaned texts."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

STORIES = Path("tinystories", "tinystories_1000.json")


WIKITEXT = Path("wikitext-2", "train.txt")


GIRLS = (
    "Lily", "Anna", "Mia", "Sara", "Lucy", "Sarah", "Molly", "Jane", "Lila", "Jill", "Daisy", "Sue", "Sally", "Amy",
    "Mary", "Jenny", "Emma", "Grace", "Ella",
)  # fmt: skip


BOYS = (
    "Ben", "Tom", "Timmy", "Jack", "Tim", "Sam", "Max", "John", "Bob", "Joe", "Jimmy", "Tommy", "Billy", "Andy",
    "Benny", "James", "Jake", "Jim", "Frank", "George",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; each field is a flag of the same name."""

    seed: int = 1
    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    feed_forward: int = 512
    positions: int = 1024
    steps: int = 2800
    tokens_per_step: int = 2048
    window: int = 256
    long_window: int = 1024
    long_share: float = 0.3
    learning_rate: float = 3e-3
    block_learning_rate: float = 0.02
    weight_decay: float = 0.1
    dropout: float = 0.15
    rename_share: float = 0.5
    first_story_share: float = 0.4
    last_story_share: float = 1.0
    dev_stories: int = 50
    held_out_stories: int = 50


@dataclasses.dataclass(frozen=True)
class Stories:
    """The three disjoint parts of the stories."""

    train: list[str]
    dev: list[str]
    held_out: list[str]


# UTF-8 punctuation read as Windows-1252. The bare pair comes last: it is a closing quote, whose third byte got lost
# because Windows-1252 has no character for it.
BROKEN_PUNCTUATION = (
    ("\u00e2\u20ac\u0153", '"'),
    ("\u00e2\u20ac\u2122", "'"),
    ("\u00e2\u20ac\u201c", " - "),
    ("\u00e2\u20ac\u201d", " - "),
    ("\u00e2\u20ac", '"'),
)


def repair_story(text: str) -> str:
    """Undo UTF-8 that was once read as Windows-1252, and write quotes and dashes in ASCII.

    ASCII because nearly all stories use it already: a second spelling of a quote would only thin out the examples.
    """
    for broken, plain in BROKEN_PUNCTUATION:
        text = text.replace(broken, plain)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n\n", text)).strip()


def undo_wikitext_tokenisation(line: str) -> str:
    """Join what WikiText split: numbers, hyphens, punctuation, brackets, contractions and quotes."""
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r" ([,.;:!?%)\]]|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)", r"\1", line)
    line = re.sub(r"([(\[$£]) ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    return re.sub(r"(\w) ' (?=\w)", r"\1' ", line)


def is_whole(sentence: str) -> bool:
    """Tell whether a sentence has no hole, no foreign letters, and closes the quotations that it opens."""
    return "<unk>" not in sentence and sentence.isascii() and sentence.count('"') % 2 == 0


def wikitext_paragraphs(path: Path) -> Iterator[str]:
    """Yield the paragraphs without their headings and without the sentences that are not whole.

    A sentence with a hole teaches wrong grammar; leaving it out costs less than leaving the hole.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("="):
            continue
        sentences = re.split(r"(?<= [.!?]) (?=[A-Z\"])", line.strip())
        kept = [sentence for sentence in sentences if is_whole(sentence)]
        if kept:
            yield undo_wikitext_tokenisation(" ".join(kept))


def read_stories(path: Path, recipe: Recipe) -> Stories:
    """Read and split the stories; the split depends on the seed alone."""
    texts = [repair_story(text) for text in json.loads(path.read_text(encoding="utf-8"))]
    random.Random(recipe.seed).shuffle(texts)  # noqa: S311  (no secret)
    dev_end = recipe.held_out_stories + recipe.dev_stories
    return Stories(
        train=texts[dev_end:], dev=texts[recipe.held_out_stories : dev_end], held_out=texts[: recipe.held_out_stories]
    )


def rename_characters(story: str, chance: random.Random) -> str:
    """Give the girls and boys of a story other names, each the same one throughout.

    With so few stories a name soon stands for the one plot it occurred in; this breaks the tie.
    """
    for names in (GIRLS, BOYS):
        present = sorted(name for name in names if re.search(rf"\b{name}\b", story))
        free = [name for name in names if name not in present]
        renamed = dict(zip(present, chance.sample(free, min(len(present), len(free))), strict=False))
        if renamed:
            pieces = re.split(rf"\b({'|'.join(renamed)})\b", story)
            story = "".join(renamed.get(piece, piece) for piece in pieces)
    return story
