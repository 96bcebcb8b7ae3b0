"""`EDGELM_HOME`: the folder of edgelm's caches, and folders in it that only their owner can read."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

from ..errors import CacheError

VARIABLE = "EDGELM_HOME"


def home() -> Path:
    """The absolute path of the folder, which need not exist.

    The environment variable EDGELM_HOME, or the platform's folder for caches: $XDG_CACHE_HOME/edgelm or
    ~/.cache/edgelm, on macOS ~/Library/Caches/edgelm, on Windows %LOCALAPPDATA%\\edgelm. Raises: CacheError, if the
    user has no home.
    """
    given = os.environ.get(VARIABLE)
    try:
        return Path(given).expanduser().absolute() if given else _platform_caches() / "edgelm"
    except (RuntimeError, OSError) as error:
        raise CacheError(f"no folder for caches was found ({error}): set {VARIABLE}") from error


def _platform_caches() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    # The XDG specification says to ignore relative paths.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def nearest_existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists and can be examined. Raises: OSError."""
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            path.stat()
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def own_folder(folder: Path) -> Path:
    """Check that a folder below `home()`, which need not exist, belongs to this user.

    Raises: CacheError, if it belongs to another user, or cannot be examined.
    """
    try:
        owner = folder.stat().st_uid
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise CacheError(
            f"{folder} cannot be used ({error.strerror}): check its permissions and the disk, or set {VARIABLE}"
        ) from error
    if hasattr(os, "geteuid") and owner != os.geteuid():
        raise CacheError(f"{folder} belongs to another user: delete it, or set {VARIABLE} to a folder of your own")
    return folder


def make_private_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each with mode 0700. Existing folders stay as they are.

    Raises: OSError.
    """
    if not folder.parent.exists():
        make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
