"""Compute logits for the last token of each row and no other: for runtimes that know no input `logits_to_keep`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import GraphPass
from .keep_last_logits import INPUT_NAME


class LastLogitsOnly(GraphPass):
    """Compute logits for the last token of each row and no other: for runtimes that know no input `logits_to_keep`.

    The input `logits_to_keep` becomes the constant 1, and the output `logits` gets the shape (batch, 1, vocabulary).
    `keep_last_logits` must have run; its operators stay, so that both graphs compute the same.
    """

    def requires(self, model: ir.Model) -> None:
        if INPUT_NAME not in [value.name for value in model.graph.inputs]:
            raise ir.passes.PreconditionError(f"the graph has no input {INPUT_NAME}")

    def apply(self, model: ir.Model) -> bool:
        (keep,) = (value for value in model.graph.inputs if value.name == INPUT_NAME)
        model.graph.inputs.remove(keep)
        keep.const_value = ir.tensor(np.array([1], np.int64), name=INPUT_NAME)
        model.graph.register_initializer(keep)
        logits = model.graph.outputs[0]
        assert logits.shape is not None, "keep_last_logits gives the output its shape"
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
        return True
