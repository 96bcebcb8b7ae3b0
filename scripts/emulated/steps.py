"""Decode some tokens after a short prompt, read a long one, decode after it, with marks before, between and after.

python steps.py BUNDLE DECODED SHORT LONG
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgelm.runtime import Bundle
from edgelm.runtime.sessions.loading import open_session


def mark() -> None:
    """The system call that counting.c watches for."""
    os.getsid(0)


if __name__ == "__main__":
    session = open_session(Bundle.open(Path(sys.argv[1])), threads=1)
    tokens = range(int(sys.argv[2]))
    short, long = (list(range(int(count))) for count in sys.argv[3:])
    session.step(short)
    # The first one-token step prepares more than later ones.
    session.step([0])
    mark()
    for token in tokens:
        session.step([token])
    mark()
    session.rewind(0)
    session.step(long)
    mark()
    for token in tokens:
        session.step([token])
    mark()
