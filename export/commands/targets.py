"""`edgelm targets`: list the machines that a bundle can be made for, and explain their settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap

from ...targets import TargetError, available_targets, load_target, native_target, settings_of
from ..errors import RecipeError

SUMMARY = "list the machines that a bundle can be made for"
_WIDEST = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", help="target to explain: a name, or your own TOML file")
    parser.add_argument("--json", action="store_true", help="print all settings as JSON, with the reasons of a NAME")


def run(arguments: argparse.Namespace) -> int:
    """Read the profiles and print them."""
    if arguments.name is not None:
        return _explain(arguments.name, arguments.json)
    profiles = [load_target(name) for name in available_targets()]
    if arguments.json:
        print(
            json.dumps(
                {profile.name: {"description": profile.description, **profile.settings()} for profile in profiles}
            )
        )
        return 0
    here = native_target()
    for profile in profiles:
        print(f"{profile.name:10}{profile.description}{'  (this machine)' if profile.name == here else ''}")
        settings = (f"scheme {profile.scheme}", f"KV cache {profile.kv[profile.scheme]}", profile.provider)
        print(f"{'':10}{', '.join(settings)}")
    print("Why they are so:  edgelm targets NAME")
    return 0


def _explain(name: str, as_json: bool) -> int:
    try:
        settings = settings_of(name)
        profile = load_target(name)
    except TargetError as error:
        raise RecipeError(str(error)) from error
    if as_json:
        print(json.dumps({"name": profile.name, "settings": [dataclasses.asdict(setting) for setting in settings]}))
        return 0
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    reason = ""
    for setting in settings:
        if setting.reason != reason:
            print()
        value = ", ".join(setting.value) if isinstance(setting.value, (list, tuple)) else setting.value
        print(f"{setting.key} = {value}" + (f"   (of {setting.origin})" if setting.origin != profile.name else ""))
        if setting.reason and setting.reason != reason:
            print(textwrap.fill(setting.reason, width, initial_indent="    ", subsequent_indent="    "))
        reason = setting.reason
    return 0
