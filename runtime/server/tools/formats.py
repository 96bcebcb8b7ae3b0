"""How models write calls: the markers of the common model families, found in a bundle's chat template.

| format | an answer with a call |
|---|---|
| tagged (Qwen, Hermes, SmolLM) | `<tool_call>{"name": "f", "arguments": {}}</tool_call>` |
| llama 3 | `{"name": "f", "parameters": {}}`, behind `<|python_tag|>` or not |
| mistral | `[TOOL_CALLS][{"name": "f", "arguments": {}}]` |
| mistral, newer | `[TOOL_CALLS]f[ARGS]{}` |
| generic | as tagged; a system message tells the model so, since its template has no place for tools |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["objects", "list", "named"]


@dataclass(frozen=True)
class CallFormat:
    """One way to write calls.

    begin: what stands in front of a call ("" where a call is the whole answer); end: what stands behind it; key: of the
    arguments. layout: "objects" (one JSON object for each begin), "list" (one list of objects) or "named" (the name,
    `arguments_mark`, the arguments). optional: begin may be missing. in_template: the template takes tools.
    """

    name: str
    begin: str
    end: str = ""
    key: str = "arguments"
    layout: Layout = "objects"
    arguments_mark: str = ""
    optional: bool = False
    in_template: bool = True


TAGGED = CallFormat("tagged", "<tool_call>", "</tool_call>")
LLAMA_3 = CallFormat("llama 3", "<|python_tag|>", key="parameters", optional=True)
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", layout="list")
MISTRAL_NAMED = CallFormat("mistral, newer", "[TOOL_CALLS]", layout="named", arguments_mark="[ARGS]")
GENERIC = CallFormat("generic", "<tool_call>", "</tool_call>", in_template=False)


def find_format(template: str) -> CallFormat:
    """The format of a chat template's source."""
    if "tools" not in template:
        return GENERIC
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return TAGGED
    if "<|python_tag|>" in template or '"parameters":' in template:
        return LLAMA_3
    return TAGGED
