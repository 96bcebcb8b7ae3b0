"""PyInstaller hook: leave out doctest. One function of numpy.testing imports it; it imports the debugger, which imports
readline, whose licence (GPL) would apply to the program."""

from __future__ import annotations

excludedimports = ["doctest"]
