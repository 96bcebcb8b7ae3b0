"""The prefix cache: the KV cache of a prompt's prefix comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.runtime import Bundle, PrefixCacheSettings, load
from edgelm.runtime.bundle.manifest import CacheType, FileEntry
from edgelm.runtime.caches.prefixes.cache import PrefixCache, open_prefix_cache
from edgelm.runtime.caches.prefixes.files import BlockFiles
from edgelm.runtime.caches.prefixes.keys import BLOCK_TOKENS, block_keys, root_key
from edgelm.runtime.caches.prefixes.memory import BlockMemory
from edgelm.runtime.cli import main
from edgelm.runtime.decoding.row import Row
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.errors import SettingsError
from edgelm.runtime.fake import FakeSession
from edgelm.runtime.sessions import numerics
from edgelm.runtime.sessions.in_place import OrtSession
from edgelm.runtime.text.tokenizer import Tokenizer

from .conftest import TEXT
from .test_decode import rule

TOKENS = 300
ROOT = b"root" * 8
LETTERS = 3


class BlockFake(FakeSession):
    """A fake session whose blocks are its tokens, so that a wrong block changes the answer."""


class FakeBlocks:
    """`Blocks` of a `BlockFake`, which has one row."""

    def __init__(self, session: BlockFake) -> None:
        self._session = session

    def length(self, row: int) -> int:
        return self._session.length

    def rewind(self, row: int, length: int) -> None:
        self._session.rewind(length)

    def read(self, row: int, begin: int, end: int, block: NDArray[np.uint8]) -> None:
        block[:] = np.array(self._session.tokens[begin:end], np.int64).view(np.uint8)

    def append(self, row: int, block: NDArray[np.uint8], positions: int) -> None:
        assert block.nbytes == self.block_bytes(positions)
        self._session.tokens.extend(block.view(np.int64).tolist())

    def block_bytes(self, positions: int) -> int:
        return 8 * positions


def fake_sequencer(memory_bytes: int, folder: Path | None) -> tuple[Sequencer, BlockFake, PrefixCache]:
    session = BlockFake(LETTERS, rule(LETTERS))
    files = None if folder is None else BlockFiles(folder, 2**20)
    prefixes = PrefixCache(FakeBlocks(session), ROOT, BlockMemory(memory_bytes), files)
    return Sequencer(session, prefixes=prefixes), session, prefixes


def answer(sequencer: Sequencer, prompt: Sequence[int], max_tokens: int) -> list[int]:
    return list(sequencer.greedy(prompt, max_tokens, ()))


def ids_of(bundle: Path, count: int = TOKENS) -> list[int]:
    return Tokenizer(bundle / "tokenizer.json").encode(TEXT)[:count]


def opened(bundle: Path, folder: Path | None = None) -> tuple[Sequencer, OrtSession]:
    """A fresh session of a bundle with its prefix cache."""
    described = Bundle.open(bundle)
    session = OrtSession(bundle / "model.onnx", described.manifest.model, 1)
    wanted = PrefixCacheSettings(disk=folder is not None, folder=folder)
    prefixes = open_prefix_cache(wanted, described, session)
    assert prefixes is not None
    return Sequencer(session, prefixes=prefixes), session


def logits_of(sequencer: Sequencer, prompt: Sequence[int]) -> NDArray[np.float32]:
    class Recorder:
        def choose(self, logits: NDArray[np.float32]) -> int:
            found.append(logits.copy())
            return 0

    found: list[NDArray[np.float32]] = []
    list(sequencer.tokens(Row(prompt, 1, Recorder())))
    return found[0]


def same_bits(got: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    return bool((got.view(np.int32) == expected.view(np.int32)).all())


# ---- keys


texts = st.lists(st.integers(0, 1), max_size=4 * BLOCK_TOKENS)


@given(texts, texts)
def test_texts_share_as_many_keys_as_blocks(first: list[int], second: list[int]) -> None:
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    one, other = block_keys(ROOT, first), block_keys(ROOT, second)
    assert len(one) == len(first) // BLOCK_TOKENS
    assert all(len(key) == 32 for key in one)
    blocks = min(common // BLOCK_TOKENS, len(one), len(other))
    assert one[:blocks] == other[:blocks]
    assert not set(one[blocks:]) & set(other[blocks:])


def test_everything_that_affects_the_bits_is_in_the_key(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    other_files = replace(manifest, files={**manifest.files, "model.onnx": FileEntry(1, "sha256:0")})
    other_cache = replace(manifest, model=replace(manifest.model, kv=CacheType("float32", None)))
    roots = {root_key(manifest, "one"), root_key(manifest, "other"), root_key(other_files, "one")}
    roots |= {root_key(other_cache, "one")}
    assert len(roots) == 4
    assert root_key(Bundle.open(tiny_bundle).manifest, "one") in roots


# ---- memory


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6)), max_size=20))
def test_memory_keeps_its_budget_and_evicts_ends_before_beginnings(asked: list[tuple[int, int, int]]) -> None:
    """Texts form a tree: text n of length m shares its first n blocks with text 0."""
    block = np.zeros(100, np.uint8)
    memory = BlockMemory(4 * 400)
    chains = [[bytes([0 if depth < text else text, depth]) for depth in range(6)] for text in range(4)]
    for text, length, _ in asked:
        chain = chains[text][:length]
        memory.use(chain)
        for key in chain:
            if memory.get(key) is None and not memory.put(key, block, chain):
                break
        memory.use(chain)
        memory.check()
        held = [memory.get(key) is not None for key in chain]
        assert held == sorted(held, reverse=True) and sum(held) == min(length, 4)
        for other in chains:
            held = [memory.get(key) is not None for key in other]
            assert held == sorted(held, reverse=True), "a block is useless without the blocks before it"


# ---- answers


prompts = st.builds(
    lambda seed, shared, rest: [(seed * index) % LETTERS for index in range(shared)] + rest,
    st.integers(1, 2),
    st.integers(0, 5 * BLOCK_TOKENS),
    st.lists(st.integers(0, LETTERS - 1), min_size=1, max_size=BLOCK_TOKENS + 2),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.tuples(prompts, st.integers(1, 20), st.booleans()), min_size=1, max_size=8),
    blocks=st.integers(0, 12),
    seed=st.integers(0, 100),
)
def test_no_answer_depends_on_the_cached_blocks(
    asked: list[tuple[list[int], int, bool]], blocks: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Memory holds a few blocks and is emptied before random requests; files disappear."""
    random = Random(seed)  # noqa: S311, not for cryptography
    folder = tmp_path_factory.mktemp("blocks")
    sequencer, session, prefixes = fake_sequencer(blocks * 500, folder)
    for prompt, max_tokens, restart in asked:
        expected = list(Sequencer(FakeSession(LETTERS, rule(LETTERS))).greedy(prompt, max_tokens, ()))
        assert answer(sequencer, prompt, max_tokens) == expected
        assert session.tokens == [*prompt, *expected[:-1]]
        if restart:
            prefixes.close()
        for path in sorted(folder.glob("*/*.kv")):
            if random.random() < 0.1:
                path.unlink()


