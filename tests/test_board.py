"""What `edgelm doctor` says about a small board, and about a bundle before it is loaded."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from edgelm.runtime.bundle.folder import GRAPH_NAME, WEIGHTS_NAME
from edgelm.runtime.bundle.onnx_file import streamed_bytes
from edgelm.runtime.cli import main
from edgelm.runtime.commands import diagnosis, doctor, expectation
from edgelm.runtime.host import bandwidth, board

PI = "Raspberry Pi 5 Model B Rev 1.0"
NOTHING, LOW_NOW, LOW_BEFORE, HOT_NOW, HOT_BEFORE = "0", "50005", "10000", "80008", "e0000"


@pytest.fixture
def pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A board whose system files a test writes below the folder."""
    (tmp_path / "model").write_bytes(PI.encode() + b"\0")
    zone = tmp_path / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("84210\n")
    for name, place in {"_MODEL": "model", "_DEVICES": "devices", "_THERMAL": "thermal"}.items():
        monkeypatch.setattr(board, name, tmp_path / place)
    return tmp_path


def tell(folder: Path, bits: str, where: str = "soc/soc:firmware") -> None:
    file = folder / "devices" / where / "get_throttled"
    file.parent.mkdir(parents=True)
    file.write_text(f"{bits}\n")


@pytest.mark.parametrize("where", ["soc/soc:firmware", "soc@107c000000/soc@107c000000:firmware", "soc:firmware"])
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (NOTHING, []),
        (LOW_NOW, ["voltage is too low", "hot (84 degrees Celsius), and slowed down"]),
        (LOW_BEFORE, ["voltage was too low since it started"]),
        (HOT_NOW, ["hot (84 degrees Celsius), and slowed down"]),
        (HOT_BEFORE, ["slowed down since it started"]),
    ],
)
def test_a_raspberry_pi_says_why_it_is_slow(pi: Path, where: str, bits: str, words: list[str]) -> None:
    tell(pi, bits, where)
    found = board.slowed()
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("kind", "state", "is_hot"),
    [("thermal-cpufreq-0", 3, True), ("cpufreq-cpu0", 1, True), ("thermal-cpufreq-0", 0, False), ("pwm-fan", 4, False)],
)
def test_other_boards_report_throttling_by_their_cooling_devices(pi: Path, kind: str, state: int, is_hot: bool) -> None:
    device = pi / "thermal" / "cooling_device0"
    device.mkdir()
    (device / "type").write_text(f"{kind}\n")
    (device / "cur_state").write_text(f"{state}\n")
    assert bool(board.slowed()) == is_hot


def test_a_firmware_value_that_is_no_number_is_ignored(pi: Path) -> None:
    tell(pi, "unknown")
    assert board.slowed() == ()


def test_the_doctor_names_the_board_and_its_pages(
    pi: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(pi, LOW_NOW)
    monkeypatch.setattr(mmap, "PAGESIZE", 16384)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"{PI}, pages of 16 KiB" in text and "power supply" in text


def test_without_a_board_no_board_line_is_printed(pi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pi / "model").unlink()
    assert main(["doctor"]) == 0
    assert "board" not in capsys.readouterr().out


def test_a_32_bit_system_gets_advice_and_the_full_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "install the 64-bit system" in text and "GB free" in text
    assert main(["doctor", "--json"]) == 1
    assert "64-bit" in json.loads(capsys.readouterr().out)["onnxruntime_fault"]


def test_reading_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.05)
    assert 1e8 < bandwidth.read_bytes_per_s(2) < 1e13


def test_little_memory_is_measured_with_less_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    ones = np.ones
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.0)
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 40 << 20)
    monkeypatch.setattr(np, "ones", lambda count, kind: taken.append(count) or ones(count, kind))
    bandwidth.read_bytes_per_s(2)
    assert sum(taken) * 8 <= 10 << 20


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_table_counts_as_streamed_if_tied(tmp_path: Path, tied: bool) -> None:
    table, head = np.zeros((10, 8), np.float32), np.zeros((8, 10), np.float32)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "head"], ["y"])]
    nodes += [helper.make_node("MatMul", ["y", "table"], ["z"])] * tied
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(head, "head")]
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)).SerializeToString())
    assert streamed_bytes(path) == head.nbytes + (table.nbytes if tied else 0)


def test_weights_in_a_file_of_their_own_are_counted(tiny_bundle: Path) -> None:
    size = (tiny_bundle / WEIGHTS_NAME).stat().st_size
    assert 0.9 * size < streamed_bytes(tiny_bundle / GRAPH_NAME) < 1.2 * size


@pytest.mark.parametrize(("free", "room"), [(10**9, "fits into"), (1000, "does not fit into")])
def test_the_doctor_says_what_to_expect_of_a_bundle(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    room: str,
) -> None:
    size = streamed_bytes(tiny_bundle / GRAPH_NAME)
    monkeypatch.setattr(doctor, "read_bytes_per_s", lambda threads: 500.0 * size)
    monkeypatch.setattr(diagnosis, "available_bytes", lambda: free)
    monkeypatch.setattr(diagnosis, "_kernels", lambda: ("kernels", None))
    assert main(["doctor", str(tiny_bundle)]) == 0
    text = capsys.readouterr().out
    assert room in text and "at most 500 tokens/s" in text and "about 360 tokens/s are usual" in text
    assert main(["doctor", "--json", str(tiny_bundle)]) == 0
    (told,) = json.loads(capsys.readouterr().out)["expected"]
    assert told["bytes_a_token"] == size and told["fits"] == (room == "fits into")


def test_a_slow_memory_bounds_the_models_that_are_pleasant() -> None:
    found = diagnosis.diagnose()
    slow, fast = (expectation.comfortable_parameters(found, speed) for speed in (1e9, 1e10))
    assert fast == pytest.approx(10 * slow)
    assert slow < 1e8
