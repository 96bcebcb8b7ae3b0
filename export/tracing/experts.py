"""Mixtures of experts in a form that can be traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# All experts of a token as batched matrix products, without a loop over the chosen experts.
_TRACEABLE = "batched_mm"


@contextlib.contextmanager
def traceable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's experts, if it has any, run as batched products. Restored afterwards."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation(_TRACEABLE)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
