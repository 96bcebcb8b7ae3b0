"""PyInstaller hook of every program that imports edgelm: modules imported by name, metadata, compiled kernels."""

from __future__ import annotations

from PyInstaller.utils.hooks import can_import_module, copy_metadata

from edgelm.runtime import _HOME

hiddenimports = ["onnxruntime", *(f"edgelm.runtime.{module}" for module in sorted({*_HOME.values()}))]
hiddenimports += [name for name in ("llguidance", "edgelm_kernels") if can_import_module(name)]
datas = copy_metadata("edgelm")
if "edgelm_kernels" in hiddenimports:
    from edgelm_kernels import library

    datas += [(str(file), "edgelm_kernels") for file in (library(), library().with_suffix(".sha256"))]
