"""PyInstaller hook of programs that have edgelm's command line: its commands, and those of other distributions.

The exporter's commands are left out: they need torch. So is readline, which edits lines in `edgelm chat`: its licence
(GPL) would apply to the program. `pyinstaller --hidden-import readline` packs it.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from PyInstaller.utils.hooks import can_import_module, collect_submodules, copy_metadata

from edgelm.runtime.cli import COMMANDS_GROUP

hiddenimports = collect_submodules("edgelm.runtime.commands")
hiddenimports += [name for name in ("termios",) if can_import_module(name)]
datas = []
for entry in entry_points(group=COMMANDS_GROUP):
    if entry.dist is not None and entry.dist.name != "edgelm":
        hiddenimports.append(entry.module)
        datas += copy_metadata(entry.dist.name)
