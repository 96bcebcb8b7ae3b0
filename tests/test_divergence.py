"""Divergence of next-token distributions, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.runtime.evaluation.divergence import divergence, lead, log_softmax


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(np.float64(logits) - np.float64(logits).max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([-1e4, 0.0, 1e4]))
def test_log_softmax_and_divergence_match_their_definitions(seed: int, spread: float, offset: float) -> None:
    random = np.random.default_rng(seed)
    left = random.normal(offset, spread, (3, 500)).astype(np.float32)
    right = (left + random.normal(0, spread / 10, left.shape)).astype(np.float32)
    expected, got = softmax(left), softmax(right)
    assert np.exp(log_softmax(left)) == pytest.approx(expected, rel=2e-4, abs=1e-7)
    with np.errstate(divide="ignore", invalid="ignore"):
        true = np.where(expected > 0, expected * np.log(expected / got), 0).sum(axis=1)
    assert divergence(log_softmax(left), log_softmax(right)) == pytest.approx(true, rel=1e-3, abs=1e-5)


def test_equal_distributions_diverge_by_0_and_rows_are_independent() -> None:
    rows = log_softmax(np.array([[0, 1, 2], [5, 0, 0]], np.float32))
    assert divergence(rows, rows).tolist() == [0, 0]
    found = divergence(rows, rows[[0, 0]])
    assert found.shape == (2,) and found[0] == 0 and found[1] > 0.1


def test_nan_stays_nan() -> None:
    good, bad = np.zeros((1, 4), np.float32), np.array([[np.nan, 0, 0, 0]], np.float32)
    assert np.isnan(divergence(log_softmax(good), log_softmax(bad)))[0]


def test_the_lead_is_the_distance_of_the_two_largest_probabilities() -> None:
    logits = np.random.default_rng(5).standard_normal((4, 300)).astype(np.float32) * 3
    logits[1, 7] = logits[1, 9] = 20  # a tie
    rows = log_softmax(logits)
    two = np.sort(np.exp(rows.astype(np.float64)), axis=1)[:, -2:]
    np.testing.assert_allclose(lead(rows), two[:, 1] - two[:, 0], atol=1e-6)
    assert lead(rows)[1] == 0
    np.testing.assert_array_equal(rows, log_softmax(logits))  # the input is unchanged
