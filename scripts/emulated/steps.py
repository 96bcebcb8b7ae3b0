"""Decode some tokens and read a prompt, with a mark before, between and after. For counting instructions.

python steps.py BUNDLE DECODED PROMPT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgelm.runtime import Bundle
from edgelm.runtime.session import open_session


def mark() -> None:
    """What counting.c looks for."""
    os.getsid(0)


if __name__ == "__main__":
    session = open_session(Bundle.open(Path(sys.argv[1])), threads=1)
    prompt = list(range(int(sys.argv[3])))
    # Steps of a size that was not run before are more work.
    session.step(prompt)
    session.step([0])
    mark()
    for token in range(int(sys.argv[2])):
        session.step([token])
    mark()
    session.rewind(0)
    session.step(prompt)
    mark()
