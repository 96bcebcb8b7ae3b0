"""The clock of the caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# Clocks differ a little between machines that share answers, and on one machine before and after it is set.
CLOCK_SLACK_S = 60.0


@dataclass(frozen=True)
class Clock:
    """The time for stores: `wall` in seconds since 1970, which may jump; `monotonic`, which never goes back."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
