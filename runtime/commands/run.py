"""`edgelm run`: answer one prompt, or those of a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import PromptError, SettingsError
from ..host.files import naming
from ..opening import load
from ..results import Chunk, Completion, Stats
from ..serving.answer import completion
from ..serving.batches import MAX_ROWS, Prompt
from .folder import add_folder, add_loading, add_provider, loading_of
from .messages import add_chat_options, chat_options_of, typed
from .settings import add_settings, settings_of

SUMMARY = "answer a prompt with a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_folder(parser)
    add_provider(parser)
    parser.add_argument("prompt", nargs="?", help="the prompt; read from standard input if it is missing or -")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="answer each line of a file (- for standard input), several at once, as lines of JSON",
    )
    parser.add_argument(
        "--max-rows", type=int, metavar="N", help=f"with --prompts: answers at once ({MAX_ROWS}); each takes memory"
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt's text without the chat template")
    parser.add_argument("--chat", action="store_true", help="use the chat template; fail if the bundle has none")
    parser.add_argument("--system", metavar="TEXT", help="a system message in front of the prompt (implies --chat)")
    parser.add_argument(
        "--begin", metavar="TEXT", help="the beginning of the answer, which is not printed (implies --chat)"
    )
    add_loading(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (the physical ones)")
    parser.add_argument("--no-response-cache", action="store_true", help="do not use or fill the response cache")
    parser.add_argument("--no-prefix-cache", action="store_true", help="do not use or fill the prefix cache")
    parser.add_argument("--stats", action="store_true", help="show counts and times on standard error")
    parser.add_argument("--json", action="store_true", help="print the whole answer as one JSON object")
    add_chat_options(parser)
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
    many = arguments.prompts is not None
    if settings.logprobs is not None and not (arguments.json or many):
        raise SettingsError("--logprobs belongs to --json: give both")
    if many and arguments.prompt is not None:
        raise PromptError("there is a prompt and a file of prompts: give one of them")
    options = chat_options_of(arguments)
    if arguments.raw and (_needs_template(arguments) or options):
        raise SettingsError(
            "--raw leaves out the chat template, which --chat, --system, --begin and the options for messages need: "
            "give one of them"
        )
    if arguments.max_rows is not None and not many:
        raise SettingsError("--max-rows belongs to --prompts: give both")
    text = _text(arguments.prompts) if many else _prompt(arguments.prompt)
    with load(
        arguments.bundle,
        graph=arguments.graph,
        threads=arguments.threads,
        provider=arguments.provider,
        **loading_of(arguments),
        response_cache=not arguments.no_response_cache,
        prefix_cache=not arguments.no_prefix_cache,
    ) as engine:
        if many:
            _answer_lines(engine, arguments, text, {**options, "settings": settings})
            return 0
        request = {**_request(engine, arguments, text), **options, "settings": settings}
        if arguments.json:
            _print_json(engine.generate(**request))
        else:
            stats = _print_stream(engine, request)
            if arguments.stats:
                print(summary(stats), file=sys.stderr)
    return 0


def _answer_lines(engine: Engine, arguments: argparse.Namespace, text: str, options: dict[str, Any]) -> None:
    """Print answers in the order of the lines, each as soon as it and those before it are finished."""
    # Only LF and CRLF end a line: other characters that `splitlines` splits at may stand in a prompt.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    requests = [_request(engine, arguments, line) for line in lines]
    prompts: list[Prompt] = [request["messages" if "messages" in request else "prompt"] for request in requests]
    if any("continue_final_message" in request for request in requests):
        options = {**options, "continue_final_message": True}
    rows = MAX_ROWS if arguments.max_rows is None else arguments.max_rows
    parts: dict[int, list[Chunk]] = defaultdict(list)
    started, printed, tokens = time.perf_counter(), 0, 0
    for index, chunk in engine.stream_batch(prompts, max_rows=rows, **options):
        parts[index].append(chunk)
        tokens += len(chunk.token_ids)
        while printed in parts and parts[printed][-1].finish_reason is not None:
            _print_json(completion(options["settings"], parts.pop(printed)))
            printed += 1
    if arguments.stats:
        rate = tokens / (time.perf_counter() - started)
        print(f"{printed} answers, {tokens} tokens generated at {rate:.1f} tokens/s", file=sys.stderr)


def _print_json(done: Completion) -> None:
    answer = dataclasses.asdict(done)
    if done.logprobs is None:
        del answer["logprobs"]
    print(json.dumps(answer, ensure_ascii=False), flush=True)


def _request(engine: Engine, arguments: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """Arguments of `generate`. A model that was trained to chat gets a user's message: on plain text it may end at
    once."""
    if not _needs_template(arguments) and (arguments.raw or not engine.takes_messages or not prompt):
        return {"prompt": prompt}
    messages: Sequence[dict[str, str]] = [{"role": "user", "content": prompt}]
    if arguments.system is not None:
        messages = [{"role": "system", "content": typed(arguments.system)}, *messages]
    if arguments.begin is None:
        return {"messages": messages}
    begun = [*messages, {"role": "assistant", "content": typed(arguments.begin)}]
    return {"messages": begun, "continue_final_message": True}


def _needs_template(arguments: argparse.Namespace) -> bool:
    return arguments.chat or arguments.system is not None or arguments.begin is not None


def _print_stream(engine: Engine, request: dict[str, Any]) -> Stats | None:
    stats = None
    for chunk in engine.stream(**request):
        print(chunk.text, end="", flush=True)
        stats = chunk.stats
    print(flush=True)  # before anything goes to standard error
    return stats


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return typed(given)
    text = _text("-")
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _text(name: str) -> str:
    """The text of a file, or of standard input for "-", without Windows' byte order mark."""
    if name == "-":
        data, source = sys.stdin.buffer.read() if sys.stdin is not None else b"", "standard input"
    else:
        with naming(Path(name)):  # also of a pipe, such as the shell's <(command)
            data, source = Path(name).read_bytes(), name
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error


def summary(stats: Stats | None) -> str:
    """The figures of an answer in one line."""
    if stats is None:
        return ""
    if stats.response_cache_hit:
        return f"{stats.prompt_tokens} prompt tokens, {stats.generated_tokens} from the response cache"
    drafts = (
        f"{stats.accepted_tokens} of {stats.guessed_tokens} draft tokens accepted, " if stats.guessed_tokens else ""
    )
    reused = f" ({stats.reused_tokens} known)" if stats.reused_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens{reused}, first token after {stats.time_to_first_token_s * 1000:.0f} ms, "
        f"{stats.generated_tokens} generated at {stats.decode_tokens_per_s:.1f} tokens/s, "
        f"{drafts}{stats.resident_bytes / 1e6:.0f} MB resident"
    )
