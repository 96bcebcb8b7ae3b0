"""What a small board tells of itself: which one it is, and whether it computes more slowly than it could, and why.

Linux only, from files that anyone may read; elsewhere, and on boards that do not tell, nothing is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MODEL = Path("/proc/device-tree/model")
# Where the firmware of a Raspberry Pi tells what vcgencmd does, depending on the kernel.
_DEVICES, _FIRMWARE = Path("/sys/devices/platform"), ("soc*/soc*firmware", "soc*/soc*/soc*firmware", "soc*firmware")
_THERMAL = Path("/sys/class/thermal")
_UNDER_VOLTAGE, _CAPPED, _THROTTLED, _SOFT_LIMIT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_HOT = _CAPPED | _THROTTLED | _SOFT_LIMIT
# The same bits tell, further up, what happened since the start.
_SINCE_START = 16
_MILLI = 1000


def name() -> str | None:
    """The board's name as its device tree has it, as "Raspberry Pi 5 Model B Rev 1.0"."""
    return (_text(_MODEL) or "").strip("\0 \n") or None


def slowed() -> tuple[str, ...]:
    """Why the board is, or was since its start, slower than it could be, a sentence each; empty if nothing is known."""
    told = _told()
    if told is not None:
        return tuple(_of_firmware(told))
    cooled = any(_cools(device) for device in sorted(_THERMAL.glob("cooling_device*")))
    return (f"it is hot{_temperature()}, and the system slows it down: cool it",) if cooled else ()


def _of_firmware(told: int) -> Iterator[str]:
    now, before = told, told >> _SINCE_START
    if now & _UNDER_VOLTAGE:
        yield "its supply's voltage is too low, and it is slowed down: take the power supply that is made for it"
    elif before & _UNDER_VOLTAGE:
        yield "its supply's voltage was too low since it started: take the power supply that is made for it"
    if now & _HOT:
        yield f"it is hot{_temperature()}, and slowed down: cool it"
    elif before & _HOT:
        yield "it was slowed down since it started, since it was hot: cool it"


def _told() -> int | None:
    """What a Raspberry Pi's firmware tells of its voltage and temperature."""
    for pattern in _FIRMWARE:
        for folder in sorted(_DEVICES.glob(pattern)):
            try:
                return int(_text(folder / "get_throttled") or "", 16)
            except ValueError:
                continue
    return None


def _cools(device: Path) -> bool:
    """Whether a way to cool is used that slows processors down."""
    kind, state = _text(device / "type") or "", (_text(device / "cur_state") or "").strip()
    return "cpufreq" in kind and state.isdigit() and int(state) > 0


def _temperature() -> str:
    """The first thermal zone's, for a sentence; nothing if there is none."""
    told = (_text(_THERMAL / "thermal_zone0" / "temp") or "").strip()
    return f" ({int(told) / _MILLI:.0f} degrees Celsius)" if told.isdigit() else ""


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
