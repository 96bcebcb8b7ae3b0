"""Chat templates: the same prompt as transformers makes, and no way out of the sandbox."""

from __future__ import annotations

import json
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime.errors import PromptError, TemplateError
from edgelm.runtime.text import bounds
from edgelm.runtime.text.chat import ChatTemplate
from edgelm.runtime.text.messages import plain_messages
from edgelm.runtime.text.options import NO_OPTIONS, ChatOptions
from edgelm.runtime.text.templates import Templates, find_templates

from .chat_templates import DEEPSEEK, GEMMA_3, LLAMA_2, MORE_TEMPLATES, QWEN_2
from .conftest import byte_tokenizer, shared

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA_3 = """{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {%- set content = header + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate: user, assistant, user, ...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'assistant') %}{% set role = 'model' %}
    {% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI_3 = """{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

TOJSON = """{{ messages | tojson }}|{{ messages | tojson(indent=2) }}
{{ messages | tojson(ensure_ascii=True, sort_keys=True) }}
{{ messages[0] | tojson(separators=(',', ':')) }}{{ '<b> & "q" é' | tojson }}"""

LOOP_CONTROLS = """{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ loop.index }}:{{ message['content'] }}
{% endfor %}"""

LOOPS = """{% for message in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex0 }}{{ loop.first }}
{{ loop.last }}{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem.role if loop.nextitem }}
{{ loop.cycle('a', 'b') }}{% for key, value in message.items() %}{{ key }}={{ loop.depth }}{% endfor %}
{% for key in message %}{{ key }}{% endfor %}{% endfor %}{% for x in nothing %}{{ x }}{% else %}none{% endfor %}
{% for x in [] if x %}{% else %}empty{% endfor %}
{% for item in [1, [2, [3, []]]] recursive %}{{ loop(item) if item is iterable else item }}{{ loop.depth }}{% endfor %}
{% for c in 'héy' if c != 'h' %}{{ c }}{{ loop.changed(c) }}{% endfor %}"""

DATED = """{{ 'Today is ' + strftime_now('%Y') + '-' + strftime_now('%m-%d') + '.' }}{{ messages[0]['content'] }}"""

NAMESPACES = """{%- set ns = namespace(count=0, last='') -%}
{%- for message in messages if message.role != 'system' -%}
    {%- set ns.count = ns.count + 1 -%}{%- set ns.last = message.content -%}
{%- endfor -%}
{%- macro show(value, width=3) -%}[{{ value }}/{{ width }}]{%- endmacro -%}
{{ show(ns.count) }}{{ show(ns.last, width=5) }}{{ dict(a=1, b=ns.count) }}
{{- messages | map(attribute='role') | join(',') }}
{%- if tools is none %}no tools{% endif %}{% if documents %}documents{% endif %}
{%- if unknown is defined %}?{% endif %}{{ unknown }}"""

GENERATION_BLOCK = """{% for message in messages %}
{% if message['role'] == 'assistant' %}<a>{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{% else %}<u>{{ message['content'] }}{% endif %}
{% endfor %}"""

WHITESPACE = """   {# a comment #}
  {% if messages %}
  kept
     {%- if true +%}
  also
  {% endif %}
  {% endif %}
{{- messages[0].content }}
end
"""

EVERYTHING = """{% for m in messages %}{% for key in m %}{{ key }}={{ m[key] }};{% endfor %}{{ m.content }}
{{ m.reasoning_content }}{% endfor %}"""

CALLS = """{% for m in messages %}{{ m.role }}:{% if m.content is defined %}{{ m.content }}{% endif %}
{%- if 'tool_calls' in m %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{% endif %}
{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %};{% endfor %}"""

TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": LLAMA_3,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Phi-3": PHI_3,
    "Zephyr": ZEPHYR,
    "tojson": TOJSON,
    "loop controls": LOOP_CONTROLS,
    "loops": LOOPS,
    "dated": DATED,
    "namespaces": NAMESPACES,
    "generation block": GENERATION_BLOCK,
    "whitespace": WHITESPACE,
    "everything": EVERYTHING,
    "calls": CALLS,
    **MORE_TEMPLATES,
}

