"""Run a bundle on the current machine and write down the results. Needs only the runtime's packages.

    python device.py BUNDLE TEXTS OUT [--generate N] [--saturate]

TEXTS is JSON: lists of token ids, each within the context. OUT is an .npz with `logits` (positions, vocabulary)
float32, which predict each text's tokens except the first; `targets`, the tokens they predict; and `tokens`, the greedy
answer to the first text's first ten tokens. The rest is printed as a line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelm.runtime import Bundle
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.host import machine
from edgelm.runtime.sessions import numerics
from edgelm.runtime.sessions.loading import open_session
from edgelm.runtime.sessions.protocol import Session

_PROMPT_TOKENS = 10
# Ways to cut the first text: token by token at its beginning, and pieces of different sizes.
_CUTS = ([1] * 24, [2, 1, 5, 17, 1, 40])


def main() -> None:
    """Parse, compute, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--generate", type=int, default=24, help="tokens of the greedy answer (%(default)s)")
    parser.add_argument("--saturate", action="store_true", help="act as if no processor saturated, to see the effect")
    arguments = parser.parse_args()
    if arguments.saturate:
        machine.saturates_int8 = lambda: False
    texts = json.loads(arguments.texts.read_text(encoding="utf-8"))
    session = open_session(Bundle.open(arguments.bundle), threads=1)
    logits = np.concatenate([whole(session, text) for text in texts])
    session.rewind(0)
    tokens = list(Sequencer(session).greedy(texts[0][:_PROMPT_TOKENS], arguments.generate, ()))
    targets = np.concatenate([np.asarray(text[1:], np.int64) for text in texts])
    np.savez(arguments.out, logits=logits, targets=targets, tokens=np.asarray(tokens, np.int64))
    told = {
        "machine": numerics.of_machine(),
        "saturates": machine.saturates_int8(),
        "digest": hashlib.sha256(logits.tobytes()).hexdigest(),
        "exact": all(same_bits(session, texts[0], logits[: len(texts[0]) - 1], cuts) for cuts in _CUTS),
    }
    print(json.dumps(told))


def whole(session: Session, text: Sequence[int]) -> NDArray[np.float32]:
    """The logits at all positions of a text except the last, fed at once."""
    session.rewind(0)
    return session.step(text[:-1], len(text) - 1).copy()


def same_bits(session: Session, text: Sequence[int], expected: NDArray[np.float32], cuts: Sequence[int]) -> bool:
    """Whether a text cut into pieces of these sizes gives the same logits, bit for bit, as fed at once.

    If all pieces are of one token, only as many are fed as given. Otherwise sizes repeat to the text's end.
    """
    session.rewind(0)
    begin = 0
    for size in cycle(cuts) if max(cuts) > 1 else cuts:
        piece = text[begin : min(begin + size, len(expected))]
        if not piece:
            break
        got = session.step(piece, len(piece))
        if got.tobytes() != expected[begin : begin + len(piece)].tobytes():
            return False
        begin += len(piece)
    return True


if __name__ == "__main__":
    main()
