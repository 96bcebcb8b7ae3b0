"""The ways to trace a model, the better first. Which one a model goes is found by trial, not by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .trace import TracedModel, trace_model
from .trace_plain import trace_plain

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
