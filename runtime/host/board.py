"""What a small board reports: its name, and whether and why it is slowed down.

Linux only, from files that anyone may read. Elsewhere, and on boards that report nothing, nothing is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MODEL = Path("/proc/device-tree/model")
# Where the firmware of a Raspberry Pi reports throttling (as vcgencmd does), depending on the kernel.
_DEVICES, _FIRMWARE = Path("/sys/devices/platform"), ("soc*/soc*firmware", "soc*/soc*/soc*firmware", "soc*firmware")
_THERMAL = Path("/sys/class/thermal")
_UNDER_VOLTAGE, _CAPPED, _THROTTLED, _SOFT_LIMIT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_HOT = _CAPPED | _THROTTLED | _SOFT_LIMIT
# The same bits, shifted by this, report what happened since the start.
_SINCE_START = 16
_MILLI = 1000


def name() -> str | None:
    """The board's name in its device tree, such as "Raspberry Pi 5 Model B Rev 1.0"."""
    return (_text(_MODEL) or "").strip("\0 \n") or None


def slowed() -> tuple[str, ...]:
    """Reasons why the board is slowed down, or was since its start, a sentence each; empty if none is known."""
    told = _told()
    if told is not None:
        return tuple(_of_firmware(told))
    cooled = any(_cools(device) for device in sorted(_THERMAL.glob("cooling_device*")))
    return (f"it is hot{_temperature()}, and the system slows it down: cool it",) if cooled else ()


def _of_firmware(told: int) -> Iterator[str]:
    now, before = told, told >> _SINCE_START
    if now & _UNDER_VOLTAGE:
        yield "its supply voltage is too low, and it is slowed down: use the power supply that is made for it"
    elif before & _UNDER_VOLTAGE:
        yield "its supply voltage was too low since it started: use the power supply that is made for it"
    if now & _HOT:
        yield f"it is hot{_temperature()}, and slowed down: cool it"
    elif before & _HOT:
        yield "it was slowed down since it started, because it was hot: cool it"


def _told() -> int | None:
    """The throttling bits of a Raspberry Pi's firmware, None if there are none."""
    for pattern in _FIRMWARE:
        for folder in sorted(_DEVICES.glob(pattern)):
            try:
                return int(_text(folder / "get_throttled") or "", 16)
            except ValueError:
                continue
    return None


def _cools(device: Path) -> bool:
    """Whether a cooling device that slows the processor down is active."""
    kind, state = _text(device / "type") or "", (_text(device / "cur_state") or "").strip()
    return "cpufreq" in kind and state.isdigit() and int(state) > 0


def _temperature() -> str:
    """The temperature of the first thermal zone, for a sentence; empty if there is none."""
    told = (_text(_THERMAL / "thermal_zone0" / "temp") or "").strip()
    return f" ({int(told) / _MILLI:.0f} degrees Celsius)" if told.isdigit() else ""


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
