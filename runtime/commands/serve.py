"""`edgelm serve`: bundles behind OpenAI's HTTP interface, and a page to chat with."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.manifest import MANIFEST_NAME
from ..caches.responses.settings import ResponseCacheSettings
from ..engine import Engine
from ..errors import BundleMissingError, MissingExtraError, SettingsError
from ..host.files import read_text
from ..opening import load
from .folder import add_provider

if TYPE_CHECKING:
    from ..server.running import Listening
    from ..server.settings import ServerSettings

SUMMARY = "serve bundles over HTTP, as OpenAI's clients expect it"
_MIB = 1 << 20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _port(text: str) -> int:
    """A port's number. The system would silently take 99999 for 34463."""
    if not text.isascii() or not text.isdigit() or int(text[:9]) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r:.20} is not a port: give a number from 0 to 65535")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "bundles",
        nargs="+",
        metavar="BUNDLE",
        help="folder of a bundle, NAME=FOLDER, or a folder of bundles; each is loaded when it is first needed",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (127.0.0.1)")
    where.add_argument("--port", type=_port, default=8080, metavar="N", help="port, 0 for any free one (8080)")
    where.add_argument("--unix", type=Path, metavar="PATH", help="listen on a Unix socket instead")
    where.add_argument(
        "--ready-json",
        action="store_true",
        help="for a program that starts the server: print the address as one line of JSON, and end when the pipe on "
        "standard input is closed",
    )
    who = parser.add_argument_group("who may call")
    who.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line; readable by its owner only")
    who.add_argument("--no-key", action="store_true", help="also serve other machines without a key")
    who.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of this server")
    who.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="a web page that may call it: https://name"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--memory", type=int, metavar="MIB", help="memory for all loaded models (half of what is free)")
    limits.add_argument(
        "--max-waiting", type=int, default=64, metavar="N", help="requests that run or wait, per model (64)"
    )
    limits.add_argument("--max-body", type=int, default=4, metavar="MIB", help="largest body of a request (4)")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="if a request sets none (the rest of the context)")
    limits.add_argument("--drain", type=float, default=30.0, metavar="S", help="time to finish answers at the end (30)")
    limits.add_argument(
        "--sse-ping", type=float, default=10.0, metavar="S", help="comment on a stream after so much silence (10)"
    )
    more = parser.add_argument_group("more")
    more.add_argument("--threads", type=int, metavar="N", help="cores to compute with (the physical ones)")
    add_provider(parser)
    more.add_argument("--redis", metavar="URL", help="share answers with other machines through a Redis server")
    more.add_argument("--no-response-cache", action="store_true", help="do not keep answers")
    more.add_argument("--no-prefix-cache", action="store_true", help="do not keep computed prompts")
    more.add_argument("--no-page", action="store_true", help="serve no chat page at /")
    more.add_argument("--verbose", action="store_true", help="log each request")
    more.add_argument("--log-prompts", action="store_true", help="log prompts, too (implies --verbose)")


def run(arguments: argparse.Namespace) -> int:
    """Listen, load, serve until a signal ends it."""
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError("the server", "serve")
    verbose = arguments.verbose or arguments.log_prompts
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.INFO if verbose else logging.WARNING
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    settings, bundles = settings_of(arguments), find_bundles(arguments.bundles)
    open_engine = functools.partial(
        load,
        threads=arguments.threads,
        provider=arguments.provider,
        response_cache=_response_cache(arguments),
        prefix_cache=not arguments.no_prefix_cache,
    )
    with FirstLoad(open_engine, next(iter(bundles.values()))) as opening:
        # The server's own modules take a fifth of a start: they are imported while the first model is loaded.
        from ..server.application import app
        from ..server.running import Listening, address_of, bind
        from ..server.running import run as serve

        where = Listening(arguments.host, arguments.port, arguments.unix, arguments.drain, arguments.ready_json)
        application = app(bundles, settings, open_engine=opening)
        listener = bind(where)
        address = address_of(listener, where)
        names = list(bundles)
        ready = _ready_json(address, names) if arguments.ready_json else _ready(address, where, settings, names)
        serve(application, listener, where, lambda: print(ready, flush=True))
    return 0


