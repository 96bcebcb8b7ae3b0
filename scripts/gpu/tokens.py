"""Check the tokens of steps on the GPU.

    python scripts/gpu/tokens.py BUNDLE RESULTS [--provider cuda] [--prompt 100] [--tokens 200] [--capacity 0]

Compares greedy tokens of captured and ordinary steps with each other, and both with the CPU provider's logits for the
same text. Where they differ, `margin` is the lead of the CPU's first choice, in standard deviations of its logits: it
tells a near-tie from an error. --capacity: of the first buffers, so that they grow on the way.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from device import open_device, prompt, record
from numpy.typing import NDArray

from edgelm.runtime.bundle.folder import GRAPH_NAME
from edgelm.runtime.sessions import on_device as device_session
from edgelm.runtime.sessions.graph import load_graph
from edgelm.runtime.sessions.on_device import DeviceSession
from edgelm.runtime.sessions.providers import CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--note", default="")
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--capacity", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.capacity:
        device_session._FIRST_CAPACITY = arguments.capacity
    bundle, session = open_device(arguments.bundle, arguments.provider)
    ids = prompt(arguments.prompt, bundle.manifest.model.vocab_size)
    captures = session.captures
    captured = greedy(session, ids, arguments.tokens)
    session.captures = False
    plain = greedy(session, ids, arguments.tokens)
    here = logits(session, ids, captured)
    session.close()
    cpu = DeviceSession(load_graph(arguments.bundle / GRAPH_NAME, 16, [CPU]), False, bundle.manifest.model, "cpu")
    reference = logits(cpu, ids, captured)
    record(
        arguments.results,
        {
            "tokens": "/".join(arguments.bundle.parts[-2:]),
            "note": arguments.note,
            "captured": captures,
            "capacity": arguments.capacity,
            "captured_against_plain": parted(captured, plain, reference),
            "captured_against_cpu": differences(captured, reference),
            "pieces_against_cpu": differences([int(row.argmax()) for row in here], reference),
            "largest_logit_difference": float(np.abs(here - reference).max() / reference.std()),
        },
    )


def greedy(session: DeviceSession, ids: list[int], count: int) -> list[int]:
    """Decode greedily: a prompt, then one token a step."""
    session.rewind(0)
    tokens = [int(session.likeliest(ids)[0])]
    while len(tokens) < count:
        tokens.append(int(session.likeliest(tokens[-1:])[0]))
    return tokens


def logits(session: DeviceSession, ids: list[int], tokens: list[int]) -> NDArray[np.float32]:
    """(tokens, vocabulary): the logits that choose each token."""
    session.rewind(0)
    return np.array(session.step([*ids, *tokens[:-1]], len(tokens)))


def differences(tokens: list[int], reference: NDArray[np.float32]) -> list[Any]:
    """Positions and margins where the reference, on the same text, chooses another token."""
    rows = enumerate(zip(tokens, reference, strict=True))
    return [
        [place, float((row.max() - row[token]) / row.std())] for place, (token, row) in rows if row.argmax() != token
    ]


def parted(tokens: list[int], others: list[int], reference: NDArray[np.float32]) -> Any:
    """None for equal tokens; otherwise the first position where they differ, and the margin between the two tokens."""
    for place, (token, other) in enumerate(zip(tokens, others, strict=True)):
        if token != other:
            row = reference[place]
            return [place, float(abs(row[token] - row[other]) / row.std())]
    return None


if __name__ == "__main__":
    main()
