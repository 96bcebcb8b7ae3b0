"""The promises that every kind of session keeps: the same tests for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.export import ExportConfig, export_model
from edgelm.export.gate.torch_session import TorchSession
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.errors import SessionError
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.sessions.concatenated import ConcatSession
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.sessions.loading import open_session
from edgelm.runtime.sessions.on_device import DeviceSession
from edgelm.runtime.sessions.protocol import OneRow, Rows, Session

from .conftest import WIDE_TARGET, byte_tokenizer
from .model_zoo import tiny_model as zoo_model
from .test_cuda import export_cuda, sessions
from .test_decode import rule

__all__ = ["export_cuda"]

KINDS = ["fake", "in place", "in place, float32 cache", "one row of several", "concatenated", "device", "torch"]
IDS = [int(token) for token in np.random.default_rng(5).integers(3, 200, 40)]


class RowOfSeveral:
    """The third row of a session's rows, as a session, beside rows with other texts."""

    ROW = 2

    def __init__(self, session: OrtSession) -> None:
        self._rows: Rows = session.rows()
        self._session = session
        self._rows.feed(0, IDS[:7])
        self._rows.feed(1, IDS[3:20])
        self.capabilities = session.capabilities

    @property
    def length(self) -> int:
        return self._rows.length(self.ROW)

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        return self._rows.feed(self.ROW, token_ids, keep)

    def expect(self, positions: int) -> None:
        self._rows.expect(self.ROW + 1, positions)

    def can_rewind(self, length: int) -> bool:
        return self._rows.can_rewind(self.ROW, length)

    def rewind(self, length: int) -> None:
        self._rows.rewind(self.ROW, length)

    def close(self) -> None:
        self._session.close()


@pytest.fixture(scope="session")
def concatenated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bloom")
    zoo_model("bloom").save_pretrained(folder / "model")
    byte_tokenizer(folder / "model")
    return export_model(ExportConfig(str(folder / "model"), target=WIDE_TARGET, out=folder / "bundle")).path


@pytest.fixture
def open_kind(
    request: pytest.FixtureRequest, tiny_model: Path, export_tiny: Callable[..., Path]
) -> Callable[[str], Session]:
    def make(kind: str) -> Session:
        if kind == "fake":
            return FakeSession(257, rule(257))
        if kind == "torch":
            from transformers import AutoModelForCausalLM

            return TorchSession(AutoModelForCausalLM.from_pretrained(tiny_model).eval())
        if kind == "device":
            return sessions(request.getfixturevalue("export_cuda")())[0]
        if kind == "concatenated":
            found = open_session(Bundle.open(request.getfixturevalue("concatenated")), 1)
            assert isinstance(found, ConcatSession)
            return found
        found = open_session(Bundle.open(export_tiny(**({"kv": "float32"} if "float32" in kind else {}))), 1)
        assert isinstance(found, OrtSession)
        return RowOfSeveral(found) if kind == "one row of several" else found

    return make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def session(kind: str, open_kind: Callable[[str], Session]) -> Iterator[Session]:
    made = open_kind(kind)
    yield made
    made.close()


def near(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> bool:
    """Equal except for the order of sums. Equality bit by bit is tested elsewhere."""
    return bool(np.allclose(got, wanted, rtol=0, atol=0.05 + 0.02 * np.abs(wanted).max()))


def test_a_step_has_as_many_rows_of_logits_as_are_asked_for(session: Session) -> None:
    assert session.length == 0
    whole = session.step(IDS[:10], 10).copy()
    assert whole.dtype == np.float32 and whole.ndim == 2 and len(whole) == 10
    assert session.length == 10
    session.rewind(0)
    assert session.step(IDS[:6], 0).shape == (0, whole.shape[1])
    assert session.length == 6
    rest = session.step(IDS[6:10], 3)
    assert rest.shape == (3, whole.shape[1])
    assert near(rest, whole[-3:])


def test_a_rewound_session_continues_like_a_fresh_one(session: Session) -> None:
    session.step(IDS[:12])
    wanted = session.step([9]).copy()
    session.step(IDS[20:25])
    assert session.can_rewind(12) and session.can_rewind(0)
    assert not session.can_rewind(session.length + 1)
    session.rewind(12)
    assert session.length == 12
    assert near(session.step([9]), wanted)
    session.rewind(0)
    session.step(IDS[:12])
    assert near(session.step([9]), wanted)


def test_expect_changes_only_the_capacity(session: Session) -> None:
    wanted = session.step(IDS[:9]).copy()
    session.rewind(0)
    session.expect(300)
    assert session.length == 0
    assert near(session.step(IDS[:9]), wanted)


def test_a_step_that_fails_leaves_the_session_as_it_was(session: Session, kind: str) -> None:
    if kind in ("fake", "torch", "device"):
        pytest.skip("its steps take any token")
    session.step(IDS[:8])
    wanted = session.step([9]).copy()
    session.rewind(8)
    with pytest.raises(SessionError, match=r"a step of \d+ tokens at position 8 failed"):
        session.step([10**9])
    assert session.length == 8
    assert near(session.step([9]), wanted)


def test_the_last_position_of_the_context_can_be_used(session: Session, kind: str) -> None:
    if kind == "torch":
        pytest.skip("it recomputes the whole text in each step")
    ids = [IDS[index % len(IDS)] for index in range(512)]
    for begin in range(0, 511, 100):
        session.step(ids[begin : min(begin + 100, 511)], 0)
    assert session.step(ids[511:]).shape[0] == 1
    assert session.length == 512


def test_closing_twice_is_allowed(session: Session) -> None:
    session.step(IDS[:3])
    session.close()
    session.close()


def test_capabilities_work_on_the_sessions_own_text(session: Session, kind: str) -> None:
    found = session.capabilities
    assert found.piece_tokens >= 1 and found.least_rows >= 1 and found.device in ("cpu", "cuda")
    if kind == "one row of several":
        return
    session.step(IDS[:5])
    rows = found.rows or OneRow(session)
    assert rows.length(0) == session.length == 5
    rows.rewind(0, 2)
    assert session.length == 2
    assert (found.picks is not None) == isinstance(session, DeviceSession)
    if found.picks is not None:
        session.rewind(0)
        wanted = session.step(IDS[:5], 2).argmax(axis=1)
        session.rewind(0)
        assert found.picks.likeliest(IDS[:5], 2).tolist() == wanted.tolist()
    if found.blocks is not None:
        assert found.blocks.block_bytes(16) == 16 * found.blocks.block_bytes(1)


def test_decoding_gives_the_same_as_single_steps(session: Session, kind: str) -> None:
    if kind == "one row of several":
        pytest.skip("a decoder would use the row that its capabilities name")
    token = int(session.step(IDS[:6])[0].argmax())
    wanted = [token]
    for _ in range(5):
        wanted.append(int(session.step([wanted[-1]])[0].argmax()))
    session.rewind(0)
    assert list(Sequencer(session, 4).greedy(IDS[:6], 6, ())) == wanted