class FirstLoad:
    """Opens bundles, one at a time. Entering the block begins to load the first one."""

    def __init__(self, open_engine: Callable[[Path], Engine], path: Path) -> None:
        self._open = open_engine
        self._path = path
        self._pool = ThreadPoolExecutor(1)
        self._first: Future[Engine] | None = None

    def __enter__(self) -> FirstLoad:
        self._first = self._pool.submit(self._open, self._path)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the first model if nobody asked for it."""
        first, self._first = self._first, None
        self._pool.shutdown()
        if first is not None and first.exception() is None:
            first.result().close()

    def __call__(self, path: Path) -> Engine:
        """Raises: as `load`."""
        if path != self._path or self._first is None:
            return self._open(path)
        first, self._first = self._first, None
        return first.result()


def settings_of(arguments: argparse.Namespace) -> ServerSettings:
    """The server's settings. Raises: SettingsError, also if other machines could call without a key."""
    from ..server.settings import LOOPBACK_HOSTS, ServerSettings

    keys = () if arguments.api_key_file is None else read_keys(arguments.api_key_file)
    here = arguments.unix is not None or arguments.host in _LOOPBACK
    if not here and not keys and not arguments.no_key:
        raise SettingsError(
            f"{arguments.host} may be reached from other machines: give --api-key-file, or --no-key to serve everyone"
        )
    hosts = (*LOOPBACK_HOSTS, *arguments.allow_host) if here else (*arguments.allow_host,) or None
    return ServerSettings(
        api_keys=keys,
        hosts=hosts,
        origins=tuple(arguments.allow_origin),
        max_body_bytes=arguments.max_body * _MIB,
        max_waiting=arguments.max_waiting,
        max_tokens=arguments.max_tokens,
        ping_s=arguments.sse_ping,
        memory_bytes=None if arguments.memory is None else arguments.memory * _MIB,
        page=not arguments.no_page,
        log_prompts=arguments.log_prompts,
    )


def _response_cache(arguments: argparse.Namespace) -> bool | ResponseCacheSettings:
    if arguments.redis is None:
        return not arguments.no_response_cache
    if arguments.no_response_cache:
        raise SettingsError("--redis keeps answers and --no-response-cache keeps none: give one of them")
    return ResponseCacheSettings(redis_url=arguments.redis)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line. Raises: SettingsError, also if other users may read it."""
    try:
        mode = path.stat().st_mode
        lines = read_text(path).splitlines()
    except OSError as error:
        raise SettingsError(f"the key file {path} cannot be read ({error}): give another") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"other users may read the key file {path}: run  chmod 600 {path}")
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise SettingsError(f"the key file {path} holds no key: write one a line")
    return keys


def find_bundles(words: Sequence[str]) -> dict[str, Path]:
    """Bundles by name. Raises: BundleMissingError, SettingsError for two of one name."""
    found: dict[str, Path] = {}
    for word in words:
        name, separator, rest = word.partition("=")
        named = bool(separator) and not Path(word).exists()
        folder = Path(rest if named else word)
        if not folder.is_dir():
            raise BundleMissingError(f"{folder} is not a folder: give the folder that  edgelm export  wrote")
        inner = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
        if named or (folder / MANIFEST_NAME).exists() or not inner:
            bundles = {name if named else folder.resolve().name: folder}
        else:
            bundles = {path.name: path for path in inner}
        for key, path in bundles.items():
            if key in found:
                raise SettingsError(f"two bundles are called {key!r}: name them as NAME=FOLDER")
            found[key] = path
    return found


def _ready(address: str, where: Listening, settings: ServerSettings, names: Sequence[str]) -> str:
    """The lines printed at the start: what is served, for whom, and how to call it."""
    local = where.unix is not None or where.host in _LOOPBACK
    who = "this machine" if local else f"all who reach {where.host}"
    lines = [
        f"serving {', '.join(names)} for {who}{', with a key' if settings.api_keys else ''}",
        f"OpenAI's interface at {address}/v1"
        if where.unix is None
        else f"OpenAI's interface on the socket {where.unix}",
    ]
    if settings.page and where.unix is None:
        lines.append(f"a page to chat with at {address}/")
    if where.unix is None:
        key = "-H 'Authorization: Bearer KEY' " if settings.api_keys else ""
        body = f'{{"model": "{names[0]}", "prompt": "Once upon a time", "max_tokens": 40}}'
        lines.append(f"try  curl {address}/v1/completions {key}-H 'Content-Type: application/json' -d '{body}'")
    return "\n".join([*lines, "Ctrl-C ends the server"])


def _ready_json(address: str, names: Sequence[str]) -> str:
    return json.dumps({"address": address, "models": names, "pid": os.getpid()})