USER = {"role": "user", "content": "Hello <b>, how are you? 你好 \n "}
ASSISTANT = {"role": "assistant", "content": " Fine, thanks. é"}
SYSTEM = {"role": "system", "content": "Be brief & kind."}
SHORT = {"role": "system", "content": "Brief."}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [USER],
    "three turns": [USER, ASSISTANT, USER],
    "with a system message": [SYSTEM, USER],
    "all of them": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
    "twice the user": [USER, USER],
    "an unknown role": [{"role": "wizard", "content": "poof"}, USER],
    "no content": [{"role": "user"}],
    "empty content": [{"role": "user", "content": ""}],
    "content in parts": [{"role": "user", "content": [{"type": "text", "text": " parts "}]}],
    "thoughts": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, USER],
    "a later system message": [USER, ASSISTANT, SYSTEM, USER],
    "further keys": [{"role": "user", "content": "a", "name": "Ann", "tool_calls": [{"id": 1}]}],
    # As OpenAI's clients dump them, with every field of the type.
    "a call of a tool": [
        {**USER, "name": None},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ],
    "no calls of tools": [USER, {**ASSISTANT, "refusal": None, "tool_calls": None, "function_call": None}, USER],
    "reasoning": [USER, {**ASSISTANT, "reasoning": "hm"}, USER, {**ASSISTANT, "thinking": "so"}, USER],
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of transformers with our special tokens and no template of its own."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("reference")
    byte_tokenizer(folder)
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)


def outcome_of_transformers(
    reference: Any, template: str, messages: list[dict[str, Any]], prompt: bool, **special: Any
) -> str | None:
    """The text, or None if transformers raises for these messages."""
    import jinja2

    settings = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompt, **special}
    try:
        return str(reference.apply_chat_template(messages, **settings))
    except (jinja2.TemplateError, TypeError):
        return None


@pytest.mark.parametrize("prompt", [True, False], ids=["with prompt", "without"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_one_of_transformers(reference: Any, name: str, conversation: str, prompt: bool) -> None:
    messages = CONVERSATIONS[conversation]
    expected = outcome_of_transformers(reference, TEMPLATES[name], messages, prompt)
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    if expected is None:
        with pytest.raises(TemplateError):
            template.render(plain_messages(messages), add_generation_prompt=prompt)
    else:
        assert template.render(plain_messages(messages), add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["phi-3-mini", "qwen2"])
def test_published_templates_give_the_prompt_of_transformers(reference: Any, name: str, conversation: str) -> None:
    config = json.loads(shared(f"tokenizers/{name}/tokenizer_config.json").read_text(encoding="utf-8"))
    messages = CONVERSATIONS[conversation]
    found = find_templates(None, config)
    assert found is not None
    template = found.default
    for prompt in (True, False):
        expected = outcome_of_transformers(
            reference, config["chat_template"], messages, prompt, eos_token=config["eos_token"]
        )
        if expected is None:
            with pytest.raises(TemplateError):
                template.render(plain_messages(messages), add_generation_prompt=prompt)
        else:
            assert template.render(plain_messages(messages), add_generation_prompt=prompt) == expected


def test_the_templates_answer_as_their_models_expect() -> None:
    """Some prompts in full, as a check that does not depend on transformers."""
    hello = [{"role": "user", "content": "Hello"}]
    assert ChatTemplate(CHATML, SPECIAL).render(hello) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate(MISTRAL, SPECIAL).render(hello) == "<s>[INST] Hello[/INST]"
    assert (
        ChatTemplate(LLAMA_2, SPECIAL).render([SHORT, *hello]) == "<s>[INST] <<SYS>>\nBrief.\n<</SYS>>\n\nHello [/INST]"
    )
    assert ChatTemplate(DEEPSEEK, SPECIAL).render([SHORT, *hello]) == "<s>Brief.\n\nUser: Hello\n\nAssistant:"
    assert ChatTemplate(GEMMA_3, SPECIAL).render([SHORT, *hello]) == (
        "<s><start_of_turn>user\nBrief.\n\nHello<end_of_turn>\n<start_of_turn>model\n"
    )
    assert ChatTemplate(QWEN_2, SPECIAL).render(hello) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ChatTemplate(PHI_3, SPECIAL).render(hello, add_generation_prompt=False) == "<|user|>\nHello<|end|>\n\n</s>"


def test_the_date_is_todays() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    text = ChatTemplate(DATED, {}).render([USER])
    after = datetime.now().strftime("%Y-%m-%d")
    assert any(text.startswith(f"Today is {day}.") for day in (before, after))


def test_a_templates_own_words_are_in_the_error() -> None:
    with pytest.raises(TemplateError, match="Roles must alternate"):
        ChatTemplate(MISTRAL, SPECIAL).render([USER, USER])
    with pytest.raises(TemplateError, match="System role not supported"):
        ChatTemplate(GEMMA, SPECIAL).render([SYSTEM, USER])


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Mistral", "Phi-3", "Zephyr", *MORE_TEMPLATES])
def test_a_system_message_is_shown(name: str) -> None:
    assert "Brief." in ChatTemplate(TEMPLATES[name], SPECIAL).prompt([SHORT, USER])


USERS_ONLY = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
FIRST_SYSTEM = "{{ messages[0].content }}" + USERS_ONLY


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (USERS_ONLY, [SHORT, USER]),
        (USERS_ONLY, [USER, ASSISTANT, SHORT, USER]),
        (FIRST_SYSTEM, [SYSTEM, SHORT, USER]),
        (FIRST_SYSTEM, [SHORT, USER, SHORT]),
    ],
)
def test_a_template_that_leaves_a_system_message_out_is_an_error(source: str, messages: list[dict[str, Any]]) -> None:
    template = ChatTemplate(source, SPECIAL)
    with pytest.raises(TemplateError, match="leaves this system message out"):
        template.prompt(messages)
    assert template.render(messages), "transformers accepts it"
    for fine in ([USER], [{"role": "system", "content": " "}, USER], [{"role": "system"}, USER], [USER, ASSISTANT]):
        assert template.prompt(fine) == template.render(fine)


