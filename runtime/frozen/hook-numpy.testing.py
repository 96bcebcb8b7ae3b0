"""PyInstaller hook: one function of numpy.testing imports doctest, which brings the debugger, and that readline, whose
licence (GPL) would be the program's."""

from __future__ import annotations

excludedimports = ["doctest"]
