"""PyInstaller hook of programs that have edgelm's server: its page, and the modules that it imports by name."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_data_files

from edgelm.runtime.server import _HOME

hiddenimports = [f"edgelm.runtime.server.{module}" for module in sorted({*_HOME.values()})]
datas = collect_data_files("edgelm.runtime.server")
