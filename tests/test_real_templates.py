"""Chat templates of published models, shipped by trl: the same prompts as transformers' for OpenAI's client dumps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime.errors import PromptError, TemplateError
from edgelm.runtime.text.chat import ChatTemplate
from edgelm.runtime.text.messages import plain_messages
from edgelm.runtime.text.options import ChatOptions

from .conftest import byte_tokenizer, missing
from .served import client_of, saying_engine

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# Exceptions that transformers raises when it refuses messages.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError)


def _templates() -> list[Path]:
    found = importlib.util.find_spec("trl")
    folders = [] if found is None else found.submodule_search_locations or []
    return sorted(path for folder in folders for path in Path(folder).glob("chat_templates/*.jinja"))


TEMPLATES = {path.stem: path for path in _templates() if not path.stem.endswith("_training")}
NAMES = sorted(TEMPLATES) or ["none"]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city, 'now' & here.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
ASK = {"role": "user", "content": "What is the weather in Köln? <b>\n"}


def dumped(**fields: Any) -> dict[str, Any]:
    """An answer as OpenAI's client dumps it, with every field of its type."""
    from openai.types.chat import ChatCompletionMessage

    return ChatCompletionMessage.model_validate({"role": "assistant", **fields}).model_dump()


def conversations() -> dict[str, list[dict[str, Any]]]:
    function = {"name": "weather", "arguments": '{"city": "Köln"}'}
    call = dumped(content=None, tool_calls=[{"id": "call_123456", "type": "function", "function": function}])
    assert call["content"] is None and "refusal" in call
    result = {"role": "tool", "tool_call_id": "call_123456", "content": '{"sky": "grey"}'}
    answer = dumped(content=" Grey, I fear. ")
    return {
        "one question": [ASK],
        "turns": [{"role": "system", "content": "Be brief."}, ASK, answer, ASK],
        "a call": [ASK, call, result],
        "a call and more": [ASK, call, result, answer, ASK],
        "reasoning": [ASK, dumped(content="Yes.", reasoning_content="Hm?"), ASK],
        "thoughts": [ASK, dumped(content="<think>\nHm?\n</think>\n\nYes."), ASK],
        "parts": [{"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]}],
        "an answer": [ASK, answer],
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("reference")
    byte_tokenizer(folder)
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)


def outcome_of_transformers(reference: Any, source: str, messages: Any, **settings: Any) -> str | None:
    """The text, or None if transformers refuses."""
    import jinja2

    try:
        return str(reference.apply_chat_template(messages, chat_template=source, tokenize=False, **settings))
    except (jinja2.TemplateError, *REFUSALS):
        return None


def outcome(template: ChatTemplate, messages: Any, prompt: bool, options: ChatOptions) -> str | None:
    try:
        return template.render(plain_messages(messages), options, add_generation_prompt=prompt)
    except (PromptError, TemplateError):
        return None


def test_trl_has_at_least_twenty_templates() -> None:
    if not TEMPLATES:
        missing("trl, which ships templates of published models, is not installed (pip install --no-deps trl)")
    assert len(TEMPLATES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_one_of_transformers(reference: Any, name: str) -> None:
    if name not in TEMPLATES:
        missing("trl, which ships templates of published models, is not installed (pip install --no-deps trl)")
    pytest.importorskip("openai")
    source = TEMPLATES[name].read_text(encoding="utf-8")
    template = ChatTemplate(source, SPECIAL)
    variables = [{}, *({"enable_thinking": value} for value in (True, False) if "enable_thinking" in source)]
    compared = 0
    for title, messages in conversations().items():
        for prompt in (True, False):
            for tools in (None, TOOLS):
                for given in variables:
                    expected = outcome_of_transformers(
                        reference, source, messages, tools=tools, add_generation_prompt=prompt, **given
                    )
                    options = ChatOptions(tools=tools, template_variables=given)
                    assert outcome(template, messages, prompt, options) == expected, (title, prompt, given)
                    compared += expected is not None
        for field in (True, "reasoning_content"):
            expected = outcome_of_transformers(reference, source, messages, continue_final_message=field)
            options = ChatOptions(continue_final_message=field)
            assert outcome(template, messages, True, options) == expected, (title, field)
    assert compared >= 8


@pytest.mark.parametrize("name", NAMES)
def test_the_server_passes_earlier_calls_in_the_templates_form(name: str, tmp_path: Path) -> None:
    """Neither a text quoted twice, nor an object in Python's notation."""
    if name not in TEMPLATES:
        missing("trl, which ships templates of published models, is not installed (pip install --no-deps trl)")
    pytest.importorskip("openai")
    asked = {"messages": conversations()["a call"], "tools": TOOLS}
    template = TEMPLATES[name].read_text(encoding="utf-8")
    with saying_engine(tmp_path, template=template, context=20_000) as engine, client_of(engine) as client:
        answer = client.post("/apply-template", json=asked)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:  # the template does not accept these messages
        assert "chat template" in answer.json()["error"]["message"], answer.text
        return
    prompt = answer.json()["prompt"].split("What is the weather", 1)[-1]
    assert "weather" in prompt and ("city" in prompt or "Köln" in prompt), prompt
    assert "{'city'" not in prompt and '\\"city' not in prompt, prompt


def test_messages_from_openais_client_are_accepted_unchanged() -> None:
    pytest.importorskip("openai")
    from openai.types.chat import ChatCompletionMessage

    message = ChatCompletionMessage(role="assistant", content="Yes.")
    assert plain_messages([ASK, message]) == [ASK, {"role": "assistant", "content": "Yes."}]
