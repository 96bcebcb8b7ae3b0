"""A layer over the file system that refuses what Windows refuses, for tests on Linux.

Open and mapped files are read from /proc, for this process and its children, so files of C libraries such as SQLite and
onnxruntime count. The rules of Windows, for files opened as Python and C open them (without FILE_SHARE_DELETE):

- a file that is open or mapped cannot be deleted, renamed, or replaced by a rename;
- a folder cannot be renamed while a file in it is open, and no folder can replace another;
- `rename` replaces nothing;
- names contain no <>:"|?*, do not end in a dot or blank, and are no device's (NUL, COM1), with any suffix;
- a path has fewer than 260 characters.

Not imitated: names that differ only by case, times, permissions, locks (fcntl's are used).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ACCESS_DENIED, SHARING_VIOLATION, ALREADY_EXISTS, INVALID_NAME, TOO_LONG = 5, 32, 183, 123, 206
MOST_LETTERS = 259
# A test's temporary folder on Linux and a user's folder on Windows, of some 30 characters, differ in length.
_USERS_LETTERS = 60
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads open files from /proc")


def refused(code: int, path: Any) -> OSError:
    """The error that Python raises on Windows."""
    kind, number = {
        ACCESS_DENIED: (PermissionError, errno.EACCES),
        SHARING_VIOLATION: (PermissionError, errno.EACCES),
        ALREADY_EXISTS: (FileExistsError, errno.EEXIST),
        INVALID_NAME: (OSError, errno.EINVAL),
        TOO_LONG: (FileNotFoundError, errno.ENOENT),
    }[code]
    error = kind(number, f"[WinError {code}]", str(path))
    error.winerror = code  # type: ignore[attr-defined]
    return error


def open_files() -> set[str]:
    """Paths of all files that this process and its children have open or mapped."""
    found: set[str] = set()
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        folder = Path("/proc") / str(process.pid)
        try:
            for link in (folder / "fd").iterdir():
                found.add(str(link.readlink()))
            lines = (folder / "maps").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        found |= {parts[5] for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return found


class WindowsFiles:
    """Puts the layer over `os` while installed. root: the folder with Windows' rules; other paths are unchanged."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self._root = os.path.realpath(root)
        self.refusals: list[str] = []
        originals = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove", "open", "mkdir")}
        patch.setattr(os, "replace", self._renaming(originals["replace"], over=True))
        patch.setattr(os, "rename", self._renaming(originals["rename"], over=False))
        for name in ("unlink", "remove"):
            patch.setattr(os, name, self._deleting(originals[name]))
        for name in ("open", "mkdir"):
            patch.setattr(os, name, self._naming(originals[name]))
        # rmtree with file descriptors, which Windows does not have, would bypass the layer.
        patch.setattr(shutil, "_use_fd_functions", False)

    def _holds(self, path: Any) -> bool:
        return not isinstance(path, int) and os.path.realpath(path).startswith(self._root + os.sep)

    def _refuse(self, code: int, path: Any) -> None:
        self.refusals.append(f"{code} {path}")
        raise refused(code, path)

    def _check_name(self, path: Any) -> None:
        inner = Path(os.path.realpath(path)).relative_to(self._root)
        # The first folder is pytest's folder for the test.
        for part in inner.parts[1:]:
            if _DEVICE.fullmatch(part) or _FORBIDDEN.search(part):
                self._refuse(INVALID_NAME, path)
        if _USERS_LETTERS + len(str(Path(*inner.parts[1:]))) > MOST_LETTERS:
            self._refuse(TOO_LONG, path)

    def _naming(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            if self._holds(path):
                self._check_name(path)
            return original(path, *arguments, **keywords)

        return call

    def _deleting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            if self._holds(path) and os.path.realpath(path) in open_files():
                self._refuse(SHARING_VIOLATION, path)
            return original(path, *arguments, **keywords)

        return call

    def _renaming(self, original: Callable[..., Any], *, over: bool) -> Callable[..., Any]:
        def call(source: Any, target: Any, **keywords: Any) -> Any:
            if self._holds(source) or self._holds(target):
                self._check_rename(source, target, over)
            return original(source, target, **keywords)

        return call

    def _check_rename(self, source: Any, target: Any, over: bool) -> None:
        self._check_name(target)
        opened, real = open_files(), os.path.realpath(source)
        if Path(real).is_dir():
            if any(name.startswith(real + os.sep) for name in opened):
                self._refuse(ACCESS_DENIED, source)
            if Path(target).exists():
                self._refuse(ACCESS_DENIED if over else ALREADY_EXISTS, target)
        elif real in opened:
            self._refuse(SHARING_VIOLATION, source)
        if Path(target).exists() and not over:
            self._refuse(ALREADY_EXISTS, target)
        if os.path.realpath(target) in opened:
            self._refuse(ACCESS_DENIED, target)


@pytest.fixture
def windows_files(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WindowsFiles]:
    """The layer over all temporary folders of the run, for one test."""
    yield WindowsFiles(monkeypatch, tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def everywhere(windows_files: WindowsFiles) -> None:
    """With `pytest -p tests.windows_files`, every test runs on the layer."""
