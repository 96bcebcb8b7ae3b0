"""A clock that stands still until a test moves it."""

from __future__ import annotations

from edgelm.runtime.host.clock import Clock


class FakeClock:
    """Pass `clock` to a store. `pass_time` advances wall and monotonic time, `jump` only wall time."""

    def __init__(self) -> None:
        self._wall, self._monotonic = 1_700_000_000.0, 50.0
        self.clock = Clock(self.wall, lambda: self._monotonic)

    def wall(self) -> float:
        return self._wall

    def pass_time(self, seconds: float) -> None:
        self._wall += seconds
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        self._wall += seconds
