"""Where chat templates run: jinja2's sandbox, with an end to what a template may compute.

jinja2 keeps a template from Python's attributes and from changing what it is given, and refuses a `range` of more than
100,000 numbers. It does not keep loops in loops, macros that call themselves twice, or large powers from running for
hours, so each rendering has a budget of loop turns and calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context

# A conversation of 10,000 messages, gone through five times, takes 50,000.
BUDGET = 500_000
# Of a repeated text or list, and of whole numbers that are multiplied or raised to a power.
_LONGEST = 1_000_000
_LARGEST_FACTOR = 10**12
_LARGEST_EXPONENT = 1_000
# No template can name it: a blank is in it.
_COUNTER = "steps left"


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """`ImmutableSandboxedEnvironment` whose templates raise SecurityError where they compute for too long.

    Render with `budget()` among the variables.
    """

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters[_COUNTER] = _counted

    def bounded(self, source: str) -> nodes.Template:
        """The syntax tree of a template, with its loops counted. Raises: jinja2.TemplateSyntaxError."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTER, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend(context)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and (_size(left) > _LARGEST_FACTOR or _size(right) > _LARGEST_EXPONENT):
            raise SecurityError("the template computes too large a power")
        if operator == "*" and _size(left) * _size(right) > (_LARGEST_FACTOR if numbers else _LONGEST):
            raise SecurityError("the template computes too large a product")
        return super().call_binop(context, operator, left, right)


def budget() -> dict[str, list[int]]:
    """The variable that counts down during one rendering."""
    return {_COUNTER: [BUDGET]}


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(context)
        yield item


def _spend(context: Context) -> None:
    left = context.resolve(_COUNTER)
    left[0] -= 1
    if left[0] < 0:
        raise SecurityError(f"the template loops for more than {BUDGET:,} turns")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, Sized) else 1
