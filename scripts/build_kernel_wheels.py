"""Build wheels of the compiled kernels for Linux, Windows and macOS on this machine, and edgelm's wheel with them.

    python scripts/build_kernel_wheels.py [--out DIR] [PLATFORM ...]

All tools come from PyPI into build/wheels: zig, which compiles for every platform, CMake, auditwheel. Each library is
checked: its imports, its exports, its target machine. Afterwards,
`pip install --find-links DIR edgelm` installs both on any of these platforms without a compiler.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.wheels.build import FOLDER, BuildError, build_all
from scripts.wheels.platforms import PLATFORMS


def main() -> int:
    """Parse, build, print the wheels' paths. Returns the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"of {', '.join(PLATFORMS)} (all)")
    parser.add_argument(
        "--out", type=Path, default=FOLDER / "dist", metavar="DIR", help="folder for them (%(default)s)"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.platforms) - set(PLATFORMS)
    if unknown:
        parser.error(f"there is no platform {', '.join(sorted(unknown))}")
    try:
        wheels = build_all(arguments.platforms or PLATFORMS, arguments.out)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(map(str, wheels)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
