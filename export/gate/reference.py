"""The fp32 graph's answers to the judging texts and prompts, stored for the comparison with quantized graphs.

An answer is judged along the fp32 graph's own tokens: up to the first different token both graphs have read the same,
so the quantized graph's answer is known that far without generating it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.decoding.decoder import Decoder
from ...runtime.decoding.row import Greedy, Row
from ...runtime.decoding.sequence import Sequencer
from ...runtime.errors import EdgelmError, VerificationError
from ...runtime.evaluation.divergence import lead, log_softmax
from ...runtime.host import machine
from ...runtime.sessions.protocol import Session
from .judging import ANSWER_TOKENS, Judging

# Logits whose log probabilities are computed at once: 6 MB, which fit into the processor's cache.
_BLOCK_VALUES = 3 << 19


@dataclass(frozen=True)
class Passage:
    """Tokens that both graphs read, and fp32's predictions behind each from `begin` on except the last.

    path: log probabilities, float16 (n, vocab_size); choices: most likely tokens (n); leads: their lead in probability
    (n); losses: -log of the probability of the next token (n).
    """

    kind: str
    token_ids: list[int]
    begin: int
    path: Path
    choices: NDArray[np.int64]
    leads: NDArray[np.float64]
    losses: NDArray[np.float64]

    def log_probabilities(self, begin: int, end: int) -> NDArray[np.float32]:
        """fp32's log probabilities in these rows (end - begin, vocab_size)."""
        stored = np.load(self.path, mmap_mode="r")
        return log_softmax(np.asarray(stored[begin:end], np.float32))

    @property
    def targets(self) -> NDArray[np.int64]:
        """The next token at each position (n)."""
        return np.asarray(self.token_ids[self.begin + 1 :], np.int64)


@dataclass(frozen=True)
class Reference:
    """The fp32 graph's predictions on the texts, and its answers to the prompts (each prompt with its answer is a
    passage).

    vocab_size: size of each distribution.
    """

    texts: tuple[Passage, ...]
    answers: tuple[Passage, ...]
    vocab_size: int

    def unknown_kinds(self) -> tuple[str, ...]:
        """Kinds of text that the model cannot read: it finds them less likely than random tokens, as a model of English
        stories does with code. Empty if that is true of all kinds; then all judge."""
        kinds = tuple(dict.fromkeys(passage.kind for passage in self.texts))
        unknown = tuple(kind for kind in kinds if not self._mean_loss(kind) <= np.log(self.vocab_size))
        return () if unknown == kinds else unknown

    def _mean_loss(self, kind: str) -> float:
        return float(np.concatenate([passage.losses for passage in self.texts if passage.kind == kind]).mean())


def observe(session: Session, judging: Judging, context_length: int, folder: Path) -> Reference:
    """Run the texts and answer the prompts with the fp32 graph.

    The log probabilities are stored in the folder, 2 bytes each: 5,000 rows of a large vocabulary are as large as a
    model. float16 is exact to 2^-12 of a value; they are normalized again when they are read, and the divergences are
    off by less than a thousandth. Cost: one run of all tokens. Raises: VerificationError if the logits are not finite,
    SessionError.
    """
    texts = [
        _listen(session, kind, ids, 0, _make_file(folder / f"text-{index}.npy", len(ids) - 1, judging.vocab_size))
        for index, (kind, ids) in enumerate(judging.texts)
    ]
    answers = []
    for index, ((shown, prompt), tokens) in enumerate(
        zip(judging.prompts, _greedy_answers(session, judging, context_length), strict=True)
    ):
        path = _make_file(folder / f"answer-{index}.npy", len(tokens), judging.vocab_size)
        answers.append(_listen(session, shown, [*prompt, *tokens], len(prompt) - 1, path))
    return Reference(tuple(texts), tuple(answers), judging.vocab_size)


def _make_file(path: Path, rows: int, vocab_size: int) -> Path:
    """A file of this size. Raises: OSError, if the disk is full. If its pages were missing, writing to the mapped file
    would end the process with SIGBUS."""
    np.lib.format.open_memmap(path, "w+", np.float16, (rows, vocab_size)).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return path


