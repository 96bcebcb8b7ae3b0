"""What the gate measures on a quantized graph: texts not used for calibration, and greedy answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.export.gate.judging import ANSWER_TOKENS, WINDOW, Judging, chat_questions, make_judging
from edgelm.export.gate.quality import QuantizedAgreement, faults, measure
from edgelm.export.gate.reference import Reference, observe, write_answers
from edgelm.export.gate.repair import Attempt, Candidate, judge
from edgelm.export.texts import built_in_texts, cut_text
from edgelm.runtime.bundle.manifest import Tokens
from edgelm.runtime.errors import VerificationError
from edgelm.runtime.evaluation.divergence import divergence, log_softmax
from edgelm.runtime.sessions.protocol import Capabilities
from edgelm.runtime.text.tokenizer import Tokenizer
from edgelm.targets import load_target

from .conftest import ROOT, byte_tokenizer, on_a_small_disk

GATE = load_target("x86-cpu").gate
VOCABULARY = 8
TOKENS = Tokens(256, (256,), None)


class Chain:
    """A model in which each token's successor depends only on that token: row t of a table holds its logits."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = table.astype(np.float32)
        self.length = 0
        self.steps = 0
        self.capabilities = Capabilities()

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        self.length += len(token_ids)
        self.steps += 1
        return self.table[list(token_ids)][len(token_ids) - keep :]

    def expect(self, positions: int) -> None:
        pass

    def can_rewind(self, length: int) -> bool:
        return 0 <= length <= self.length

    def rewind(self, length: int) -> None:
        self.length = length

    def close(self) -> None:
        pass


def ring(lead: float = 4.0) -> NDArray[np.float32]:
    """Each token is followed by the next one, the last by the first."""
    return np.float32(lead) * np.roll(np.eye(VOCABULARY, dtype=np.float32), 1, axis=1)


JUDGING = Judging(
    texts=(("prose", [0, 1, 2, 3, 4, 5]), ("code", [2, 2, 3, 4])),
    prompts=(("first", [0, 1]), ("second", [4])),
    stop_ids=(7,),
    vocab_size=VOCABULARY,
)


def observed(folder: Path, table: NDArray[np.float32] | None = None, judging: Judging = JUDGING) -> Reference:
    return observe(Chain(ring() if table is None else table), judging, 512, folder)


def test_texts_unknown_to_the_model_are_measured_but_do_not_judge(tmp_path: Path) -> None:
    judging = Judging((("prose", [0, 1, 2, 3]), ("noise", [0, 3, 1, 6, 2])), (), (), VOCABULARY)
    reference = observed(tmp_path, judging=judging)
    assert reference.unknown_kinds() == ("noise",)
    found = measure(reference, Chain(ring(3.0)), GATE)
    prose, noise = found.kinds
    assert (found.tokens, found.mean_kl, found.unknown_kinds) == (3, prose.mean_kl, ("noise",))
    assert noise.tokens == 4 and noise.perplexity_before > VOCABULARY
    alone = observed(tmp_path, judging=Judging((("noise", [0, 3, 1, 6, 2]),), (), (), VOCABULARY))
    assert alone.unknown_kinds() == (), "there is no other text to judge by"


# ---- the texts


def words(text: str) -> list[str]:
    return text.lower().split()