@pytest.mark.parametrize("source", ["{{ 'x' | truncate(-9) }}", "{{ cycler() | string }}", "{{ cycler() }}"])
def test_what_jinja2_itself_raises_is_an_error_of_the_template(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, SPECIAL).render([USER])


# ---- contents in parts

TAKES_PARTS = """{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %};{% endfor %}"""
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("parts", [PARTS, tuple(PARTS), PARTS[:1]], ids=["list", "tuple", "one"])
@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Phi-3", "everything", "calls", *MORE_TEMPLATES])
def test_text_parts_are_one_text(name: str, parts: list[dict[str, str]], role: str) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    joined = "".join(part["text"] for part in parts)
    if TEMPLATES[name] == GEMMA_3 and role == "user":  # takes parts and strips each
        joined = "".join(part["text"].strip() for part in parts)
    rest = [] if role == "user" else [USER]
    assert template.prompt([{"role": role, "content": parts}, *rest]) == template.prompt(
        [{"role": role, "content": joined}, *rest]
    )


def test_a_template_that_takes_parts_is_given_them() -> None:
    assert ChatTemplate(TAKES_PARTS, SPECIAL).prompt([{"role": "user", "content": PARTS}]) == "user:one two;"
    counts = TAKES_PARTS.replace("{% for part", "{{ m.content | length }}{% for part")
    assert ChatTemplate(counts, SPECIAL).prompt([{"role": "user", "content": PARTS}]) == "user:2one two;"


@pytest.mark.parametrize("source", [CHATML, TAKES_PARTS], ids=["texts", "parts"])
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "http://example.com/cat.png"}}, "'image_url'"),
        ({"type": "input_audio"}, "'input_audio'"),
        ({"type": "text"}, "'text'"),
        ({"type": "text", "text": 5}, "'text'"),
        ({"text": "a"}, "None"),
        ("a", "'a'"),
        (10**5000, "int"),
    ],
    ids=range(7),
)
def test_a_part_that_is_no_text_is_refused_by_its_type(source: str, part: Any, words: str) -> None:
    with pytest.raises(PromptError, match=f"message 1 has a part of type .*{words}"):
        ChatTemplate(source, SPECIAL).prompt([USER, {"role": "user", "content": [*PARTS, part]}])


def test_a_system_message_in_parts_is_not_left_out_in_silence() -> None:
    messages = [{"role": "system", "content": PARTS}, USER]
    for source in (USERS_ONLY, TAKES_PARTS.replace("in messages", "in messages if m.role == 'user'")):
        with pytest.raises(TemplateError, match="leaves this system message out"):
            ChatTemplate(source, SPECIAL).prompt(messages)


# ---- the sandbox

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__.__mro__}' | format(messages) ~ ''.format.__self__.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].__setitem__('role', 'x') }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{{ strftime_now.__globals__.__builtins__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('true') }}",
    "{% for x in range(1000000000) %}{% endfor %}",
    "{% include 'secret.txt' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_templates_cannot_leave_the_sandbox(source: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(TemplateError):
        ChatTemplate(source, SPECIAL).render(messages)
    assert messages == [USER]


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in 'x' * 99999 %}{{ b }}{% endfor %}{% endfor %}",
    "{% set x = range(2000) | list %}{% for a in x %}{% for b in x if b > a %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [[1] * 99] recursive %}{% for b in range(999) %}{{ loop([1] * 99) if false }}{% endfor %}"
    "{{ loop([a] * 99) if loop.depth < 9 }}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ [messages] * 9999999 }}",
    "{% set ns = namespace(x=10) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
]


