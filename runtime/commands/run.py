"""`edgelm run`: answer one prompt."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..engine import Engine, load
from ..errors import PromptError, SettingsError
from ..results import Stats
from .folder import add_folder
from .settings import add_settings, settings_of

SUMMARY = "answer a prompt with a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_folder(parser)
    parser.add_argument("prompt", nargs="?", help="the prompt; read from standard input if it is missing or -")
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message through the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message in front of it (implies --chat)")
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (physical cores)")
    parser.add_argument(
        "--no-response-cache", action="store_true", help="compute the answer even if it is known, and do not keep it"
    )
    parser.add_argument(
        "--no-prefix-cache", action="store_true", help="compute the whole prompt, and do not keep what was computed"
    )
    parser.add_argument("--stats", action="store_true", help="show counts and times on standard error")
    parser.add_argument("--json", action="store_true", help="print the whole answer as one JSON object")
    add_settings(parser)
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="with --json: log-probabilities of each token and of the N most likely ones",
    )


def run(arguments: argparse.Namespace) -> int:
    """Load, generate, print."""
    settings = settings_of(arguments)
    if settings.logprobs is not None and not arguments.json:
        raise SettingsError("--logprobs belongs to --json: give both")
    prompt = _prompt(arguments.prompt)
    caches = {"response_cache": not arguments.no_response_cache, "prefix_cache": not arguments.no_prefix_cache}
    with load(arguments.bundle, graph=arguments.graph, threads=arguments.threads, **caches) as engine:
        request = {**_request(arguments, prompt), "settings": settings}
        if arguments.json:
            done = engine.generate(**request)
            answer = dataclasses.asdict(done)
            if done.logprobs is None:
                del answer["logprobs"]
            print(json.dumps(answer, ensure_ascii=False))
        else:
            stats = _print_stream(engine, request)
            if arguments.stats:
                print(summary(stats), file=sys.stderr)
    return 0


def _request(arguments: argparse.Namespace, prompt: str) -> dict[str, Any]:
    if not arguments.chat and arguments.system is None:
        return {"prompt": prompt}
    messages: Sequence[dict[str, str]] = [{"role": "user", "content": prompt}]
    if arguments.system is not None:
        messages = [{"role": "system", "content": arguments.system}, *messages]
    return {"messages": messages}


def _print_stream(engine: Engine, request: dict[str, Any]) -> Stats | None:
    stats = None
    for chunk in engine.stream(**request):
        print(chunk.text, end="", flush=True)
        stats = chunk.stats
    print()
    return stats


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"standard input is not UTF-8 text ({error.reason} at byte {error.start}): convert it"
        ) from error


def summary(stats: Stats | None) -> str:
    """The figures of an answer in one line."""
    if stats is None:
        return ""
    if stats.response_cache_hit:
        return f"{stats.prompt_tokens} prompt tokens, {stats.generated_tokens} from the response cache"
    guesses = f"{stats.accepted_tokens} of {stats.guessed_tokens} guesses came, " if stats.guessed_tokens else ""
    reused = f" ({stats.reused_tokens} known)" if stats.reused_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens{reused}, first token after {stats.time_to_first_token_s * 1000:.0f} ms, "
        f"{stats.generated_tokens} generated at {stats.decode_tokens_per_s:.1f} tokens/s, "
        f"{guesses}{stats.resident_bytes / 1e6:.0f} MB resident"
    )
