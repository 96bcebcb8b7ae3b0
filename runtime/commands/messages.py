"""The chat template's options (`ChatOptions`) as options of commands."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..host.files import read_text


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each. Options that are not given are not set."""
    group = parser.add_argument_group("messages", "for the model's chat template")

    def add(option: str, **settings: Any) -> None:
        group.add_argument(option, default=argparse.SUPPRESS, **settings)

    add("--tools", type=Path, metavar="FILE", help="functions that the model may call: a JSON list of descriptions")
    add("--documents", type=Path, metavar="FILE", help="texts to answer from: a JSON list of objects")
    add(
        "--template-variable",
        dest="template_variables",
        action="append",
        type=_variable,
        metavar="NAME=VALUE",
        help="set a variable of the template, such as enable_thinking=false; may be repeated",
    )
    add(
        "--tokens-in-messages",
        action="store_true",
        help="read special tokens in messages as tokens, not as plain text",
    )


def chat_options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as keywords of `Engine.generate`. Raises: SettingsError."""
    names = ("tools", "documents", "template_variables", "tokens_in_messages")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    for name in given.keys() & {"tools", "documents"}:
        given[name] = _read(given[name])
    if "template_variables" in given:
        given["template_variables"] = dict(given["template_variables"])
    return given


def typed(text: str) -> str:
    """A text of the command line as the terminal sent it: in some locales Python reads arguments as ASCII."""
    try:
        return os.fsencode(text).decode("utf-8") if any(0xDC80 <= ord(letter) <= 0xDCFF for letter in text) else text
    except UnicodeError:
        return text


def value_of(text: str) -> Any:
    """A value on a command line: JSON (0.7, null, ["a"]), or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _variable(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as enable_thinking=false")
    return name, value_of(value)


def _read(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}): give another file") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not JSON ({error}): give another file") from error
