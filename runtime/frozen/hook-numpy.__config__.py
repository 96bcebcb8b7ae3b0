"""PyInstaller hook: numpy prints how it was built by PyYAML where that is installed, which is 3 MB."""

from __future__ import annotations

excludedimports = ["yaml"]
