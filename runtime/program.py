"""The `edgelm` program. An interrupt while its modules are still imported ends it with one line, as later ones do."""

from __future__ import annotations

import sys


def main() -> int:
    """Import the command line and run it. Returns the exit status."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        print("edgelm: interrupted", file=sys.stderr)
        return 130
