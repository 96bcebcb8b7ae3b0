"""`EDGELM_HOME/budgets.json`: the budgets of the caches that apply when a caller names none, kept between runs.

    {"version": 1, "responses": {"disk_bytes": 67108864}, "prefixes": {"memory_bytes": 0}}

It holds the fields of `ResponseCacheSettings` and `PrefixCacheSettings` that differ from edgelm's own defaults, except
folders and servers, which only a caller names. It is read strictly and written by one rename.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CacheCorruptError, CacheError, CacheVersionError, SettingsError
from ..host.files import UnfitFileError, read_text, replacing
from ..host.home import home, make_private_folder
from .prefixes.settings import PrefixCacheSettings
from .responses.settings import ResponseCacheSettings

FILE_NAME = "budgets.json"  # below EDGELM_HOME
_VERSION = 1
_MOST_BYTES = 1 << 20
_KEYS = {
    "responses": ("memory_bytes", "memory_entries", "disk", "disk_bytes", "disk_entries", "ttl_s", "policy"),
    "prefixes": ("memory_bytes", "disk", "disk_bytes"),
}
_warned: set[str] = set()

log = logging.getLogger(__name__)

S = TypeVar("S", ResponseCacheSettings, PrefixCacheSettings)


@dataclass(frozen=True)
class Budgets:
    """The default settings of both caches."""

    responses: ResponseCacheSettings = field(default_factory=ResponseCacheSettings)
    prefixes: PrefixCacheSettings = field(default_factory=PrefixCacheSettings)

    def values(self) -> dict[str, dict[str, Any]]:
        """All that the file can hold, as plain data."""
        return {part: {key: getattr(getattr(self, part), key) for key in keys} for part, keys in _KEYS.items()}


def read_budgets(folder: Path) -> Budgets:
    """The budgets in a folder's file, with edgelm's own defaults for fields, or a file, that are not there.

    Raises: CacheCorruptError, CacheVersionError; CacheError, if the system refuses.
    """
    path = folder / FILE_NAME
    try:
        data = json.loads(read_text(path, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return Budgets()
    except UnfitFileError as error:
        raise _damaged(path, str(error.strerror)) from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not valid JSON, {error}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int:
        raise _damaged(path, "it has no version")
    if version != _VERSION:
        raise CacheVersionError(f"{path} is of a newer edgelm (version {version}): use that one, or delete the file")
    for key in data.keys() - {"version", *_KEYS}:
        raise _damaged(path, f"unknown key {key}")
    return Budgets(
        _settings(ResponseCacheSettings, data, "responses", path),
        _settings(PrefixCacheSettings, data, "prefixes", path),
    )


def default_budgets() -> Budgets:
    """What `load` uses by default. A file that cannot be used is ignored, with one warning."""
    try:
        folder = home()
    except CacheError:  # there is no place for a file either; the caches themselves warn of that
        return Budgets()
    try:
        return read_budgets(folder)
    except CacheError as error:
        level = logging.DEBUG if str(error) in _warned else logging.WARNING
        _warned.add(str(error))
        log.log(level, "%s; the caches have their default budgets", error)
        return Budgets()


def write_budgets(folder: Path, budgets: Budgets) -> None:
    """Replace the file, with mode 0600. If two processes write at once, the last one wins.

    Raises: CacheError.
    """
    usual = Budgets().values()
    data: dict[str, Any] = {"version": _VERSION}
    for part, values in budgets.values().items():
        data[part] = {key: value for key, value in values.items() if value != usual[part][key]}
    path = folder / FILE_NAME
    try:
        make_private_folder(folder)
        with replacing(path) as file:
            file.write((json.dumps(data, indent=1) + "\n").encode())
    except OSError as error:
        raise CacheError(f"{path} cannot be written ({error.strerror}): check its folder and disk") from error


def _settings(cls: type[S], data: Mapping[str, Any], part: str, path: Path) -> S:
    values = data.get(part, {})
    if not isinstance(values, dict):
        raise _damaged(path, f"{part} is not an object")
    for key in values.keys() - set(_KEYS[part]):
        raise _damaged(path, f"unknown key {part}.{key}")
    try:
        return cls(**values)
    except SettingsError as error:
        raise _damaged(path, f"{part}: {error}") from error


def _damaged(path: Path, what: str) -> CacheCorruptError:
    return CacheCorruptError(f"{path} is not a file of budgets ({what}): correct it, or delete it for the defaults")
