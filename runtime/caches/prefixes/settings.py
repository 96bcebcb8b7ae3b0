"""What a user may say about the prefix cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from ...errors import SettingsError, shown
from ..amounts import check_amounts

DEFAULT_MEMORY_BYTES = 64 * 2**20
DEFAULT_DISK_BYTES = 512 * 2**20
LEAST_DISK_BYTES = 2**20


@dataclass(frozen=True)
class PrefixCacheSettings:
    """Settings of the prefix cache. `load(..., prefix_cache=True)` means these defaults, or what `edgelm cache budget`
    set.

    memory_bytes: budget in this process's memory; 0 for none. disk: keep them in files as well, across restarts and for
    all processes of this user. disk_bytes: budget of the files, 1 MiB or more. folder: where they are; None:
    EDGELM_HOME/prefixes. A token of a 135M-parameter Llama with INT8 cache takes 11.5 kB. Raises: SettingsError.
    """

    memory_bytes: int = DEFAULT_MEMORY_BYTES
    disk: bool = True
    disk_bytes: int = DEFAULT_DISK_BYTES
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        check_amounts(self, {"memory_bytes": 0, "disk_bytes": LEAST_DISK_BYTES})
        if not isinstance(self.disk, bool):
            raise SettingsError(f"disk must be True or False, found {shown(self.disk)}")
        if not isinstance(self.folder, (str, Path, NoneType)):
            raise SettingsError(f"folder must be a path or None, found {shown(self.folder)}")
