"""Each sampling step against transformers' own processor, and whole choices against all processors in their order."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import GenerationSettings
from edgelm.runtime.decoding.sampling import (
    Sampler,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    penalize_repetition,
    penalize_use,
    with_temperature,
)
from edgelm.runtime.errors import SessionError, SettingsError

Row = NDArray[np.float32]
VOCABULARY = 40
seeds = st.integers(0, 10_000)


def row_of(seed: int, size: int = VOCABULARY, spread: float = 4.0) -> Row:
    """Logits without ties, so that the order of equal tokens does not matter."""
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def transformers_result(processor: Any, row: Row, ids: list[int] | None = None) -> Row:
    import torch

    scores = processor(torch.tensor([ids or [0]]), torch.from_numpy(np.asarray(row, np.float32).copy())[None])
    result: Row = scores[0].numpy()
    return result


@settings(max_examples=100, deadline=None)
@given(seeds, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), st.floats(0.25, 3))
def test_the_repetition_penalty_is_transformers(seed: int, ids: list[int], penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    row, seen = row_of(seed), np.zeros(VOCABULARY, bool)
    expected = transformers_result(RepetitionPenaltyLogitsProcessor(penalty), row, ids)
    seen[ids] = True
    penalize_repetition(row, seen, penalty)
    np.testing.assert_allclose(row, expected, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seeds, st.lists(st.integers(0, 9)), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_are_subtracted_as_openai_writes_it(
    seed: int, answer: list[int], presence: float, frequency: float
) -> None:
    row = row_of(seed)
    counts = Counter(answer)
    expected = [mu - counts[j] * frequency - (counts[j] > 0) * presence for j, mu in enumerate(row)]
    penalize_use(row, np.bincount(answer, minlength=VOCABULARY).astype(np.int64), presence, frequency)
    np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seeds, st.floats(0.05, 5))
def test_the_temperature_gives_transformers_probabilities(seed: int, temperature: float) -> None:
    import torch
    from transformers import TemperatureLogitsWarper

    row = row_of(seed)
    expected = torch.from_numpy(transformers_result(TemperatureLogitsWarper(temperature), row)).softmax(-1).numpy()
    ours = np.exp(with_temperature(row, temperature))
    np.testing.assert_allclose(ours / ours.sum(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    row = row_of(3)
    warm = with_temperature(row, temperature)
    assert warm.max() == 0 and not np.isnan(warm).any()
    if temperature < 1:
        assert draw(warm, 0.999) == row.argmax()


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, VOCABULARY + 5))
def test_top_k_is_transformers(seed: int, k: int) -> None:
    from transformers import TopKLogitsWarper

    row = row_of(seed)
    expected = transformers_result(TopKLogitsWarper(k), row)
    keep_top_k(row, k)
    np.testing.assert_array_equal(row, expected)


def test_top_k_keeps_ties_with_the_last_kept_token() -> None:
    row = np.array([1, 3, 2, 2, 0], np.float32)
    keep_top_k(row, 2)
    assert np.flatnonzero(row > -math.inf).tolist() == [1, 2, 3]


@settings(max_examples=200, deadline=None)
@given(seeds, st.floats(1e-6, 1, exclude_max=True), st.sampled_from([0.1, 1.0, 4.0, 30.0]))
def test_top_p_is_transformers(seed: int, p: float, spread: float) -> None:
    from transformers import TopPLogitsWarper

    row = row_of(seed, spread=spread)
    ordered = np.sort(np.exp(row.astype(np.float64) - row.max()))
    borders = np.cumsum(ordered) / ordered.sum()
    assume(np.abs(borders - (1 - p)).min() > 1e-5)  # closer than that, float32's rounding decides
    expected = transformers_result(TopPLogitsWarper(p), row)
    keep_top_p(row, p)
    np.testing.assert_array_equal(row, expected)


@settings(max_examples=100, deadline=None)
@given(seeds, st.floats(0, 1))
def test_min_p_is_transformers(seed: int, p: float) -> None:
    from transformers import MinPLogitsWarper

    row = row_of(seed)
    assume(np.abs(np.exp(row - row.max()) - p).min() > 1e-5)
    expected = transformers_result(MinPLogitsWarper(p), row)
    keep_min_p(row, p)
    np.testing.assert_array_equal(row, expected)


def test_the_most_likely_token_always_stays() -> None:
    for keep in (lambda row: keep_top_p(row, 1e-9), lambda row: keep_min_p(row, 1.0), lambda row: keep_top_k(row, 1)):
        row = row_of(5)
        best = row.argmax()
        keep(row)
        assert np.flatnonzero(row > -math.inf).tolist() == [best]


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(0, VOCABULARY - 1), st.integers(0, VOCABULARY + 3))
def test_log_probabilities_are_those_of_torch(seed: int, token: int, alternatives: int) -> None:
    import torch

    row = row_of(seed)
    expected = torch.from_numpy(row.copy()).double().log_softmax(-1)
    entry = log_probabilities(row, token, alternatives)
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    values, ids = expected.topk(min(alternatives, VOCABULARY))
    assert [index for index, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


# ---- a whole choice


def choices(rows: list[Row], prompt: list[int], end_ids: set[int] | None = None, **keywords: Any) -> list[int]:
    sampler = Sampler(GenerationSettings(**keywords), prompt, end_ids or set(), VOCABULARY)
    before = [row.copy() for row in rows]
    chosen = [sampler.choose(row) for row in rows]
    assert all((row == copy).all() for row, copy in zip(rows, before, strict=True)), "the session's logits were changed"
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    seeds,
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    st.floats(0.5, 2),
    st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-3, 3).filter(bool), min_size=1, max_size=4),
    st.integers(0, 4),
)
def test_a_greedy_answer_is_the_one_of_transformers_processors(
    seed: int, prompt: list[int], penalty: float, bias: dict[int, float], min_tokens: int
) -> None:
    import torch
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    rows = [row_of(seed + step) for step in range(6)]
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
            RepetitionPenaltyLogitsProcessor(penalty),
            MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, [1, 2]),
        ]
    )
    known = list(prompt)
    for row in rows:
        known.append(int(processors(torch.tensor([known]), torch.from_numpy(row.copy())[None]).argmax()))
    ours = choices(rows, prompt, {1, 2}, repetition_penalty=penalty, logit_bias=bias, min_tokens=min_tokens)
    assert ours == known[len(prompt) :]


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": 1.3},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_transformers_says(keywords: dict[str, Any]) -> None:
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    kinds: dict[str, Any] = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    row, count = row_of(11, spread=1.5), 6_000
    warpers = LogitsProcessorList([kinds[name](value) for name, value in keywords.items()])
    expected = torch.from_numpy(transformers_result(warpers, row)).softmax(-1).numpy()
    drawn = np.bincount(choices([row] * count, [0], seed=1, **keywords), minlength=VOCABULARY) / count
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected)), "a token was drawn that has probability 0"
    # Five standard deviations of each frequency. The seed is fixed, so the result never changes.
    assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_the_same_seed_draws_the_same_tokens_and_another_one_others() -> None:
    rows = [row_of(step, spread=1.0) for step in range(30)]
    first = choices(rows, [0], temperature=1, seed=7)
    assert choices(rows, [0], temperature=1, seed=7) == first
    assert choices(rows, [0], temperature=1, seed=8) != first
    assert choices(rows, [0], temperature=1) != choices(rows, [0], temperature=1), "each run without a seed draws one"


def test_seeded_draws_never_change() -> None:
    """A seed gives the same tokens in every version."""
    rows = [row_of(step, spread=1.0) for step in range(8)]
    assert choices(rows, [0], temperature=1, seed=42) == [33, 22, 33, 24, 2, 38, 28, 34]


def test_repetition_counts_the_prompt_and_presence_and_frequency_do_not() -> None:
    row = np.array([2.0, 1.9, 1.8, *[0] * (VOCABULARY - 3)], np.float32)
    assert choices([row] * 4, [0]) == [0, 0, 0, 0]
    assert choices([row] * 3, [0], repetition_penalty=1.5) == [1, 2, 0]
    assert choices([row] * 4, [0], presence_penalty=0.15) == [0, 1, 0, 0]
    assert choices([row] * 6, [0], frequency_penalty=0.15) == [0, 1, 0, 2, 1, 0]


def test_end_tokens_cannot_come_before_min_tokens() -> None:
    row = np.array([1.0, 5.0, 4.0, *[0] * (VOCABULARY - 3)], np.float32)
    assert choices([row] * 4, [0], {1, 2}, min_tokens=2) == [0, 0, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 5))
def test_min_tokens_alone_takes_the_most_likely_token_that_ends_nothing(values: list[list[int]], count: int) -> None:
    """The lowest id among equals, which are frequent here."""
    rows = [np.array(row, np.float32) for row in values]
    sampler = Sampler(GenerationSettings(min_tokens=count), [], {1, 4}, 6)
    for index, row in enumerate(rows):
        expected = row.copy()
        expected[[1, 4] if index < count else []] = -np.inf
        assert sampler.choose(row) == int(expected.argmax())
        assert row.tolist() == values[index]


def test_a_bias_of_minus_infinity_bans_a_token() -> None:
    row = row_of(2)
    best, second = np.argsort(row)[[-1, -2]].tolist()
    assert choices([row], [0], logit_bias={best: -math.inf}) == [second]
    drawn = choices([row] * 200, [0], logit_bias={best: -math.inf}, temperature=5, seed=1)
    assert best not in drawn and second in drawn


@pytest.mark.parametrize("keywords", [{}, {"temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.1}])
def test_extreme_settings_do_not_overflow(keywords: dict[str, Any]) -> None:
    extremes = {"logit_bias": {1: 1e6, 2: -1e6}, "presence_penalty": -1e6, "frequency_penalty": -1e6}
    for penalty in (1e-6, 1e6):
        rows = [row_of(step, spread=1e4) for step in range(5)]
        chosen = choices(rows, [0, 1], repetition_penalty=penalty, **extremes, **keywords)
        assert all(0 <= token < VOCABULARY for token in chosen)


@pytest.mark.parametrize("keywords", [{}, {"temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.1}])
def test_banning_every_token_is_an_error(keywords: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="no token is left"):
        choices([row_of(1)], [0], logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf), **keywords)


@pytest.mark.parametrize("keywords", [{"logprobs": 1}, {"temperature": 0.7}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_or_infinite_logits_are_an_error(keywords: dict[str, Any], value: float) -> None:
    row = row_of(1)
    row[4] = value
    sampler = Sampler(GenerationSettings(**keywords), [0], set(), VOCABULARY)
    with pytest.raises(SessionError, match="NaN"):
        sampler.choose(row)


def test_log_probabilities_are_the_models_own_under_any_settings() -> None:
    row = row_of(4)
    changed = {"logit_bias": {3: 50.0}, "repetition_penalty": 2.0, "temperature": 0.1, "top_k": 1, "logprobs": 2}
    sampler = Sampler(GenerationSettings(**changed), [3], set(), VOCABULARY)
    assert sampler.choose(row) == 3
    assert sampler.logprobs == [log_probabilities(row, 3, 2)]
