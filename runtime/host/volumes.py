"""Whether a folder is on a disk of this machine, or on a volume that other machines may change."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from .home import nearest_existing

# File systems of other machines, of a virtual machine's host, and of Windows under WSL. Locks or shared memory do not
# work there as on a local disk.
_REMOTE_TYPES = {
    *("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "afs", "ncpfs", "ceph", "webdav", "davfs"),
    *("fuse.davfs2", "fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.glusterfs"),
    *("drvfs", "vboxsf", "prl_fs", "vmhgfs", "fuse.vmhgfs-fuse"),
}
_SYNCED_VARIABLES = ("OneDrive", "OneDriveConsumer", "OneDriveCommercial")
_SYNCED_FOLDERS = ("Mobile Documents", "CloudStorage")  # of iCloud and others below a user's Library on macOS


def remote_volume(folder: Path) -> str | None:
    """A description of the volume, if a folder is not on a disk of this machine; else None. The folder need not exist.

    Cost: reading the list of mounts, below 1 ms. None also if the system has no such list.
    """
    if str(folder).startswith(("\\\\", "//")):
        return "a network drive"
    try:
        path = nearest_existing(folder).resolve()
        partitions = psutil.disk_partitions(all=True)
    except OSError:
        return None
    if _is_synced(path):
        return "a folder that is copied to other machines"
    around = [part for part in partitions if path.is_relative_to(part.mountpoint)]
    if not around:
        return None
    nearest = max(around, key=lambda part: len(part.mountpoint))
    options = nearest.opts.split(",")
    # Windows lists "remote" among the options. WSL 2 mounts Windows' disks by 9p, which other systems use for local
    # disks.
    if nearest.fstype in _REMOTE_TYPES or "remote" in options or (nearest.fstype == "9p" and "drvfs" in nearest.opts):
        return f"a network drive ({nearest.fstype})"
    return None


def _is_synced(path: Path) -> bool:
    roots = [Path(found) for name in _SYNCED_VARIABLES if (found := os.environ.get(name))]
    if sys.platform == "darwin":
        roots += [Path.home() / "Library" / name for name in _SYNCED_FOLDERS]
    return any(path.is_relative_to(root) for root in roots)
