"""The functions that a request declares, and which of them the answer may or must call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..http.errors import invalid, unsupported
from ..http.fields import Fields

Mode = Literal["auto", "required"]
_MAX_TOOLS = 128
# Keywords by which a schema allows undeclared properties.
_OPEN = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True)
class Tool:
    """One function. parameters: a JSON schema of an object; definition: as chat templates take it."""

    name: str
    parameters: dict[str, Any]
    definition: dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """The functions that the model may call. mode: "auto" (the model decides) or "required" (the answer consists of
    calls); callable: the functions that this answer may call; parallel: whether an answer may have several calls."""

    declared: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    mode: Mode
    parallel: bool


def tools_of(fields: Fields, *, flat: bool = False) -> Tools | None:
    """`tools`, `tool_choice` and `parallel_tool_calls`; None where nothing may be called. flat: as the endpoint
    `responses` writes them, without an inner object. Raises: ApiError."""
    items = fields.items("tools") or []
    if len(items) > _MAX_TOOLS:
        raise invalid(f"there are {len(items)} tools: give at most {_MAX_TOOLS}", "tools")
    declared = tuple(_tool(Fields(item, f"tools[{index}]"), flat) for index, item in enumerate(items))
    names = [tool.name for tool in declared]
    if len(set(names)) < len(names):
        raise invalid("two tools have one name: rename one", "tools")
    choice = fields.values.get("tool_choice")
    if not declared and choice not in (None, "none", "auto"):
        raise invalid("tool_choice asks for a call, and there are no tools: give some", "tool_choice")
    if not declared or choice == "none":
        return None
    parallel = fields.values.get("parallel_tool_calls")
    if parallel not in (None, True, False):
        fields.refuse_type("parallel_tool_calls", "true or false")
    return _chosen(fields, declared, parallel is not False)


def _chosen(fields: Fields, declared: tuple[Tool, ...], parallel: bool) -> Tools:
    choice = fields.values.get("tool_choice")
    if choice is None or choice == "auto":
        return Tools(declared, declared, "auto", parallel)
    if choice == "required":
        return Tools(declared, declared, "required", parallel)
    if isinstance(choice, str):
        raise invalid(f"tool_choice must be none, auto, required or an object, found {choice!r:.60}", "tool_choice")
    chosen = Fields(choice, "tool_choice")
    if chosen.text("type") == "allowed_tools":
        return _allowed(chosen.inner("allowed_tools") or chosen, declared, parallel)
    named = _named(chosen, declared)
    return Tools(declared, (named,), "required", False)


def _allowed(chosen: Fields, declared: Sequence[Tool], parallel: bool) -> Tools:
    mode = chosen.choice("mode", ("auto", "required")) or "auto"
    listed = [
        Fields(item, f"{chosen.name('tools')}[{index}]") for index, item in enumerate(chosen.items("tools") or [])
    ]
    if not listed:
        raise invalid(f"{chosen.name('tools')} is empty: name a tool", chosen.name("tools"))
    tools = tuple(_named(item, declared) for item in listed)
    return Tools(tuple(declared), tools, "required" if mode == "required" else "auto", parallel)


def _named(chosen: Fields, declared: Sequence[Tool]) -> Tool:
    if chosen.text("type") not in (None, "function"):
        raise unsupported(chosen.name("type"), "only functions can be called")
    name = (chosen.inner("function") or chosen).needed_text("name")
    found = next((tool for tool in declared if tool.name == name), None)
    if found is None:
        raise invalid(f"tool_choice names {name!r:.60}, which is none of the tools", chosen.path)
    return found


def _tool(item: Fields, flat: bool) -> Tool:
    kind = item.text("type")
    if kind != "function":
        raise unsupported(item.name("type"), f"there are tools of the type 'function' only, found {kind!r:.40}")
    function = item if flat else item.inner("function")
    if function is None:
        raise invalid(f"{item.name('function')} is missing: give its name and parameters", item.name("function"))
    name = function.needed_text("name")
    if not _NAME.fullmatch(name):
        raise invalid(
            f"{function.name('name')} must be 1 to 128 letters, digits, '_', '-' or '.'", function.name("name")
        )
    schema = function.inner("parameters")
    given = dict(schema.values) if schema is not None else {"type": "object", "properties": {}}
    about = {"description": text} if (text := function.text("description")) is not None else {}
    definition = {"type": "function", "function": {"name": name, **about, "parameters": given}}
    return Tool(name, _closed(given), definition)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of arguments that forbids undeclared ones, unless it allows them explicitly or is composed of others."""
    if "properties" not in schema or not schema.keys().isdisjoint(_OPEN):
        return schema
    return {**schema, "additionalProperties": False}
