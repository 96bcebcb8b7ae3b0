"""`edgelm targets`: which machines a bundle can be made for."""

from __future__ import annotations

import argparse
import json

from ...targets import available_targets, load_target, native_target

SUMMARY = "list the machines that a bundle can be made for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print all settings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read the profiles and print them."""
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
    return 0
