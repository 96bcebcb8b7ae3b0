"""The rows that the example model learns from, a function of the seed and the step."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .model import end_of_text
from .texts import Recipe, rename_characters

INSIDE_SHARE = 0.5  # of the rows of stories: open inside a story


MARKED_SHARE = 0.25  # of the rows of stories: open with END_OF_TEXT and a whole story


class Batches:
    """Rows of token ids, each a function of the seed and the step."""

    def __init__(self, stories: list[str], general: list[str], tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._recipe = recipe
        self._end = end_of_text(tokenizer)
        self._tokenizer = tokenizer
        self._texts = stories
        self._stories: list[list[int]] = [encoding.ids for encoding in tokenizer.encode_batch(stories)]
        joined = "\n\n".join(general)
        pieces = tokenizer.encode_batch([joined[at : at + 100_000] for at in range(0, len(joined), 100_000)])
        self._general: list[int] = [token for piece in pieces for token in piece.ids]

    @property
    def sizes(self) -> dict[str, int]:
        """Count the tokens of each kind of text."""
        return {"stories": sum(map(len, self._stories)), "general": len(self._general)}

    def at(self, step: int) -> Tensor:
        """Return the batch of a step: ``(rows, window)`` int64."""
        recipe = self._recipe
        chance = random.Random(f"{recipe.seed}/{step}")  # noqa: S311  (no secret)
        progress = step / recipe.steps
        story_share = recipe.first_story_share + progress * (recipe.last_story_share - recipe.first_story_share)
        window = recipe.long_window if chance.random() < recipe.long_share else recipe.window
        rows = [
            self._story_row(chance, window) if chance.random() < story_share else self._general_row(chance, window)
            for _ in range(recipe.tokens_per_step // window)
        ]
        return torch.tensor(rows)

    def _story_row(self, chance: random.Random, window: int) -> list[int]:
        """Return stories one after the other.

        Most rows open with a whole story, with or without the token before it, as prompts do. The others open inside
        one: a row is shorter than many stories, and their endings must occur too.
        """
        first = self._story(chance)
        row = first[chance.randrange(len(first)) :] if chance.random() < INSIDE_SHARE else list(first)
        if chance.random() < MARKED_SHARE:
            row = [self._end, *first]
        while len(row) < window:
            row += [self._end, *self._story(chance)]
        return row[:window]

    def _story(self, chance: random.Random) -> list[int]:
        index = chance.randrange(len(self._stories))
        if self._recipe.rename_share and chance.random() < self._recipe.rename_share:
            return self._tokenizer.encode(rename_characters(self._texts[index], chance)).ids
        return self._stories[index]

    def _general_row(self, chance: random.Random, window: int) -> list[int]:
        start = chance.randrange(len(self._general) - window)
        return self._general[start : start + window]
