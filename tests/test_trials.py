"""The prompts of the comparison with torch: lengths, cuts, and limits reported as not reached."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from edgelm.export.gate.trials import make_trials, pieces
from edgelm.runtime.bundle.manifest import CacheType, LayerCache, Model

TEXT_IDS = [index % 200 for index in range(1000)]


def model(context_length: int, *windows: int | None) -> Model:
    layers = tuple(LayerCache(2, 16, 16, window) for window in windows)
    return Model(257, context_length, 1, layers, CacheType("float32", None))


def longest(shape: Model, **config: object) -> tuple[int, tuple[str, ...]]:
    trials, left_out = make_trials(TEXT_IDS, shape, SimpleNamespace(**config))
    return max(len(trial.prompt) for trial in trials), left_out


def test_the_longest_prompt_goes_beyond_the_largest_window_within_reach() -> None:
    length, left_out = longest(model(8192, 100, 300, 4096, None))
    assert 300 < length < 600
    assert left_out == ("sliding window of 4096 tokens",)


def test_the_longest_prompt_exceeds_the_original_rotary_context_too() -> None:
    rope = {
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 400},
        "sliding_attention": {"rope_type": "default"},
    }
    length, left_out = longest(model(8192, 100, None), rope_parameters=rope)
    assert length > 400
    assert left_out == ()
    _, left_out = longest(model(8192, None), rope_parameters={"original_max_position_embeddings": 2048})
    assert left_out == ("original context of the rotary embedding of 2048 tokens",)


def test_a_window_as_long_as_the_context_does_not_count() -> None:
    assert longest(model(8192, 8192)) == longest(model(8192, None))


def test_no_prompt_is_longer_than_the_context() -> None:
    for context_length in (2, 10, 100):
        length, _ = longest(model(context_length, None))
        assert 1 <= length < context_length


def test_random_prompts_use_tokens_that_the_text_does_not() -> None:
    trials, _ = make_trials(TEXT_IDS, model(512, None), SimpleNamespace())
    used = {token for trial in trials for token in trial.prompt}
    assert used.difference(TEXT_IDS)
    assert max(used) < 257


def test_pieces_are_the_text_cut_the_same_way_for_the_same_seed() -> None:
    cut = [list(pieces(TEXT_IDS, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    assert all([token for piece in parts for token in piece] == TEXT_IDS for parts in cut)
    assert cut[0] == cut[1] != cut[2]
    assert len({len(piece) for piece in cut[0]}) > 5
