"""Load a bundle, decode some tokens and read some prompts of 64 tokens; nothing else. For counting instructions.

python steps.py BUNDLE DECODED PROMPTS
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgelm.runtime import Bundle
from edgelm.runtime.session import open_session

if __name__ == "__main__":
    session = open_session(Bundle.open(Path(sys.argv[1])), threads=1)
    prompt = list(range(10, 74))
    session.step(prompt)
    for token in range(int(sys.argv[2])):
        session.step([token + 10])
    for _ in range(int(sys.argv[3])):
        session.rewind(0)
        session.step(prompt)