def test_judging_texts_are_not_calibrating_texts() -> None:
    """No calibrating text shares 8 consecutive words with a judging text or a question."""

    def runs(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return {tuple(found[begin : begin + 8]) for begin in range(len(found) - 7)}

    texts = built_in_texts()
    calibrating = runs(texts.calibrating)
    assert len(calibrating) > 500
    for kind, text in [*texts.judging, *(("question", question) for question in chat_questions())]:
        assert not calibrating & runs(text), kind


def test_texts_of_several_kinds_judge() -> None:
    kinds = dict(built_in_texts().judging)
    assert set(kinds) == {"code", "dialogue", "french", "prose"}
    # With SmolLM2's tokenizer, each has 1,126 to 1,299 tokens.
    assert all(len(text) > 3300 for text in kinds.values())
    questions = chat_questions()
    assert "What is the capital of France?" in questions
    assert len(set(questions)) == len(questions) >= 12


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("One.\n\nTwo.\n\nThree.\n\nFour.", "One.\n\nTwo.", "Three.\n\nFour."),
        ("A heading\n\n" + 30 * "a long line\n", "A heading\n\n" + "\n".join(15 * ["a long line"]), None),
        ("one line of six words only", "one line of", "six words only"),
    ],
    ids=["paragraphs", "lines", "words"],
)
def test_a_users_text_is_cut_in_two(text: str, first: str, second: str | None) -> None:
    texts = cut_text(text, "mine.txt")
    ((kind, judging),) = texts.judging
    assert kind == "text"
    assert words(texts.calibrating) + words(judging) == words(text)
    if second is not None:
        assert (texts.calibrating, judging) == (first, second)
    assert min(len(texts.calibrating), len(judging)) >= len(text) / 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    return Tokenizer(folder / "tokenizer.json"), folder


def test_windows_fit_the_context_and_are_bounded(tokenizer: tuple[Tokenizer, Path]) -> None:
    judging = make_judging(built_in_texts(), *tokenizer, TOKENS, context_length=200, vocab_size=VOCABULARY)
    assert len(judging.texts) == 12
    assert all(1 < len(ids) <= 200 for _, ids in judging.texts)
    long = make_judging(
        cut_text(200 * "many words, ", "x"), *tokenizer, TOKENS, context_length=4096, vocab_size=VOCABULARY
    )
    assert [len(ids) for _, ids in long.texts][:2] == [WINDOW, WINDOW]


def test_without_a_template_the_texts_beginnings_are_answered(tokenizer: tuple[Tokenizer, Path]) -> None:
    judging = make_judging(built_in_texts(), *tokenizer, TOKENS, context_length=512, vocab_size=VOCABULARY)
    assert len(judging.prompts) == 12
    for (shown, ids), (_, window) in zip(judging.prompts, judging.texts, strict=True):
        assert ids == window[: len(ids)]
        assert shown == tokenizer[0].decode(ids) != ""


