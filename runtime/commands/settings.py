"""The generation settings as options of commands."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..host.files import read_text
from ..settings import DEFAULT_MAX_TOKENS, GenerationSettings


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each setting that a command line can hold. Options that are not given are not set."""
    group = parser.add_argument_group("generation", "docs/generation.md explains them")

    def add(option: str, kind: type, metavar: str, text: str) -> None:
        group.add_argument(option, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)

    add("--max-tokens", int, "N", f"generate at most N tokens ({DEFAULT_MAX_TOKENS})")
    add("--min-tokens", int, "N", "generate at least N tokens before the answer may end (0)")
    add("--temperature", float, "T", "draw tokens at this temperature; 0 takes the most likely one (0)")
    add("--top-k", int, "K", "draw from the K most likely tokens")
    add("--top-p", float, "P", "draw from the most likely tokens that together have the probability P")
    add("--min-p", float, "P", "draw from tokens at least P times as likely as the most likely one")
    add("--repetition-penalty", float, "R", "make tokens of the prompt and the answer less likely (1: off)")
    add("--presence-penalty", float, "R", "make tokens that the answer has less likely (0: off)")
    add("--frequency-penalty", float, "R", "the same for each time that they occur (0: off)")
    add("--seed", int, "N", "draw the same tokens in each run")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="end the answer in front of this text; may be repeated",
    )
    group.add_argument(
        "--stop-token-id",
        dest="stop_token_ids",
        action="append",
        type=int,
        metavar="ID",
        default=argparse.SUPPRESS,
        help="end the answer at this token; may be repeated",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID=VALUE",
        default=argparse.SUPPRESS,
        help="add VALUE to a token's logit; -inf bans it; may be repeated",
    )
    add("--timeout", float, "S", "end the answer after S seconds, even if it is not complete")
    group.add_argument(
        "--context-full",
        choices=("stop", "slide"),
        default=argparse.SUPPRESS,
        help="when the context is full: end the answer, or forget the older half of the text (stop)",
    )
    add("--keep", int, "N", "with --context-full slide: never forget the first N tokens (0)")
    add("--json-schema", Path, "FILE", "make the answer follow a JSON schema")
    add("--regex", str, "PATTERN", "make the answer follow a regular expression")
    add("--lark", Path, "FILE", "make the answer follow a grammar, in llguidance's form of Lark")
    group.add_argument(
        "--special-tokens",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show special tokens in the answer, such as markers of tool calls",
    )
    group.add_argument(
        "--no-lookup",
        dest="lookup",
        action="store_false",
        default=argparse.SUPPRESS,
        help="no draft tokens (prompt-lookup decoding): the answer is the same, but slower",
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    return int(token), float(value)


# What the parsed arguments may hold: every setting, so that no option is ignored.
_OPTIONS = tuple(item.name for item in dataclasses.fields(GenerationSettings))
# Settings whose option names a file, and what the file holds.
_FILES = {"json_schema": "schema", "lark": "grammar"}


def settings_of(arguments: argparse.Namespace) -> GenerationSettings:
    """The settings that were given. Raises: SettingsError."""
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _OPTIONS if hasattr(arguments, name)}
    for name, content in _FILES.items():
        if name in given:
            given[name] = _read(given[name], content)
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return GenerationSettings.of(None, given)


def _read(path: Path, content: str) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise SettingsError(f"the {content} {path} cannot be read: {error.strerror}") from error
