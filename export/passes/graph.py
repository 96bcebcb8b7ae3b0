"""Shared by graph passes: the contract, and small queries and edits of onnx_ir values.

A pass is a `GraphPass`: one rule a file, its cases in the docstring of the class. Bodies of `If`, `Loop` and `Scan` are
visited too, since a matrix in one of them is read as often as any other. Initializers that a pass adds go into the main
graph, which is visible everywhere. `requires` and `ensures` raise if the graph is not what the pass needs or promises;
`call` returns whether it changed anything (onnx_ir's own pass contract, whose manager names the passes that ran before
a failure).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
ATTENTION = "GroupQueryAttention"
KEPT_ATTENTION = "KeptGroupQueryAttention"


class GraphPass(ir.passes.InPlacePass):
    """A pass that edits the model in place by `apply`, and then removes what is unused."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = self.apply(model)
        if modified:
            remove_unused(model)
        return ir.passes.PassResult(model, modified)

    def apply(self, model: ir.Model) -> bool:
        """Edit the graph; True if anything changed."""
        raise TypeError(f"{type(self).__name__} defines no apply")


def remove_unused(model: ir.Model) -> None:
    """Remove unused nodes, initializers and functions. All inputs of the graph stay."""
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


def nodes_of(model: ir.Model, op_type: str, domain: str | None = None) -> Iterator[ir.Node]:
    """The nodes of one operator, in order; nodes in bodies of other nodes come last. The graph may be edited while
    iterating."""
    for node in list(model.graph.all_nodes()):
        if node.op_type == op_type and (domain is None or node.domain == domain) and node.graph is not None:
            yield node


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if its operator is one of these (any, if none is named)."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not op_types or node.op_type in op_types) else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The only node that uses a value; None if there are several, or the value is an output of the graph."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer, None for other values. Reads the data."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def scalar(value: ir.Value | None) -> float | None:
    """The number of an initializer with one element, None for other values."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])


def is_weight(value: ir.Value | None, rank: int) -> bool:
    """Whether a value is an initializer of this rank."""
    return value is not None and value.const_value is not None and len(value.const_value.shape) == rank


def same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether two values are known to have the same shape, dimension by dimension, so that no broadcast is needed."""
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    known = all(isinstance(size, int) or size.value is not None for size in first.shape)
    return known and first.shape == second.shape


def add_weight(model: ir.Model, name: str, tensor: ir.TensorProtocol | NDArray[Any]) -> ir.Value:
    """Register an initializer. If its name is taken, it gets a number."""
    if isinstance(tensor, np.ndarray):
        tensor = ir.tensor(tensor, name=name)
    unique, count = name, 0
    while unique in model.graph.initializers:
        count += 1
        unique = f"{name}.{count}"
    value = ir.Value(
        name=unique,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(cast("Sequence[int]", tensor.shape)),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def lazy_weight(
    model: ir.Model, name: str, compute: Callable[[], NDArray[Any]], dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """Register an initializer that is computed when the file is written, and then dropped: large weights are in memory
    one at a time."""
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(compute())), dtype=dtype, shape=ir.Shape(shape), name=name
    )
    return add_weight(model, name, tensor)


class Builder:
    """Makes nodes and inserts them in front of an anchor node, with types and shapes if given."""

    def __init__(self, model: ir.Model, anchor: ir.Node, prefix: str) -> None:
        self._graph = anchor.graph or model.graph
        self._anchor = anchor
        self._prefix = prefix
        self._count = 0

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        like: ir.Value | None = None,
    ) -> list[ir.Value]:
        """Insert a node. like: the value whose type and shape its first output gets."""
        names = [f"{self._prefix}.{op_type}.{self._count}.{index}" for index in range(outputs)]
        self._count += 1
        node = ir.node(
            op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs, version=1 if domain else None
        )
        node.name = names[0]
        for value, name in zip(node.outputs, names, strict=True):
            value.name = name
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self._graph.insert_before(self._anchor, node)
        return list(node.outputs)

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", like: ir.Value | None = None, **attributes: Any
    ) -> ir.Value:
        """Insert a node with one output and return that output."""
        return self.node(op_type, inputs, attributes, domain=domain, like=like)[0]


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new` everywhere, including the graph's outputs. `new` gets its type, shape and, for an output
    of the graph, its name; if `new` is itself an input or output, a copy does, since a value has one name."""
    new.type, new.shape = new.type or old.type, new.shape or old.shape
    if old.is_graph_output() and (new.is_graph_input() or new.is_graph_output()):
        new = _copied(new, behind=old)
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _copied(value: ir.Value, *, behind: ir.Value) -> ir.Value:
    """An Identity of a value, behind the node that computes another one."""
    node = behind.producer()
    assert node is not None and node.graph is not None
    copy = ir.Node("", "Identity", [value], name=f"{behind.name}.copy")
    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
    node.graph.insert_after(node, copy)
    return copy.outputs[0]


def use_domain(model: ir.Model, domain: str, version: int = 1) -> None:
    """Declare an operator set."""
    model.graph.opset_imports.setdefault(domain, version)
