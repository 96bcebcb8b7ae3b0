"""Grammars (llguidance's Lark) of answers with calls: names that were declared, arguments that follow their schemas.

If the model decides whether to call, text is free up to the marker that begins a call; from there on the call must
follow its schema. A marker that is one special token is written as its id, since text never contains special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ...decoding.grammar import few_blanks
from .declared import Tool, Tools
from .formats import CallFormat

# "may": the answer may begin with a thought; "begun": the prompt ends inside one.
Thinking = Literal["no", "may", "begun"]
SpecialId = Callable[[str], int | None]
_TERMINALS = ("TEXT: /(.|\\n)*/", "GAP: /[ \\n]{0,2}/")
# A whole answer that is not a call, for formats whose calls need no marker.
_PLAIN = 'PLAIN: /([^{]|\\{[^"]|\\{"[^n])(.|\\n)*/'
_DEFINITIONS = ("$defs", "definitions")


def call_grammar(tools: Tools, form: CallFormat, special_id: SpecialId, thinking: Thinking = "no") -> str:
    """The grammar of an answer. special_id: the id of a text that is one special token, else None."""
    rules = [*_TERMINALS, *_call_rules(tools, form)]
    begin, end = _literal(form.begin, special_id), _literal(form.end, special_id) if form.end else ""
    body = '"[" GAP call (GAP "," GAP call)* GAP "]"' if form.layout == "list" else "call"
    if form.layout == "list" and not tools.parallel:
        body = '"[" GAP call GAP "]"'
    rules.append(f"unit: GAP {body} GAP {end}" if end else f"unit: GAP {body}")
    rules += (
        _required(tools, form, begin, special_id, thinking)
        if tools.mode == "required"
        else _free(tools, form, begin, special_id)
    )
    return "\n".join(["%llguidance {}", *rules, ""])


def _required(tools: Tools, form: CallFormat, begin: str, special_id: SpecialId, thinking: Thinking) -> list[str]:
    first = f"({begin})? unit" if form.optional else f"{begin} unit"
    more = '(GAP ";" GAP unit)*' if form.optional else f"(GAP {begin} unit)*"
    calls = f"{first} {more}" if tools.parallel and form.layout != "list" else first
    if thinking == "no":
        return [f"start: {calls}"]
    opened = "" if thinking == "begun" else f"{_literal('<think>', special_id)} "
    thought = [*_up_to("thought_end", _literal("</think>", special_id)), f"thought: {opened}thought_end GAP"]
    return [f"start: thought{'?' if thinking == 'may' else ''} {calls}", *thought]


def _free(tools: Tools, form: CallFormat, begin: str, special_id: SpecialId) -> list[str]:
    if form.optional:
        more = '(GAP ";" GAP unit)*' if tools.parallel else ""
        return [f"start: ({begin})? unit {more} | PLAIN?", _PLAIN]
    several = tools.parallel and form.layout != "list"
    start = "(up_to_call unit)* tail" if several else "up_to_call unit | tail"
    return [f"start: {start}", "tail: TEXT", *_up_to("up_to_call", begin)]


def _up_to(name: str, mark: str) -> list[str]:
    """A rule for text up to a marker. For a text marker, `lazy` ends it at the first occurrence; a token needs no
    `lazy`."""
    return [f"{name}: TEXT {mark}"] if mark.startswith("<[") else [f"{name}[lazy]: TEXT {mark}"]


def _call_rules(tools: Tools, form: CallFormat) -> list[str]:
    names = [f"call_{index}" for index in range(len(tools.callable))]
    rules = [f"call: {' | '.join(names)}"]
    for name, tool in zip(names, tools.callable, strict=True):
        if form.layout == "named":
            head = json.dumps(tool.name + form.arguments_mark)
            rules.append(f"{name}: {head} %json {_json(tool.parameters)}")
        elif form.optional:
            # One terminal: otherwise the plain text's terminal would match its first characters, and the grammar would
            # end there.
            head = rf'/\{{"name": ?"{re.escape(tool.name)}", ?"{form.key}": ?/'
            rules.append(f'{name}: {head} %json {_json(tool.parameters)} GAP "}}"')
        else:
            rules.append(f"{name}: %json {_json(_call_schema(tool, form.key))}")
    return rules


def _call_schema(tool: Tool, key: str) -> dict[str, Any]:
    """The object of name and arguments. Definitions move to its root, where the schema's references look for them."""
    arguments = {name: value for name, value in tool.parameters.items() if name not in _DEFINITIONS}
    definitions = {name: value for name, value in tool.parameters.items() if name in _DEFINITIONS}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
        **definitions,
    }


def _literal(text: str, special_id: SpecialId) -> str:
    token = special_id(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(few_blanks(schema))