def write_answers(
    reference: Reference, differs_at: Sequence[int | None], session: Session, stop_ids: Sequence[int], most: int
) -> list[list[int]]:
    """The quantized graph's own greedy answers to the first `most` prompts, in tokens. An answer that equals fp32's is
    not computed again."""
    sequencer = Sequencer(session)
    session.rewind(0)
    answers = []
    for passage, differs in zip(reference.answers[:most], differs_at, strict=False):
        answer = passage.token_ids[passage.begin + 1 :]
        if differs is not None:
            known = passage.token_ids[: passage.begin + 1 + differs]
            answer = answer[:differs] + list(sequencer.greedy(known, ANSWER_TOKENS - differs, stop_ids))
        answers.append(answer)
    return answers


def _greedy_answers(session: Session, judging: Judging, context_length: int) -> list[list[int]]:
    """The answers to all prompts, side by side where the session has rows for that, which reads the weights once."""
    lengths = [min(ANSWER_TOKENS, context_length - len(prompt)) for _, prompt in judging.prompts]
    prompts = [(prompt, length) for (_, prompt), length in zip(judging.prompts, lengths, strict=True)]
    if not prompts:
        return []
    session.rewind(0)
    rows = [Row(prompt, length, Greedy(), judging.stop_ids) for prompt, length in prompts]
    decoder, waiting = Decoder(session, max_rows=len(rows)), deque(rows)
    while waiting or decoder.rows:
        if waiting and decoder.has_place(len(waiting[0].known)):
            decoder.admit(waiting.popleft())
            continue
        for _, event in decoder.advance():
            if isinstance(event, EdgelmError):
                raise event
    return [row.known[len(row.token_ids) :] for row in rows]


def _listen(session: Session, kind: str, ids: list[int], begin: int, path: Path) -> Passage:
    """Run a passage with the fp32 graph and store its predictions in a file of the right size."""
    targets, probabilities = ids[begin + 1 :], np.load(path, mmap_mode="r+")

    def predictions(first: int, logits: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
        rows = slice(first, first + len(logits))
        if not np.isfinite(logits).all():
            token = begin + first + int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0]) + 1
            raise VerificationError(
                f"the fp32 graph's logits are not all finite numbers behind token {token} of {kind!r:.60}: the model's "
                "weights are damaged, or its activations are beyond float32: download it again"
            )
        expected = log_softmax(logits)
        probabilities[rows] = expected
        return logits.argmax(axis=1), lead(expected), losses_of(expected, targets[rows])

    return Passage(kind, ids, begin, path, *each_block(session, ids, begin, predictions))


def each_block(
    session: Session,
    token_ids: Sequence[int],
    begin: int,
    read: Callable[[int, NDArray[np.float32]], tuple[NDArray[Any], ...]],
) -> tuple[NDArray[Any], ...]:
    """Compute the logits behind each token from `begin` on except the last, and read them on all cores.

    read: takes the index of the first row of a block and the block's logits (rows, vocab_size), and returns arrays of
    one entry for each row. Returns: these arrays for all rows.
    """
    session.rewind(0)
    size, done = session.capabilities.piece_tokens, 0
    found: list[tuple[NDArray[Any], ...]] = []
    with ThreadPoolExecutor(machine.default_threads()) as pool:
        for start in range(0, len(token_ids) - 1, size):
            piece = token_ids[start : min(start + size, len(token_ids) - 1)]
            wanted = min(len(piece), max(0, start + len(piece) - begin))
            logits = session.step(piece, wanted)
            rows = max(1, _BLOCK_VALUES // logits.shape[1])
            blocks = range(0, wanted, rows)
            found += pool.map(read, [done + row for row in blocks], [logits[row : row + rows] for row in blocks])
            done += wanted
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def losses_of(
    log_probabilities: NDArray[np.float32], targets: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float64]:
    return -log_probabilities[np.arange(len(targets)), targets].astype(np.float64)