LONG = "{% set x = 'ab\\n' * 300000 %}"
KEPT = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = ns.x + [PART] %}{% endfor %}"
TOO_LARGE = [
    "{% set ns = namespace(x='ab') %}{% for i in range(28) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(28) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ '{:{}d}'.format(1, 1000000000) }}",
    "{{ '{x:1000000000d}'.format_map({'x': 1}) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}{{ 'x'.rjust(width=1000000000) }}",
    "{{ '1'.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ 'x' | indent(1000000000, true) }}",
    "{{ 'x' | indent('y' * 1000000, true) | indent('y' * 1000000, true) | length }}",
    "{{ [messages] | tojson(indent=1000000000) }}",
    "{{ range(99999) | map('center', 1000000) | list | length }}",
    "{{ range(99999) | map('string') | map('center', 99999) | join | length }}",
    LONG + "{{ x | replace('a', x) }}",
    LONG + "{{ x.replace('a', x) }}",
    LONG + "{{ x | list | join(x) }}",
    LONG + "{{ x.join(x) }}",
    LONG + "{{ x | wordwrap(1, true, x) }}",
    LONG + "{{ [x] * 1000000 }}",
    LONG + "{{ ([x] * 1000000) | join | length }}",
    LONG + "{{ ([x] * 1000000) | string | length }}",
    LONG + "{{ ([x] * 1000000) | tojson | length }}",
    LONG + "{{ ([[x] * 1000] * 1000) | pprint | length }}",
    LONG + "{{ '{} {}'.format([x] * 1000000, 1) }}",
    LONG + "{{ '%s' % ([x] * 1000000, ) }}",
    LONG + "{% for i in range(9999) %}{{ x }}{% endfor %}",
    LONG + "{% set y %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}",
    LONG + "{% macro f() %}{{ x }}{% endmacro %}{% set y %}{% for i in range(9999) %}{{ f() }}{% endfor %}{% endset %}",
    *(LONG + KEPT.replace("PART", part) for part in ("x[i:]", "x.upper()", "x.split('b', 1)", "x | reverse")),
    "{% for i in range(99999) %}{% for j in range(4) %}" + "text" * 1000 + "{% endfor %}{% endfor %}",
    "{% macro f() %}" + "text" * 5000 + "{% endmacro %}{% for i in range(99999) %}{% set y = f() %}{% endfor %}",
    "{% for a in [[1] * 99999] recursive %}"
    + "text" * 1000
    + "{{ loop([[1] * 99999] * 9) if loop.depth < 9 }}{% endfor %}",
    "{{ lipsum(n=100000) }}",
]  # fmt: skip


def test_each_name_of_the_lists_has_the_check_of_its_list() -> None:
    for names in (bounds._PADDING, bounds._WRITING):
        assert len({bounds._CHECKS[name] for name in names}) == 1


@pytest.mark.parametrize("source", TOO_LARGE)
def test_templates_that_would_take_all_memory_are_stopped(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            ChatTemplate(source, SPECIAL).render([USER])
        assert tracemalloc.get_traced_memory()[1] < 700e6
    finally:
        tracemalloc.stop()


def test_a_template_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_SECONDS", 0.05)
    slow = "{% for a in range(99999) %}{{ range(5000) | map('string') | join | length }}{% endfor %}"
    with pytest.raises(TemplateError, match="seconds"):
        ChatTemplate(slow, SPECIAL).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content * 3 }}{{ messages[0].content.center(90) | indent(4) }}",
        "{{ messages | map(attribute='content') | join(', ') }}{{ messages | tojson(indent=2) }}",
        "{{ '%-5s|%05.2f' % ('a', 1.5) }}{{ '%s and %d' | format('a', 3) }}{{ '{:>8}{!r}'.format('a', 'b') }}",
        "{{ messages[0].content[1:4] ~ messages[0].content[::-1] ~ 7 ~ none ~ messages[:1] }}{{ messages[-1:] }}",
        "{{ 'a b c' | wordwrap(2) | upper | replace('A', 'xx') | truncate(5, true, '') }}{{ 7 % 4 }}{{ [1] + [2] }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}{{ [3, 1, 2] | sort | join('-') }}{{ 'a' | e }}",
        "{{ ('x' | attr('upper'))() }}{{ 'é' | urlencode }}{{ messages | groupby('role') | length }}{{ 'a' in 'abc' }}",
    ],
)
def test_ordinary_templates_give_what_they_give_transformers(reference: Any, source: str) -> None:
    assert ChatTemplate(source, SPECIAL).render([USER, ASSISTANT]) == outcome_of_transformers(
        reference, source, [USER, ASSISTANT], True
    )


