"""The exporter's branch of the exception tree (the root and its rules: `edgelm.runtime.errors`).

EdgelmError
`- ExportError            an export failed
   |- SourceError             the model cannot be used: missing, not a causal model, pickled, remote code, ...
   |- RecipeError             a setting of the export is unknown or contradicts another
   |- OutputError             the result cannot be written, or the output exists
   |- TraceError              the model cannot be turned into a graph
   `- StageError              a stage failed with an unexpected error; names the stage and those before it
"""

from __future__ import annotations

from ..runtime.errors import EdgelmError

_EXPORTER = "torch.onnx"


class ExportError(EdgelmError):
    """An export failed."""


class SourceError(ExportError):
    """The source model cannot be used."""


class RecipeError(ExportError):
    """A setting of the export is unknown, or contradicts another one."""


class OutputError(ExportError):
    """The bundle cannot be written, or the output already exists."""


class TraceError(ExportError):
    """The model cannot be turned into a graph."""


class StageError(ExportError):
    """A stage failed with an unexpected error. The cause is chained; the message names the stages before."""


def reason_of(error: BaseException) -> str:
    """Type and first line of an error. torch.onnx wraps the real error in one with advice to its developers, so
    `__cause__` is unwrapped."""
    while type(error).__module__.startswith(_EXPORTER) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
