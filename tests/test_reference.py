"""Exactness under cuts at full size: the 135M reference model, up to 2,000 tokens, bit for bit. Slow."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import Bundle
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.sessions.loading import open_session

from .conftest import ROOT

pytestmark = pytest.mark.slow

TOKENS = 2000
# Logits of all 2,000 positions would take 393 MB. Every position of the last stretch and some before it are compared.
CHECKED = sorted({*range(0, TOKENS, 97), 127, 128, 255, 256, 257, 511, 512, 1023, 1024, *range(TOKENS - 40, TOKENS)})


@pytest.fixture(scope="module")
def session() -> Iterator[OrtSession]:
    work = ROOT / "build" / "bench"
    _bench().prepare(work / "model", work / "bundle-int8", "int8")
    session = open_session(Bundle.open(work / "bundle-int8"))
    yield session
    session.close()


def _bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench", Path(ROOT / "scripts" / "bench.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text() -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(0, 49152, TOKENS)]


@pytest.fixture(scope="module")
def whole(session: OrtSession, text: list[int]) -> NDArray[np.float32]:
    return _logits(session, text, [TOKENS])


def _logits(session: OrtSession, text: list[int], sizes: list[int]) -> NDArray[np.float32]:
    """Logits at the checked positions of a text fed in pieces of these sizes, repeated in turn."""
    session.rewind(0)
    rows, begin, turn = [], 0, 0
    while begin < len(text):
        piece = text[begin : begin + sizes[turn % len(sizes)]]
        rows.append(_checked(session, piece, begin))
        begin, turn = begin + len(piece), turn + 1
    return np.concatenate(rows)


def _checked(session: OrtSession, piece: list[int], begin: int) -> NDArray[np.float32]:
    wanted = [position - begin for position in CHECKED if begin <= position < begin + len(piece)]
    keep = len(piece) - min(wanted, default=len(piece) - 1)
    logits = session.step(piece, keep)
    return logits[[index - (len(piece) - keep) for index in wanted]].copy()


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_any_cut_gives_the_same_bits(
    session: OrtSession, text: list[int], whole: NDArray[np.float32], sizes: list[int]
) -> None:
    assert np.array_equal(_logits(session, text, [max(sizes), *sizes]), whole)


def test_token_by_token_on_a_cached_prefix_gives_the_same_bits(
    session: OrtSession, text: list[int], whole: NDArray[np.float32]
) -> None:
    session.rewind(0)
    for begin in range(0, 1900, 256):
        session.step(text[begin : min(begin + 256, 1900)])
    for _ in range(2):
        session.rewind(1900)
        rows = [session.step([token])[0].copy() for token in text[1900:]]
        expected = {position: row for position, row in zip(CHECKED, whole, strict=True) if position >= 1900}
        for position, row in expected.items():
            assert np.array_equal(rows[position - 1900], row)