def test_only_new_tokens_run() -> None:
    sequencer, session, _ = fake_sequencer(2**20, None)
    first, other = [0, 1, 2] * 20, [2, 1, 0] * 20
    answer(sequencer, first, 30)
    answer(sequencer, other, 1)
    session.steps.clear()
    assert sequencer.reuse([*first[:50], 2, 2, 2]) == 50 // BLOCK_TOKENS * BLOCK_TOKENS
    answer(sequencer, [*first[:50], 2, 2, 2], 1)
    assert session.steps == [[*first[48:50], 2, 2, 2]]


def test_a_conversation_goes_on_after_another_one() -> None:
    """Generated tokens are cached too."""
    sequencer, _, _ = fake_sequencer(2**20, None)
    said = [0, 1, 2] * 10
    said += answer(sequencer, said, 34)
    answer(sequencer, [1, 1, 1], 5)
    assert sequencer.reuse([*said, 1, 0]) == 48 == (len(said) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_the_sessions_own_cache_is_used_if_it_holds_more() -> None:
    sequencer, session, _ = fake_sequencer(2**20, None)
    prompt = [0, 1, 2] * 10
    answer(sequencer, prompt, 1)
    assert sequencer.reuse([*prompt, 1]) == 30
    assert session.tokens == prompt


def test_a_cancelled_answer_leaves_its_computed_prefix(tiny_bundle: Path) -> None:
    ids = ids_of(tiny_bundle)
    with load(tiny_bundle, threads=1, response_cache=False, prefix_cache=True) as engine:
        for chunk in engine.stream(token_ids=ids[:100], max_tokens=50, context_full="slide"):
            assert chunk.text
            break
        engine.generate(token_ids=ids[200:220], max_tokens=1)
        assert engine.generate(token_ids=ids[:100], max_tokens=1).stats.reused_tokens == 96


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 120), st.integers(1, 30)), min_size=2, max_size=7),
    blocks=st.integers(0, 20),
)
def test_logits_of_random_prompts_in_random_orders(
    asked: list[tuple[int, int, int]], blocks: int, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Requests to a real bundle, with memory for a few blocks. Prompts share prefixes; each has its own end."""
    described = Bundle.open(tiny_bundle)
    sequencer, session = opened(tiny_bundle)
    alone = OrtSession(tiny_bundle / "model.onnx", described.manifest.model, 1)
    files = BlockFiles(tmp_path_factory.mktemp("blocks"), 2**20)
    rows = session.capabilities.blocks
    assert rows is not None
    memory = BlockMemory(blocks * rows.block_bytes(BLOCK_TOKENS))
    sequencer = Sequencer(session, prefixes=PrefixCache(rows, ROOT, memory, files))
    ids = ids_of(tiny_bundle, 130)
    for beginning, shared, rest in asked:
        prompt = [beginning] * 16 + ids[:shared] + ids[-rest:]
        alone.rewind(0)
        assert same_bits(logits_of(sequencer, prompt), alone.step(prompt)[-1])
        memory.check()


@pytest.mark.parametrize("kv", ["int8", "float32"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_logits_are_those_of_a_cold_run(
    kv: str, on_disk: bool, export_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = export_tiny() if kv == "int8" else export_tiny(kv=kv)
    ids = ids_of(bundle)
    folder = tmp_path / "prefixes" if on_disk else None
    sequencer, session = opened(bundle, folder)
    logits_of(sequencer, ids)
    if on_disk:
        prefixes = sequencer._decoder._prefixes
        assert isinstance(prefixes, PrefixCache)
        prefixes.close()
        sequencer, session = opened(bundle, folder)
    for shared in (16, 17, 250, 290, 299):
        prompt = [*ids[:shared], *reversed(ids[:20])]
        logits_of(sequencer, ids[100:130])
        assert sequencer.reuse(prompt) == shared // BLOCK_TOKENS * BLOCK_TOKENS
        session.cache.check()
        got = logits_of(sequencer, prompt)
        cold = OrtSession(bundle / "model.onnx", Bundle.open(bundle).manifest.model, 1).step(prompt)[-1]
        assert same_bits(got, cold)


_LOGITS = """
import sys
import numpy as np
from pathlib import Path
from tests.test_prefix_cache import logits_of, opened
sequencer, session = opened(Path(sys.argv[1]), Path(sys.argv[2]))
ids = [int(word) for word in sys.argv[4:]]
print(sequencer.reuse(ids))
np.save(sys.argv[3], logits_of(sequencer, ids))
"""


def test_another_process_gets_the_same_logits(tiny_bundle: Path, tmp_path: Path) -> None:
    """No process closes its engine: files are complete when the process ends."""
    ids = ids_of(tiny_bundle)
    reused, logits = [], []
    for count in range(2):
        out = tmp_path / f"{count}.npy"
        words = [tiny_bundle, tmp_path / "prefixes", out, *ids]
        done = subprocess.run(
            [sys.executable, "-c", _LOGITS, *map(str, words)], capture_output=True, text=True, check=True
        )
        reused.append(int(done.stdout))
        logits.append(np.load(out))
    assert reused == [0, 288]
    assert same_bits(logits[0], logits[1])


# ---- engines


def test_engines_share_prefixes_unless_told_not_to(tiny_bundle: Path, edgelm_home: Path) -> None:
    ids = ids_of(tiny_bundle)

    def reused(**wanted: bool | PrefixCacheSettings) -> int:
        with load(tiny_bundle, threads=1, response_cache=False, **wanted) as engine:  # type: ignore[arg-type]
            return engine.generate(token_ids=ids, max_tokens=2).stats.reused_tokens

    assert reused(prefix_cache=False) == 0
    assert reused(prefix_cache=PrefixCacheSettings(disk=False)) == 0
    assert reused() == 0
    assert not edgelm_home.exists()
    assert reused(prefix_cache=True) == 0
    assert reused(prefix_cache=False) == 0
    assert reused(prefix_cache=True) == 288
    (path, *_) = (edgelm_home / "prefixes").glob("*/*.kv")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (edgelm_home / "prefixes").stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700


def test_other_arithmetic_finds_nothing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(tiny_bundle)
    for expected in (0, 288):
        with load(tiny_bundle, threads=1, response_cache=False, prefix_cache=True) as engine:
            assert engine.generate(token_ids=ids, max_tokens=1).stats.reused_tokens == expected
    monkeypatch.setattr(numerics, "of_machine", lambda: "another processor")
    with load(tiny_bundle, threads=1, response_cache=False, prefix_cache=True) as engine:
        assert engine.generate(token_ids=ids, max_tokens=1).stats.reused_tokens == 0


def test_a_bundle_that_is_replaced_while_loaded_mixes_up_nothing(
    export_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    old, new, place = export_tiny(), export_tiny(kv="float32"), tmp_path / "bundle"
    ids = ids_of(old)
    shutil.copytree(old, place)
    with load(place, threads=1, response_cache=False, prefix_cache=True) as engine:
        place.rename(tmp_path / "away")
        shutil.copytree(new, place)
        expected = engine.generate(token_ids=ids, max_tokens=20)
    with load(place, threads=1, response_cache=False, prefix_cache=True) as engine:
        assert engine.generate(token_ids=ids, max_tokens=20).stats.reused_tokens == 0
    with load(old, threads=1, response_cache=False, prefix_cache=True) as engine:
        again = engine.generate(token_ids=ids, max_tokens=20)
    assert again.stats.reused_tokens == 288 and again.token_ids == expected.token_ids


def test_nothing_is_kept_of_a_bundle_that_is_written_to_while_loaded(
    tiny_bundle: Path, tmp_path: Path, edgelm_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, place)
    ids = ids_of(tiny_bundle)
    with load(place, threads=1, response_cache=False, prefix_cache=True) as engine:
        engine.generate(token_ids=ids[:64], max_tokens=1)
        weights = place / "model.onnx.data"
        with weights.open("r+b") as file:
            file.write(weights.read_bytes()[:100])
        for begin in (0, 100):
            engine.generate(token_ids=ids[begin : begin + 100], max_tokens=1)
    assert len(list(edgelm_home.glob("prefixes/*/*.kv"))) == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "changed while its model is loaded" in warnings[0]


def test_a_forked_child_goes_on_alone(tmp_path: Path) -> None:
    sequencer, _, prefixes = fake_sequencer(2**20, tmp_path / "blocks")
    prompt = [0, 1, 2] * 20
    answer(sequencer, prompt, 1)
    child = os.fork()
    if child == 0:
        answer(sequencer, [2, 1, 0] * 20, 1)
        right = sequencer.reuse([*prompt, 1]) == 48
        prefixes.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    prefixes.close()
    assert len(list((tmp_path / "blocks").glob("*/*.kv"))) == 6


@pytest.mark.parametrize("scheme", ["int8-tensor", "fp32"])
def test_nothing_is_cached_if_cuts_change_bits(
    scheme: str, export_tiny: Callable[..., Path], edgelm_home: Path
) -> None:
    with load(export_tiny(scheme=scheme), threads=1, response_cache=False, prefix_cache=True) as engine:
        engine.generate("Once upon a time there was a cat", max_tokens=1)
    assert not edgelm_home.exists()


@pytest.mark.parametrize(
    "wanted",
    [
        {"memory_bytes": -1}, {"disk_bytes": 5}, {"memory_bytes": 1.5}, {"disk": 1}, {"folder": 3},
        {"disk_bytes": 2**63}, {"memory_bytes": 10**5000}, {"folder": 10**5000},
    ],
    ids=lambda wanted: next(iter(wanted)),
)  # fmt: skip
def test_impossible_settings_are_refused(wanted: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wanted))):
        PrefixCacheSettings(**wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("threads", value) for value in (0, -1, True, 1.5, "2", 2**40, 10**5000)),
        *(("provider", value) for value in ("tpu", 10**5000, ["cpu"], {})),
        ("response_cache", 10**5000),
        ("prefix_cache", 10**5000),
    ],
    ids=lambda value: f"{value!r:.20}" if isinstance(value, str) else type(value).__name__,
)
def test_load_refuses_arguments_by_name(tiny_bundle: Path, name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name):
        load(tiny_bundle, **{name: value})  # type: ignore[arg-type]


def test_load_refuses_other_types(tiny_bundle: Path) -> None:
    with pytest.raises(SettingsError, match="prefix_cache"):
        load(tiny_bundle, prefix_cache="yes")  # type: ignore[arg-type]


def test_commands(tiny_bundle: Path, edgelm_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: str) -> int:
        words = ["run", str(tiny_bundle), TEXT[:100], "--max-tokens", "2", "--json", "--no-response-cache", *more]
        assert main(words) == 0
        return int(json.loads(capsys.readouterr().out)["stats"]["reused_tokens"])

    def entries(action: str) -> int:
        assert main(["cache", action, "--json"]) == 0
        kinds = {row["kind"]: row for row in json.loads(capsys.readouterr().out)["caches"]}
        assert kinds["prefixes"]["max_bytes"] == 512 * 2**20
        return int(kinds["prefixes"]["entries"])

    assert run("--no-prefix-cache") == 0
    assert entries("stats") == 0
    assert [run(), run(), run("--no-prefix-cache")] == [0, 96, 0]
    assert entries("check") == entries("stats") == 6
    assert entries("clear") == 0
    assert run() == 0


def test_a_program_that_ends_in_the_middle_of_an_answer_ends(tiny_bundle: Path) -> None:
    """The stream is closed during interpreter shutdown and has a prefix to store, but no thread can start any more."""
    code = f"""
        from edgelm.runtime import load
        engine = load({str(tiny_bundle)!r}, response_cache=False, prefix_cache=True)
        stream = engine.stream(token_ids=list(range(40)), max_tokens=9, min_tokens=9)
        print(next(stream).token_ids)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stdout and not done.stderr


@pytest.mark.slow
def test_memory_stays_flat_over_many_requests(tiny_bundle: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "soak.py"
    command = [sys.executable, str(script), str(tiny_bundle), "--tokens", "60000", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