@pytest.mark.parametrize("source", ENDLESS)
def test_templates_that_would_compute_for_hours_are_stopped(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    with pytest.raises(TemplateError):
        template.render([USER])


def test_each_rendering_has_its_own_budget_and_long_conversations_fit() -> None:
    template = ChatTemplate(LLAMA_3, SPECIAL)
    messages = [{"role": "user", "content": "a"}] * 10_000
    assert len({template.render(messages) for _ in range(3)}) == 1
    loops = ChatTemplate("{% for a in range(600) %}{% for b in range(600) %}{% endfor %}{% endfor %}done", SPECIAL)
    assert [loops.render([USER]) for _ in range(2)] == ["done"] * 2


@pytest.mark.parametrize("source", ["{{ messages[0].content.__class__ }}", "{{ raise_exception.__globals__ }}"])
def test_an_unsafe_attribute_renders_as_nothing(source: str) -> None:
    assert ChatTemplate(source, SPECIAL).render([USER]) == ""


def test_a_namespace_cannot_hold_underscored_names() -> None:
    with pytest.raises(TemplateError):
        ChatTemplate("{% set ns = namespace(__class__=1) %}x", SPECIAL).render([USER])


def test_rendering_changes_neither_the_messages_nor_the_next_rendering() -> None:
    template = ChatTemplate(
        "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages | length }}", {}
    )
    messages = [dict(USER)]
    assert [template.render(messages) for _ in range(3)] == ["11"] * 3
    assert messages == [USER]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ '{0}{1}'.format(1) }}",
        "{{ '{name}'.format() }}",
        "{{ messages[0]['content'].missing() }}",
        "{{ messages[7]['content'] + 'x' }}",
        "{{ messages[0] + 1 }}",
        "{{ 'a'.encode().decode('no such encoding') }}",
        "{{ '%d' | format('x') }}",
        "{{ [1] | slice(0) | list }}",
        "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}",
        "{{ messages | tojson(indent={}) }}",
    ],
)
def test_whatever_fails_while_rendering_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, SPECIAL).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' if }}",
        "{% for message in messages %}",
        "{% endfor %}",
        "{{ message",
        "{% unknown_tag %}",
        "{{ 'a' | no_such_filter }}",
        "{{ messages is no_such_test }}",
        "{% break %}",
        "{{ " + "9" * 5_000 + " }}",
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}",
    ],
    ids=lambda source: source[:30],
)
def test_broken_templates_are_refused_when_they_are_compiled(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, SPECIAL)


@pytest.mark.parametrize("messages", [[5], ["text"], 5, [None]])
def test_invalid_messages_are_refused(messages: Any) -> None:
    for use in (plain_messages, ChatTemplate(CHATML, SPECIAL).render, ChatTemplate(CHATML, SPECIAL).prompt):
        with pytest.raises(PromptError):
            use(messages)


# ---- which template a bundle has


def rendered(templates: Templates | None, options: ChatOptions = NO_OPTIONS) -> str:
    assert templates is not None
    return templates.of(options).render([{"role": "user", "content": "hi"}], options)


def test_the_file_wins_over_the_configuration() -> None:
    config = {"chat_template": "configuration"}
    assert rendered(find_templates("file", config)) == "file"
    assert rendered(find_templates(None, config)) == "configuration"


def test_of_several_named_templates_the_default_is_taken() -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert rendered(find_templates(None, {"chat_template": named})) == "plain"
    assert rendered(find_templates(None, {"chat_template": named}), ChatOptions(tools=[])) == "tools"
    assert rendered(find_templates("file", {"chat_template": named}), ChatOptions(tools=[])) == "file"
    assert find_templates(None, {"chat_template": named[:1]}) is None


@pytest.mark.parametrize("config", [{}, {"chat_template": None}, {"chat_template": ""}, {"chat_template": []}])
def test_a_bundle_may_have_no_template(config: dict[str, Any]) -> None:
    assert find_templates(None, config) is None


def test_special_tokens_come_from_the_configuration_in_either_form() -> None:
    config = {
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": None,
        "model_max_length": 5,
    }
    assert rendered(find_templates(None, config)) == "<s>|</s>||False"


def test_a_broken_template_in_a_bundle_is_a_template_error(tmp_path: Path) -> None:
    with pytest.raises(TemplateError):
        find_templates("{% for %}", {})
