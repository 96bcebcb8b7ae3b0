"""edgelm.targets: settings for each kind of machine, as data. `load_target("x86-cpu")` or the path of your own file."""

from __future__ import annotations

from .profile import Gate, Limits, Profile, TargetError, available_targets, load_target, native_target
from .reasons import Setting, settings_of

__all__ = [
    "Gate",
    "Limits",
    "Profile",
    "Setting",
    "TargetError",
    "available_targets",
    "load_target",
    "native_target",
    "settings_of",
]
