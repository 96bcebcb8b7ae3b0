"""The sandbox of chat templates: jinja2's, with limits on what a template may compute.

jinja2 prevents access to Python's attributes and changes of the inputs, and refuses a `range` of more than 100,000
numbers. It does not prevent nested loops, recursive macros, large powers or repeated doubling of a text from taking
hours or all memory. So each rendering has a budget (`bounds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import update_wrapper
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

from .bounds import Budget, check_call, check_percent, size, written

# Limits for the size of a repeated text or list, and of products and powers of whole numbers.
_LONGEST = 1_000_000
_LARGEST_FACTOR = 10**12
_LARGEST_EXPONENT = 1_000
# Templates cannot use these names, since each contains a blank.
_BUDGET, _COUNTED, _CONCATENATED, _SLICED = "budget left", "counted turns", "concatenated texts", "slice of"


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """`ImmutableSandboxedEnvironment` whose templates raise SecurityError if they exceed the budget.

    Render with `budget()` among the variables.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_shown)
        del self.globals["lipsum"]  # it writes any number of paragraphs
        # Characters that the template itself writes in each macro, and at most in an iteration of a loop.
        self._in_macros: dict[str, int] = {}
        self._in_loops = 0

    def bound_filters(self) -> None:
        """Make filters count their results. Call it once, after all filters are added."""
        for name, function in list(self.filters.items()):
            self.filters[name] = _bounded_filter(name, function)
        self.filters[_COUNTED] = _counted
        self.filters[_CONCATENATED] = _concatenated
        self.filters[_SLICED] = _sliced

    def bounded(self, source: str) -> nodes.Template:
        """The syntax tree of a template, changed so that loops and texts are counted. Raises:
        jinja2.TemplateSyntaxError."""
        tree = self.parse(source)
        for macro in tree.find_all(nodes.Macro):
            self._in_macros[macro.name] = _static_text(macro)
        for loop in tree.find_all(nodes.For):
            static = _static_text(loop)
            self._in_loops = max(self._in_loops, static)
            loop.iter = _filtered(loop.iter, _COUNTED, [nodes.Const(static, lineno=loop.lineno)])
        bounded: nodes.Template = _Unseen().visit(tree)
        return bounded

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        left = _budget(context)
        left.step(self._in_macros.get(function.name or "", 0) if isinstance(function, Macro) else 0)
        if isinstance(function, LoopContext):  # a recursive loop, whose iterations are not counted otherwise
            for _ in range(size(args[0]) if args else 0):
                left.step(self._in_loops)
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            check_call(method.__name__, text, (*args, *kwargs.values()), left)
        result = super().call(context, function, *args, **kwargs)
        left.make(written(result) if isinstance(text, str) else size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and (_factor(left) > _LARGEST_FACTOR or _factor(right) > _LARGEST_EXPONENT):
            raise SecurityError("the template computes too large a power")
        if operator == "*" and _factor(left) * _factor(right) > (_LARGEST_FACTOR if numbers else _LONGEST):
            raise SecurityError("the template computes too large a product")
        if operator == "+":
            _budget(context).make(size(left) + size(right))
        elif operator == "*" and not numbers:
            _budget(context).make(_factor(left) * _factor(right))
        elif operator == "%":
            check_percent(left, right, _budget(context))
        return super().call_binop(context, operator, left, right)


def budget() -> dict[str, Budget]:
    """A new budget as a variable for one rendering."""
    return {_BUDGET: Budget()}


class _Unseen(NodeTransformer):
    """Turn `a ~ b` and `a[1:]`, which jinja2 hides from its sandbox, into filters."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802, jinja2 calls it
        """Called by jinja2."""
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _CONCATENATED, [])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        """Called by jinja2."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno)
        return _filtered(node.node, _SLICED, [part or none for part in (node.arg.start, node.arg.stop, node.arg.step)])


def _filtered(node: nodes.Node, name: str, arguments: list[nodes.Expr]) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, arguments, [], None, None, lineno=node.lineno)


def _static_text(node: nodes.Node) -> int:
    """Number of characters that the template itself writes in a loop or a macro."""
    return sum(len(data.data) for data in node.find_all(nodes.TemplateData))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that first checks the size of its result. It takes the context, so jinja2 does not call it at compile
    time."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        left = _budget(context)
        left.step()
        check_call(name, value, (*args, *kwargs.values()), left)
        first: dict[str, list[Any]] = {
            "context": [context],
            "eval_context": [context.eval_ctx],
            "environment": [context.environment],
        }
        result = function(*first.get(wanted, []), value, *args, **kwargs)
        left.make(size(result))
        return result

    return pass_context(update_wrapper(call, function))


@pass_context
def _counted(context: Context, items: Iterable[Any], static: int) -> Iterator[Any]:
    left = _budget(context)
    for item in items:
        left.step(static)
        yield item


@pass_context
def _concatenated(context: Context, texts: list[Any]) -> str:
    _budget(context).make(sum(map(written, texts)))
    return "".join(map(str, texts))


@pass_context
def _sliced(context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    found = value[start:stop:step]
    _budget(context).make(size(found))
    return found


@pass_context
def _shown(context: Context, value: Any) -> Any:
    """Count a value that is printed, in any buffer."""
    _budget(context).make(written(value))
    return value


def _budget(context: Context) -> Budget:
    return cast(Budget, context.resolve(_BUDGET))


def _factor(value: Any) -> int:
    return abs(value) if isinstance(value, int) else max(1, size(value))