def test_with_a_template_questions_are_answered(tokenizer: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("[{{ messages[0].content }}]", encoding="utf-8")
    judging = make_judging(built_in_texts(), tokenizer[0], tmp_path, TOKENS, context_length=512, vocab_size=VOCABULARY)
    assert [shown for shown, _ in judging.prompts] == chat_questions()
    assert tokenizer[0].decode(judging.prompts[0][1]) == "[What is the capital of France?]"
    short = make_judging(
        built_in_texts(), tokenizer[0], tmp_path, TOKENS, context_length=ANSWER_TOKENS + 60, vocab_size=VOCABULARY
    )
    assert 0 < len(short.prompts) < 12, "prompts that leave no room for an answer are skipped"


# ---- the figures


def test_the_figures_are_those_of_the_distributions(tmp_path: Path) -> None:
    changed = ring()
    changed[3, 0] = 3.0
    found = measure(observed(tmp_path), Chain(changed), GATE)
    expected = divergence(log_softmax(ring()[[3]]), log_softmax(changed[[3]]))[0]
    # Token 3 is one of the 5 prose tokens with a successor, and one of the 3 code tokens.
    assert found.tokens == 8
    assert found.mean_kl == pytest.approx(2 * expected / 8, rel=1e-3)
    by_kind = {kind.kind: kind for kind in found.kinds}
    assert by_kind["prose"].mean_kl == pytest.approx(expected / 5, rel=1e-3)
    assert by_kind["code"].mean_kl == pytest.approx(expected / 3, rel=1e-3)
    assert found.agreement_percent == 100
    mean = -log_softmax(changed)[[0, 1, 2, 3, 4, 2, 2, 3], [1, 2, 3, 4, 5, 2, 3, 4]].mean()
    assert found.perplexity_after == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.perplexity_increase_percent > 0
    assert [(item.begin, item.end, item.tokens) for item in found.positions] == [(0, 1, 2), (1, 16, 6)]


def test_storing_reference_logits_in_half_precision_does_not_change_figures(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    table = draw.normal(0, 3, (4096, 4096)).astype(np.float32)
    ids = draw.integers(4096, size=400).tolist()
    other = table + draw.normal(0, 0.05, table.shape).astype(np.float32)
    judging = Judging((("text", ids),), (), (), 4096)
    found = measure(observe(Chain(table), judging, 512, tmp_path), Chain(other), GATE)
    exact = divergence(log_softmax(table[ids[:-1]]), log_softmax(other[ids[:-1]]))
    assert exact.mean() == pytest.approx(0.00125, rel=0.1), "a hard case: as close as 8-bit weights"
    assert found.mean_kl == pytest.approx(exact.mean(), rel=2e-3)
    assert found.p99_kl == pytest.approx(np.quantile(exact, 0.99), rel=1e-2)
    same = measure(observe(Chain(table), judging, 512, tmp_path), Chain(table), GATE)
    assert abs(same.mean_kl) < 1e-6
    assert same.perplexity_increase_percent == 0


def test_answers_are_judged_along_fp32s_own(tmp_path: Path) -> None:
    changed = ring()
    changed[4] = np.roll(changed[4], 2)  # 4 is followed by 7
    reference = observed(tmp_path)
    assert [passage.token_ids for passage in reference.answers] == [[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]]
    found = measure(reference, Chain(changed), GATE).answers
    assert found is not None
    assert (found.prompts, found.tokens, found.equal, found.first_differs) == (2, 9, 0, 1)
    assert found.differs_at == (3, 0)
    assert found.decided_positions == 9
    assert found.decided_percent == pytest.approx(100 * 7 / 9)
    assert write_answers(reference, found.differs_at, Chain(changed), (7,), 8) == [[2, 3, 4, 7], [7]]


def test_an_equal_answer_is_not_computed_again(tmp_path: Path) -> None:
    reference = observed(tmp_path)
    session = Chain(ring())
    found = measure(reference, session, GATE).answers
    assert found is not None and found.equal == 2
    before = session.steps
    assert write_answers(reference, found.differs_at, session, (7,), 1) == [[2, 3, 4, 5, 6, 7]]
    assert session.steps == before


def good() -> QuantizedAgreement:
    return QuantizedAgreement(10.0, 10.0, 0.0, 0.1, 0.001, 0.01, 99.0, 100.0, 50, 100, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean_kl": 0.0061}, "0.0061 nats from fp32's"),
        ({"mean_kl": math.nan}, "nan nats"),
        ({"p99_kl": 0.2}, "at one token in 100 it is 0.2 nats"),
        ({"perplexity_increase_percent": 0.8}, "perplexity rises by 0.80 %"),
        ({"decided_percent": 96.0}, "the same at 96.00 % of the 50 positions"),
    ],
)
def test_each_limit_that_is_missed_is_named(change: dict[str, float], words: str) -> None:
    assert faults(good(), GATE) == []
    (fault,) = faults(dataclasses.replace(good(), **change), GATE)
    assert words in fault


def test_a_perplexity_rise_within_its_error_is_no_fault() -> None:
    near = dataclasses.replace(good(), perplexity_increase_percent=0.6)
    assert faults(near, GATE) == [], "0.6 % with a standard error of 0.1 % is not significant"
    assert faults(dataclasses.replace(near, perplexity_error_percent=0.04), GATE)


def test_answers_that_differ_where_fp32_is_decided_are_refused(tmp_path: Path) -> None:
    changed = ring()
    changed[6] = 0.9 * changed[6] + np.roll(changed[6], 1)  # the second choice narrowly becomes the first
    found = measure(observed(tmp_path), Chain(changed), GATE)
    wide = dataclasses.replace(GATE, mean_kl=9.0, p99_kl=9.0, perplexity_increase_percent=900.0)
    (fault,) = faults(found, wide)
    assert fault.startswith("along fp32's answers to 2 prompts it is the same at 77.78 % of the 9 clear positions")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_fp32_logits_are_refused_with_their_position(tmp_path: Path, value: float) -> None:
    broken = ring()
    broken[3, 5] = value
    with pytest.raises(VerificationError, match="not all finite numbers behind token 4 of 'prose'") as caught:
        observed(tmp_path, broken)
    assert "\n" not in str(caught.value)


# ---- the verdict


def candidate(tables: Sequence[NDArray[np.float32]], written: list[int], repaired: bool = False) -> Candidate:
    """Attempts that return these tables in order, and a reference that is the ring."""

    @contextmanager
    def opened(table: Callable[[], NDArray[np.float32]]) -> Iterator[Chain]:
        yield Chain(table())

    attempts = [
        Attempt(f"attempt {index}", lambda index=index: written.append(index), lambda names: opened(ring))
        for index in range(len(tables))
    ]
    return Candidate(
        reference=lambda: opened(ring),
        reference_bytes=1 << 40,
        quantized=lambda: opened(lambda: tables[written[-1]]),
        attempts=attempts,
        leave_out=(lambda names: None) if repaired else None,
        remedy="--scheme int8-weight",
        matrices=[],
    )


def test_the_first_attempt_that_passes_is_taken(tmp_path: Path) -> None:
    bad, right = ring(1.0), ring()
    written: list[int] = []
    verdict = judge(candidate([bad, right, bad], written), JUDGING, 512, GATE, tmp_path)
    assert written == [0, 1]
    assert verdict.attempt == "attempt 1"
    assert verdict.excluded == ()
    assert verdict.agreement.mean_kl < 1e-6


def test_if_no_attempt_passes_the_error_has_the_figures_of_each(tmp_path: Path) -> None:
    written: list[int] = []
    with pytest.raises(VerificationError) as caught:
        judge(candidate([ring(1.0), ring(2.0)], written), JUDGING, 512, GATE, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("nats from fp32's") == 2
    for words in ("attempt 0: ", "attempt 1: ", "(prose ", "use --scheme int8-weight"):
        assert words in message


# ---- a whole export


def test_the_report_has_the_figures_and_the_answers(tiny_bundle: Path) -> None:
    report = json.loads((tiny_bundle / "report.json").read_text(encoding="utf-8"))
    found = report["against_fp32"]
    assert [kind["kind"] for kind in found["kinds"]] == ["code", "dialogue", "french", "prose"]
    assert sum(kind["tokens"] for kind in found["kinds"]) == found["tokens"] > 4000
    assert 0 < found["mean_kl"] < found["p99_kl"]
    edges = [(item["begin"], item["end"]) for item in found["positions"]]
    assert edges[0][0] == 0 and all(left[1] == right[0] for left, right in itertools.pairwise(edges))
    assert found["answers"]["prompts"] == 12
    assert len(report["examples"]) == 8
    # Different tokens may give the same text (bytes that form no character), but equal tokens give equal text.
    for example, differs in zip(report["examples"], found["answers"]["differs_at"], strict=False):
        assert differs is not None or example["fp32"] == example["quantized"]
    assert any(example["fp32"] != example["quantized"] for example in report["examples"])


def test_the_texts_are_installed() -> None:
    folder = ROOT / "export" / "text"
    assert {path.stem for path in (folder / "judging").glob("*.txt")} == {kind for kind, _ in built_in_texts().judging}


ON_A_SMALL_DISK = """
import errno, subprocess, sys
from pathlib import Path
import numpy as np
from edgelm.export.gate.judging import Judging
from edgelm.export.gate.reference import observe
from tests.test_quality import Chain

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", sys.argv[1]], check=True)
judging = Judging((("text", list(range(400))),), (), (), 4096)
try:
    observe(Chain(np.zeros((4096, 4096), np.float32)), judging, 512, Path(sys.argv[1]))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_a_full_disk_is_an_error_and_does_not_end_the_process(tmp_path: Path) -> None:
    done = on_a_small_disk(ON_A_SMALL_DISK, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "ENOSPC"), done.stderr
