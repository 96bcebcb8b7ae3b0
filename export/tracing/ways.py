"""The ways to trace a model, the best first. They are tried in order; no architecture is known by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import TraceError
from .attention import TracedModel, trace_model
from .plain import trace_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TracePath = tuple[str, Callable[["PreTrainedModel"], TracedModel]]

FUSED = "fused attention"
PLAIN = "plain attention"
STEPWISE = "plain attention, token by token"

PATHS: tuple[TracePath, ...] = (
    (FUSED, trace_model),
    (PLAIN, trace_plain),
    (STEPWISE, partial(trace_plain, step_tokens=1)),
)


def refused(what: str, refusals: Sequence[str]) -> TraceError:
    """The error for a model that cannot be traced in any way. what: such as "MODEL cannot be traced"; refusals: "way:
    reason"; ways with the same reason are named together."""
    paths: dict[str, list[str]] = {}
    for refusal in refusals:
        path, _, reason = refusal.partition(": ")
        paths.setdefault(reason, []).append(path)
    reasons = ". ".join(f"{' / '.join(names)}: {reason}" for reason, names in paths.items())
    return TraceError(
        f"{what}. {reasons}. docs/models.md lists the types that can be; --debug shows all that was raised"
    )
