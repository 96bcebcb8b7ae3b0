"""The time, as caches read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# Clocks of machines that share answers, and of one machine before and after it asked for the time, differ a little.
CLOCK_SLACK_S = 60.0


@dataclass(frozen=True)
class Clock:
    """Where stores read the time: `wall` in seconds since 1970, which may jump; `monotonic`, which never goes back."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
