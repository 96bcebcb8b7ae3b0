"""`edgelm`: finds a command, parses its arguments, runs it, turns errors into one line and an exit status.

Only the module of the command that was asked for is imported, so that `edgelm run` starts as fast as it can. Commands
of other packages are found through the entry point group `edgelm.commands`.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import EdgelmError, SettingsError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS_GROUP = "edgelm.commands"
_OWN = ("run", "chat", "inspect", "verify", "bench", "cache", "doctor", "eval", "serve")
# Words after which a command only prints help, or the version.
_SILENT = ("serve",)
_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The `edgelm` program. Returns the exit status. Prints what the command prints, and at most one error line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # run as the program, not called from one
        signal.signal(signal.SIGTERM, _end)
        if sys.platform == "win32":  # Ctrl-Break, and a console that is closed
            signal.signal(signal.SIGBREAK, _end)
    name = next((word for word in words if not word.startswith("-")), None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An output whose encoding lacks a character gets an escape in its place. In files and pipes, Windows' code page
        # would lack most, and no reader of JSON would guess it.
        is_file = sys.platform == "win32" and not sys.stdout.isatty()
        sys.stdout.reconfigure(errors="backslashreplace", encoding="utf-8" if is_file else None)
    return one_line_errors(lambda: _dispatch(name, words), "--debug" in words)


def one_line_errors(command: Callable[[], int], debug: bool) -> int:
    """Run a command. An EdgelmError, or an error of the system, becomes one line and an exit status."""
    try:
        return _printed(command)
    except EdgelmError as error:
        return _fail(str(error), error, debug)
    except BrokenPipeError as error:
        return _fail("the output was closed before everything was written", error, debug)
    except KeyboardInterrupt:
        print("edgelm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except OSError as error:
        return _fail(f"the system refused: {error}", error, debug)
    finally:
        _drop_unwritable()


def _printed(command: Callable[[], int]) -> int:
    """Run a command and write out what it printed, so that a full disk is noticed here. Raises: OSError."""
    try:
        status = command()
    except SystemExit:  # argparse printed help
        _flush()
        raise
    _flush()
    return status


def _flush() -> None:
    if sys.stdout is not None:  # closed before we started
        sys.stdout.flush()


def _drop_unwritable() -> None:
    """Send output that cannot be written (full disk, closed pipe) to the null device. It is still in its buffer: the
    interpreter would try to write it at exit, and end with a message and a status of its own."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require_characters(words: list[str]) -> None:
    """No file name and no terminal can hold half of a surrogate pair, except on Windows. Raises: SettingsError."""
    for word in words:
        try:
            os.fsencode(word)
        except UnicodeEncodeError as error:
            raise SettingsError(f"{word!a} holds half of a surrogate pair: write the whole character") from error


def _dispatch(name: str | None, words: list[str]) -> int:
    if name is None:
        return _general(words)
    module = _find(name)
    if module is None:
        print(f"edgelm: unknown command {name!r}: there is {', '.join(_names())}", file=sys.stderr)
        return _USAGE
    words.remove(name)
    _require_characters(words)
    given = make_parser(name, module).parse_intermixed_args(words)
    if sys.stdout is None and name not in _SILENT:
        raise SettingsError("standard output is closed, so nothing can be printed: open it, or send it to /dev/null")
    status: int = module.run(given)
    return status


def make_parser(name: str, module: Any) -> argparse.ArgumentParser:
    """The parser of a command's arguments. module: the command's, with SUMMARY and add_arguments."""
    parser = argparse.ArgumentParser(prog=f"edgelm {name}", description=module.SUMMARY)
    module.add_arguments(parser)
    add_debug(parser)
    return parser


def _end(number: int, _: object) -> NoReturn:
    """Handler of signals that end the program: raising lets temporary files be removed on the way out."""
    print("edgelm: terminated", file=sys.stderr)
    raise SystemExit(128 + number)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Declare `--debug`, which each command has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _general(words: list[str]) -> int:
    """`edgelm` without a command: --help and --version."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(
        prog="edgelm",
        description="Compress a language model to INT8 for the machine it will run on, and run it without PyTorch.",
        epilog="\n".join(["commands:", *(f"  {name:10}{_summary(name)}" for name in _names())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="edgelm COMMAND ...  (edgelm COMMAND --help tells more)",
    )
    parser.add_argument("--version", action="version", version=f"edgelm {version('edgelm')}")
    add_debug(parser)
    parser.parse_args(words)
    parser.print_help()
    return 0 if not words else _USAGE


def _names() -> list[str]:
    return sorted({*_OWN, *(entry.name for entry in _foreign_commands())})


def _find(name: str) -> Any:
    """The module of a command, or None. Raises: EdgelmError, if a command of another distribution cannot be
    imported."""
    if name in _OWN:
        return importlib.import_module(f".commands.{name}", __package__)
    for entry in _foreign_commands():
        if entry.name == name:
            try:
                return entry.load()
            except (ImportError, AttributeError) as error:
                raise EdgelmError(
                    f"the command {name} is announced and cannot be imported ({error}): install it again, or, in a "
                    "frozen program, pack it too"
                ) from error
    return None


def _summary(name: str) -> str:
    try:
        return str(_find(name).SUMMARY)
    except EdgelmError:
        return "(cannot be imported here)"


def _foreign_commands() -> Collection[EntryPoint]:
    from importlib.metadata import entry_points  # 4 MB, which `edgelm run` can do without

    found = entry_points(group=COMMANDS_GROUP)
    # A frozen program has edgelm's metadata, which name the exporter's commands too, but not the exporter.
    return [entry for entry in found if _is_packed(entry.module)] if getattr(sys, "frozen", False) else found


def _is_packed(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _fail(message: str, error: BaseException, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    # A message may quote a file or a name: escape sequences in it must not reach the terminal.
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(message.split()))
    print(f"edgelm: error: {shown}", file=sys.stderr)
    return _FAILED


if __name__ == "__main__":
    sys.exit(main())
