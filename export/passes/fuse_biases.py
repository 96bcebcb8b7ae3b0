"""Move a bias that is added to a row-wise product into its call, where a kernel adds it while scaling the sums."""

from __future__ import annotations

import onnx_ir as ir

from .functions import BIASED, EDGELM, PRODUCTS, define
from .graph import Builder, GraphPass, is_weight, only_user, replace_value


class FuseBiases(GraphPass):
    """Case: Add of a product's result, which nothing else reads, and a constant vector, one value for each column ->
    the product's function with the prefix `Biased` (see `functions`). This includes the product for logits. Runs after
    `FuseIntoProducts`, which knows only products without a bias.
    """

    def apply(self, model: ir.Model) -> bool:
        modified = False
        for node in list(model.graph.all_nodes()):
            if node.domain == EDGELM and node.op_type in PRODUCTS and not node.op_type.startswith(BIASED):
                modified |= _fuse(model, node)
        return modified


def _fuse(model: ir.Model, product: ir.Node) -> bool:
    y = product.outputs[0]
    add = only_user(y)
    if add is None or add.op_type != "Add" or add.domain:
        return False
    bias = next((value for value in add.inputs if value is not y and is_weight(value, 1)), None)
    if bias is None or bias.const_value is None or bias.const_value.size != _columns(product):
        return False
    name = BIASED + product.op_type
    define(model, name)
    outputs = Builder(model, product, f"{product.name}.biased").node(
        name,
        [*product.inputs, bias],
        {key: attribute.value for key, attribute in product.attributes.items()},
        domain=EDGELM,
        outputs=len(product.outputs),
        like=add.outputs[0],
    )
    for old, new in zip([add.outputs[0], *product.outputs[1:]], outputs, strict=True):
        replace_value(old, new)
    return True


def _columns(product: ir.Node) -> int:
    scales = product.inputs[-1]
    assert scales is not None and scales.const_value is not None, "scales are initializers"
    return scales.const_value.size
