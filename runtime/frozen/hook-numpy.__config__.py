"""PyInstaller hook: leave out PyYAML (3 MB), with which numpy prints how it was built."""

from __future__ import annotations

excludedimports = ["yaml"]
