"""The exporter's branch of the exception tree (the root and its rules: `edgelm.runtime.errors`).

EdgelmError
`- ExportError            an export cannot go on
   |- SourceError             the model cannot be used: missing, not a causal model, pickled, remote code, ...
   |- RecipeError             a setting of the export is unknown or contradicts another
   |- OutputError             the result cannot be written, or is in the way
   |- TraceError              the model cannot be turned into a graph
   `- StageError              a stage failed in a way nobody foresaw; names the stage and those before it
"""

from __future__ import annotations

from ..runtime.errors import EdgelmError

_EXPORTER = "torch.onnx"


class ExportError(EdgelmError):
    """An export cannot go on."""


class SourceError(ExportError):
    """The source model cannot be used."""


class RecipeError(ExportError):
    """A setting of the export is unknown, or contradicts another one."""


class OutputError(ExportError):
    """The bundle cannot be written, or something stands in its place already."""


class TraceError(ExportError):
    """The model cannot be turned into a graph."""


class StageError(ExportError):
    """A stage failed in a way that nobody foresaw. The cause is chained; the message names the stages before."""


def reason_of(error: BaseException) -> str:
    """Type and first line of what went wrong. torch's exporter raises errors that begin with the step at which it
    failed and end in advice to its developers: what it failed of is their cause."""
    while type(error).__module__.startswith(_EXPORTER) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
