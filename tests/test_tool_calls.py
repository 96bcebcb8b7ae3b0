"""Tool calls: declarations, grammars, extraction from answers, whole requests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.runtime.server.api.prompting import ChatPrompt, render
from edgelm.runtime.server.http.errors import ApiError
from edgelm.runtime.server.http.fields import Fields
from edgelm.runtime.server.models import Lease, Model
from edgelm.runtime.server.tools import formats
from edgelm.runtime.server.tools.declared import Tools, tools_of
from edgelm.runtime.server.tools.formats import CallFormat, find_format
from edgelm.runtime.server.tools.grammar import Thinking, call_grammar
from edgelm.runtime.server.tools.parser import AnswerParser, Words
from edgelm.runtime.text.tokenizer import Tokenizer

from .chat_templates import QWEN_2
from .served import byte_folder, chat, client_of, events_of, saying_engine

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
RIGHT = '{"city": "Paris"}'
ONE = {
    "tagged": f'<tool_call>\n{{"name": "weather", "arguments": {RIGHT}}}\n</tool_call>',
    "llama 3": f'{{"name": "weather", "parameters": {RIGHT}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "weather", "arguments": {RIGHT}}}]',
    "mistral, newer": f"[TOOL_CALLS]weather[ARGS]{RIGHT}",
}
TWO = {
    "tagged": f'{ONE["tagged"]}\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>',
    "llama 3": f'{ONE["llama 3"]}; {{"name": "now", "parameters": {{}}}}',
    "mistral": f'{ONE["mistral"][:-1]}, {{"name": "now", "arguments": {{}}}}]',
    "mistral, newer": f"{ONE['mistral, newer']}[TOOL_CALLS]now[ARGS]{{}}",
}
FORMATS = {form.name: form for form in (formats.TAGGED, formats.LLAMA_3, formats.MISTRAL, formats.MISTRAL_NAMED)}
CALLS = [("weather", json.loads(RIGHT)), ("now", {})]


def tools(**fields: Any) -> Tools:
    found = tools_of(Fields({"tools": TOOLS, **fields}))
    assert found is not None
    return found


def read(form: CallFormat | None, text: str, size: int = 1000, **settings: Any) -> tuple[str, str, list[Any]]:
    """Thought, content and calls of an answer that arrives in pieces."""
    parser = AnswerParser(form, frozenset({"weather", "now"}), **settings)
    parts = [part for at in range(0, len(text), size) for part in parser.add(text[at : at + size])] + parser.finish()
    words = [part for part in parts if isinstance(part, Words)]
    calls = [(part.name, json.loads(part.arguments)) for part in parts if not isinstance(part, Words)]
    reasoning = "".join(part.text for part in words if part.kind == "reasoning")
    return reasoning, "".join(part.text for part in words if part.kind == "content"), calls


# ---- reading


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_read_however_they_are_cut(name: str, size: int) -> None:
    assert read(FORMATS[name], ONE[name], size) == ("", "", CALLS[:1])
    assert read(FORMATS[name], TWO[name], size) == ("", "", CALLS)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_text_in_front_of_a_call_is_content(size: int) -> None:
    assert read(formats.TAGGED, f"Let me see. \n{ONE['tagged']}", size) == ("", "Let me see.", CALLS[:1])
    assert read(formats.LLAMA_3, f"<|python_tag|>{ONE['llama 3']}", size) == ("", "", CALLS[:1])


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "x <tool_call>{} y",
        'x <tool_call>{"name": "other", "arguments": {}}</tool_call> y',
        'x <tool_call>{"name": "weather", "argu',
        'x <tool_call>{"name": "weather", "arguments": 5}</tool_call>',
        "a < b <tool",
        "<tool_call>nothing</tool_call> more",
    ],
)
def test_text_that_is_no_call_stays_in_the_content(text: str, size: int) -> None:
    assert read(formats.TAGGED, text, size) == ("", text, [])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_thoughts_are_separated(size: int) -> None:
    assert read(None, "<think>\nwell,\n\nyes\n</think>\n\nHi  there ", size, thinks=True) == (
        "well,\n\nyes",
        "Hi  there ",
        [],
    )
    answer = f"so</think>\n{ONE['tagged']}"
    assert read(formats.TAGGED, answer, size, begun=True) == ("so", "", CALLS[:1])
    assert read(None, " no <think>thought</think>", size, thinks=True) == ("", " no <think>thought</think>", [])
    assert read(None, "<think>cut", size, thinks=True) == ("cut", "", [])
    assert read(None, "<thi", size, thinks=True) == ("", "<thi", [])


@given(st.text(alphabet="<tol_cal>/{}\"' \nab", max_size=60), st.integers(1, 9))
def test_text_without_calls_comes_through_whole(text: str, size: int) -> None:
    assert read(formats.TAGGED, text, size)[1] == text
    assert read(None, text, size) == ("", text, [])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", formats.GENERIC),
        (QWEN_2, formats.GENERIC),
        ("{% if tools %}<tool_call>{% endif %}", formats.TAGGED),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", formats.MISTRAL),
        ("{% if tools %}[TOOL_CALLS]{{ x }}[ARGS]{% endif %}", formats.MISTRAL_NAMED),
        ("{% if tools %}<|python_tag|>{% endif %}", formats.LLAMA_3),
        ("{% if tools %}{{ tools }}{% endif %}", formats.TAGGED),
    ],
)
def test_formats_are_found_in_templates(template: str, form: CallFormat) -> None:
    assert find_format(template) == form


# ---- grammars


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Any:
    guidance = pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    folder = byte_folder(tmp_path_factory.mktemp("bytes"))
    return guidance.LLTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), None, [256])


def accepts(vocabulary: Any, grammar: str, text: str) -> bool:
    import llguidance

    matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("thinking", ["no", "may", "begun"])
def test_answers_that_must_call(vocabulary: Any, name: str, parallel: bool, thinking: Thinking) -> None:
    asked = tools(tool_choice="required", parallel_tool_calls=parallel)
    grammar = call_grammar(asked, FORMATS[name], lambda _: None, thinking)
    thought = {"no": "", "may": "<think>hm</think>\n", "begun": "hm</think>\n\n"}[thinking]
    assert accepts(vocabulary, grammar, thought + ONE[name])
    assert accepts(vocabulary, grammar, thought + TWO[name]) == parallel
    for wrong in (
        "Hello",
        "",
        f"Hello {ONE[name]}",
        ONE[name].replace('"Paris"', "5"),
        ONE[name].replace("weather", "x"),
    ):
        assert not accepts(vocabulary, grammar, thought + wrong), wrong


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_answers_that_may_call(vocabulary: Any, name: str, parallel: bool) -> None:
    grammar = call_grammar(tools(parallel_tool_calls=parallel), FORMATS[name], lambda _: None)
    for right in ("Hello", "", "a < b {", "{x}", ONE[name]):
        assert accepts(vocabulary, grammar, right), right
    assert accepts(vocabulary, grammar, TWO[name]) == parallel
    for wrong in (ONE[name].replace('"Paris"', "5"), ONE[name].replace("weather", "x"), ONE[name][:-4]):
        assert not accepts(vocabulary, grammar, wrong), wrong
    if not FORMATS[name].optional:
        assert accepts(vocabulary, grammar, f"Well. {ONE[name]}")


def test_a_named_tool_is_the_only_one(vocabulary: Any) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    grammar = call_grammar(tools(tool_choice=choice), formats.TAGGED, lambda _: None)
    assert accepts(vocabulary, grammar, '<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    assert not accepts(vocabulary, grammar, ONE["tagged"])


def test_definitions_of_a_schema_are_found(vocabulary: Any) -> None:
    grammar = call_grammar(tools(tool_choice="required"), formats.TAGGED, lambda _: None)
    for days, right in (("3", True), ("12", False)):
        text = ONE["tagged"].replace('"Paris"', f'"Paris", "days": {days}')
        assert accepts(vocabulary, grammar, text) == right


def test_markers_that_are_special_tokens_become_ids_in_the_grammar(tmp_path: Path) -> None:
    import llguidance

    data = json.loads((byte_folder(tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"].append({**data["added_tokens"][0], "id": 257, "content": "[TOOL_CALLS]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.special_id("[TOOL_CALLS]"), tokenizer.special_id("a")) == (257, None)
    grammar = call_grammar(tools(), formats.MISTRAL, tokenizer.special_id)
    vocabulary = llguidance.LLTokenizer(json.dumps(data), None, [256])
    matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    body = ONE["mistral"].removeprefix("[TOOL_CALLS]").encode()
    assert matcher.try_consume_tokens([*b"Well ", 257, *body]) == 6 + len(body) and matcher.is_accepting()


# ---- declarations


def test_tool_choices() -> None:
    assert tools().mode == "auto" and tools(tool_choice="required").mode == "required"
    assert tools_of(Fields({"tools": TOOLS, "tool_choice": "none"})) is None
    assert tools_of(Fields({"tools": []})) is tools_of(Fields({})) is None
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "name": "now"}]},
    }
    (only,) = tools(tool_choice=allowed).callable
    assert only.name == "now" and only.parameters["additionalProperties"] is False
    flat = [{"type": "function", "name": "now", "parameters": {}}]
    found = tools_of(Fields({"tools": flat, "tool_choice": {"type": "function", "name": "now"}}), flat=True)
    assert found is not None and found.mode == "required"
    assert not dataclasses.replace(found).parallel


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOLS[0], TOOLS[0]]},
        {"tools": TOOLS, "tool_choice": "sometimes"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": TOOLS, "tool_choice": {"type": "custom"}},
        {"tools": TOOLS, "tool_choice": 5},
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}},
        {"tools": TOOLS, "parallel_tool_calls": "yes"},
        {"tools": {}},
        {"tools": TOOLS * 100},
        {"tool_choice": "required"},
    ],
)
def test_invalid_declarations_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError):
        tools_of(Fields(fields))


# ---- requests


@pytest.fixture(autouse=True)
def _needs_guidance() -> Iterator[None]:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    yield


def test_a_call_comes_as_openai_writes_it(tmp_path: Path) -> None:
    with saying_engine(tmp_path, f"Let me see.\n{TWO['tagged']}") as engine, client_of(engine) as client:
        (choice,) = chat(client, tools=TOOLS).json()["choices"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
        calls = choice["message"]["tool_calls"]
        assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls] == CALLS
        assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
        *chunks, _ = events_of(chat(client, tools=TOOLS, stream=True).text)
        deltas = [delta for chunk in chunks for delta in chunk["choices"][0]["delta"].get("tool_calls", [])]
        assert [delta["index"] for delta in deltas] == [0, 1] and [delta["function"]["name"] for delta in deltas] == [
            "weather",
            "now",
        ]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_arguments_follow_their_schema_whatever_the_model_says(tmp_path: Path) -> None:
    wrong = '<tool_call>{"name": "weather", "arguments": {"town": 5, "days": 100}}</tool_call>'
    with saying_engine(tmp_path, wrong) as engine, client_of(engine) as client:
        for choice in ("required", "auto", {"type": "function", "function": {"name": "weather"}}):
            (found,) = chat(client, tools=TOOLS, tool_choice=choice, max_tokens=200).json()["choices"]
            (call,) = found["message"]["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert isinstance(arguments["city"], str) and 1 <= arguments.get("days", 1) <= 9


def test_a_model_that_must_call_calls(tmp_path: Path) -> None:
    with saying_engine(tmp_path, "No, I would rather talk.") as engine, client_of(engine) as client:
        asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        (found,) = chat(client, **asked, max_tokens=300).json()["choices"]
        assert found["message"]["tool_calls"] and found["message"]["content"] is None
        (found,) = chat(client, tools=TOOLS, tool_choice="none").json()["choices"]
        assert found["message"]["content"] == "No, I would rather talk." and "tool_calls" not in found["message"]


def test_a_template_without_tools_gets_them_described_in_the_prompt(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(prompt: str) -> str:
        seen.append(prompt)
        return "fine"

    history: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": RIGHT}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    with saying_engine(tmp_path, answer) as engine, client_of(engine) as client:
        body = {"messages": history, "tools": TOOLS, "max_tokens": 10}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    prompt = seen[0]
    assert prompt.startswith("<system>Be kind.\n\nYou can call these functions:")
    assert '"name": "weather", "description": "Of a city"' in prompt
    assert f'<tool_call>\n{{"name": "weather", "arguments": {RIGHT}}}\n</tool_call>' in prompt
    assert "<user><tool_response>\nsunny\n</tool_response>" in prompt


def test_a_schema_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}]
    with saying_engine(tmp_path) as engine, client_of(engine) as client:
        answer = chat(client, tools=bad)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"


def test_reasoning_is_a_separate_field(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}<think>{% endif %}"
    with (
        saying_engine(tmp_path, "<think>\nhm\n</think>\n\nYes.", template=template) as engine,
        client_of(engine) as client,
    ):
        message = chat(client).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")
        deltas = [chunk["choices"][0]["delta"] for chunk in events_of(chat(client, stream=True).text)[:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    opened = template + "<think>\n"
    with saying_engine(tmp_path, "hm\n</think>Yes.", template=opened) as engine, client_of(engine) as client:
        message = chat(client).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")


def test_stop_texts_work_with_tool_calls(tmp_path: Path) -> None:
    with saying_engine(tmp_path, "Well, stop here") as engine, client_of(engine) as client:
        assert chat(client, tools=TOOLS, stop="stop").json()["choices"][0]["message"]["content"] == "Well, "


NATIVE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }};{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls %}<tool_call>"
    "{{ call.function.arguments.city }}{% endfor %}{{ '\\n' }}{% endfor %}{% if enable_thinking is defined and not "
    "enable_thinking %}(no thoughts){% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rendered(tmp_path: Path, **fields: Any) -> str:
    """The prompt of a model whose template accepts tools."""
    with saying_engine(tmp_path, template=NATIVE) as engine, client_of(engine) as client:
        found = client.post("/apply-template", json={"messages": [{"role": "user", "content": "hi"}], **fields})
        assert found.status_code == 200, found.text
        return str(found.json()["prompt"])


def test_a_template_with_tools_is_given_them(tmp_path: Path) -> None:
    assert rendered(tmp_path, tools=TOOLS) == "<tools>weather;now;</tools><user>hi\n<assistant>"
    assert rendered(tmp_path, tools=TOOLS, tool_choice="none") == "<user>hi\n<assistant>"
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": RIGHT}}
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert "<tool_call>Paris" in rendered(tmp_path, messages=history, tools=TOOLS)


CALLED = "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for call in m.tool_calls %}"
DONE = "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if tools %}!{% endif %}"
# How published templates write a call's arguments, and the expected result for {"city": "Köln", "days": 3}.
WRITTEN = {
    "Qwen 2.5": ("{{ call.function.arguments | tojson }}", '{"city": "Köln", "days": 3}'),
    "Qwen 3": (
        "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
        "{{ call.function.arguments | tojson }}{% endif %}",
        '{"city": "Köln", "days": 3}',
    ),
    "Llama 3": (
        '{{ \'{"name": "\' + call.function.name + \'", "parameters": \' }}{{ call.function.arguments | tojson }}}',
        '{"name": "weather", "parameters": {"city": "Köln", "days": 3}}',
    ),
    "Llama 3.1, built-in tools": (
        "{% for name, value in call.function.arguments | items %}{{ name }}={{ value | tojson }};{% endfor %}",
        'city="Köln";days=3;',
    ),
    "DeepSeek": (
        "{{ '```json\\n' + call.function.arguments + '\\n```' }}",
        '```json\n{"city": "Köln", "days": 3}\n```',
    ),
    "as it is": ("{{ call.function.arguments }}", '{"city": "Köln", "days": 3}'),
}


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_of_earlier_calls_have_the_templates_form(tmp_path: Path, name: str, as_text: bool) -> None:
    """OpenAI's messages have them as text; some clients send an object."""
    body, shown = WRITTEN[name]
    arguments: Any = {"city": "Köln", "days": 3}
    given = json.dumps(arguments) if as_text else arguments
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": given}}
    history: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    history.append({"role": "tool", "tool_call_id": "c", "content": "grey"})
    with saying_engine(tmp_path, template=CALLED + body + DONE) as engine, client_of(engine) as client:
        found = client.post("/apply-template", json={"messages": history})
        assert found.status_code == 200, found.text
        assert found.json()["prompt"] == f"<user>hi<assistant>{shown}<tool>grey"


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", [], 5])
def test_arguments_that_are_no_object_are_refused(tmp_path: Path, arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with saying_engine(tmp_path, template=NATIVE) as engine, client_of(engine) as client:
        refused = client.post("/v1/chat/completions", json={"messages": history})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


def test_thinking_is_switched_off_in_both_ways(tmp_path: Path) -> None:
    assert "(no thoughts)" not in rendered(tmp_path)
    assert "(no thoughts)" in rendered(tmp_path, chat_template_kwargs={"enable_thinking": False})
    with saying_engine(tmp_path, lambda prompt: prompt[-25:], template=NATIVE) as engine, client_of(engine) as client:
        for effort, found in (("none", True), ("high", False)):
            body = chat(client, reasoning_effort=effort).json()
            assert ("(no thoughts)" in body["choices"][0]["message"]["content"]) == found


def test_a_begun_answer_goes_on(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, I"}]
    assert rendered(tmp_path, messages=messages, continue_final_message=True) == "<user>hi\n<assistant>Well, I"
    assert rendered(tmp_path, messages=messages) == "<user>hi\n<assistant>Well, I\n<assistant>"


def test_special_tokens_written_in_messages_are_plain_text(tmp_path: Path) -> None:
    with saying_engine(tmp_path) as engine, client_of(engine) as client:
        asked = {"messages": [{"role": "user", "content": "a<end>b"}]}
        tokens = client.post("/tokenize", json=asked).json()["tokens"]
        assert 256 not in tokens and bytes(tokens).count(b"<end>") == 1


def test_markers_that_are_special_tokens_are_seen_in_answers(tmp_path: Path) -> None:
    """Engines leave special tokens out of texts."""
    template = "{% if tools %}[TOOL_CALLS]{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    form = find_format(template)
    with saying_engine(tmp_path, ONE["mistral"], template=template) as engine:
        data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        special = {**data["added_tokens"][0], "id": 300, "content": "[TOOL_CALLS]"}
        (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "added_tokens": [special]}), encoding="utf-8")
        engine.tokenizer = Tokenizer(tmp_path / "tokenizer.json")
        lease = Lease(Model("fake", None, engine, template=template), engine, lambda: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "encode", lambda **_: [97])
            _, reading = render(lease, ChatPrompt([{"role": "user", "content": "hi"}], tools()))
    assert form is formats.MISTRAL and reading.settings["special_tokens"] is True
    assert "up_to_call: TEXT <[" in reading.settings["lark"]
