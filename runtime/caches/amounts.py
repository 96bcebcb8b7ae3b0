"""Limits of the budgets: whole numbers of bytes and entries that SQLite and file systems can count."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import SettingsError, shown

# The largest integer of SQLite and of file systems: this much means "no limit".
LARGEST_AMOUNT = 2**63 - 1


def check_amounts(settings: object, least: Mapping[str, int]) -> None:
    """Raise SettingsError unless each named attribute is a whole number from its least value to LARGEST_AMOUNT."""
    for name, lowest in least.items():
        value = getattr(settings, name)
        if type(value) is not int or not lowest <= value <= LARGEST_AMOUNT:
            raise SettingsError(
                f"{name} must be a whole number from {lowest:,} to {LARGEST_AMOUNT:,}, found {shown(value)}"
            )
