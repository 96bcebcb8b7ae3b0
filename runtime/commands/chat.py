"""`edgelm chat`: a conversation in the terminal. Answers go to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import PromptError, TemplateError
from ..opening import load
from ..text.conversation import Conversation
from .conversing import Chat
from .folder import add_loading, add_provider, loading_of
from .messages import add_chat_options, chat_options_of, typed
from .settings import add_settings, settings_of

SUMMARY = "talk with a model in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder that  edgelm export  wrote, of a model with a chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message for the conversation")
    parser.add_argument("--load", type=Path, metavar="FILE", help="continue a conversation that /save wrote")
    add_provider(parser)
    add_loading(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute with (the physical ones)")
    parser.add_argument("--no-prefix-cache", action="store_true", help="do not use or fill the prefix cache")
    add_chat_options(parser)
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load the bundle, then ask and answer until the end of the input."""
    settings, options = settings_of(arguments), chat_options_of(arguments)
    if sys.stdin is None:
        raise PromptError("standard input is closed, so there is nobody to chat with: open it, or use  edgelm run")
    conversation = Conversation()
    if arguments.load is not None:
        conversation.load(arguments.load)
    if arguments.system is not None:
        conversation.system = typed(arguments.system)
    known = not arguments.no_prefix_cache
    place = {"threads": arguments.threads, "provider": arguments.provider, **loading_of(arguments)}
    with load(arguments.bundle, **place, response_cache=False, prefix_cache=known) as engine:
        if not engine.takes_messages:
            raise TemplateError(
                f"{arguments.bundle} has no chat template, so it cannot chat: continue a text with  edgelm run"
            )
        Chat(engine, conversation, settings, options).loop()
    return 0
