"""The targets: each makes one random input and gives it to edgelm. An EdgelmError is an answer."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelm.runtime import Engine, GenerationSettings, load
from edgelm.runtime.bundle.folder import Bundle
from edgelm.runtime.bundle.manifest import parse_manifest
from edgelm.runtime.caches import budgets
from edgelm.runtime.caches.prefixes.settings import PrefixCacheSettings
from edgelm.runtime.caches.responses.settings import ResponseCacheSettings
from edgelm.runtime.cli import main
from edgelm.runtime.errors import EdgelmError
from edgelm.runtime.text.chat import ChatTemplate
from edgelm.runtime.text.messages import plain_messages
from edgelm.runtime.text.tokenizer import Tokenizer

from .kernels import random_graph
from .mutations import as_json, changed, damaged, odd, text

TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ loop.index0 | string }}{% endfor %}",
    "{{ messages[0].content | truncate(9) }}{{ cycler('a', 'b').next() }}{{ namespace(x=1).x }}",
    "{{ raise_exception('no') }}{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}",
    "{{ 'x' * 9 }}{{ '%s' % messages }}{{ '{0}'.format(1) }}{{ 'a'.center(9) }}{{ range(9) | list | batch(2) | list }}",
)
FILTERS = (
    "truncate(-9)", "string", "batch(0)", "center(99)", "round(9)", "join", "first", "slice(0)", "xmlattr", "int",
    "wordwrap(0)", "indent(-1)", "tojson", "sum", "sort", "unique", "map('x')", "replace('', 'x')", "format(1)",
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [1, "a", None]}, "l": {"type": "array"}},
    "required": ["name"],
    "additionalProperties": False,
}
SETTINGS: dict[str, Any] = {
    "max_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 1, "stop": ["a"], "stream": 1,
    "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {3: 1.0}, "logprobs": 2,
    "min_tokens": 1, "timeout": 5.0, "regex": "a+", "json_schema": SCHEMA, "context_full": "stop",
}  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "3", "tool_call_id": "1"},
]
COMMANDS = {
    "run": ["--max-tokens", "--temperature", "--stats", "--json", "--raw", "--prompts", "--json-schema", "--seed"],
    "inspect": ["--json", "--report", "--graph"],
    "cache": ["budget", "check", "clear", "--json", "--responses-disk", "--prefixes-disk"],
    "bench": ["--prompt-tokens", "--max-tokens", "--json"],
    "verify": ["--json", "--text"],
    "targets": ["--json", "x86-cpu"],
    "eval": ["--text", "--window", "--stride", "--json"],
}
_PLACES = ("budgets.json", "prefixes/budget", "responses/responses.sqlite", "responses/lock", "prefixes/ab/x.kv")


class Targets:
    """All targets over one bundle, in a folder of their own."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.tokenizer = Tokenizer(bundle / "tokenizer.json")
        self._engine: Engine | None = None

    def engine(self) -> Engine:
        """An engine over the unchanged bundle, without caches."""
        if self._engine is None:
            self._engine = load(self.bundle, threads=1, response_cache=False, prefix_cache=False)
        return self._engine

    def load_with_disk(self) -> Engine:
        """An engine that stores answers and prefixes in EDGELM_HOME."""
        return load(self.bundle, threads=1, response_cache=ResponseCacheSettings(), prefix_cache=PrefixCacheSettings())

    def all(self) -> dict[str, Callable[[random.Random], None]]:
        """The targets by name."""
        names = ("manifest", "template", "tokenizer", "settings", "schema", "messages", "budgets", "home", "command",
                 "kernels")  # fmt: skip
        return {name: getattr(self, f"try_{name}") for name in names}

    def copy(self) -> Path:
        """A copy of the bundle whose files may be replaced."""
        target = self.folder / "bundle"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in self.bundle.iterdir():
            (target / path.name).symlink_to(path)
        return target

    def try_manifest(self, source: random.Random) -> None:
        """A changed manifest, parsed, opened and shown."""
        data = changed(json.loads((self.bundle / "manifest.json").read_text(encoding="utf-8")), source)
        written = as_json(data, source)
        with contextlib.suppress(EdgelmError):
            parse_manifest(written)
        target = self.copy()
        (target / "manifest.json").unlink()
        (target / "manifest.json").write_text(written, encoding="utf-8", errors="replace")
        with contextlib.suppress(EdgelmError):
            Bundle.open(target)
        self.command(["inspect", str(target), *source.choice(([], ["--json"], ["--report"]))])

    def try_template(self, source: random.Random) -> None:
        """A changed template, compiled and rendered."""
        template = source.choice(TEMPLATES)
        if source.random() < 0.5:
            template = template.replace("}}", f" | {source.choice(FILTERS)} }}}}")
        if source.random() < 0.5:
            template = damaged(template.encode(), source).decode("utf-8", "replace")
        with contextlib.suppress(EdgelmError):
            ChatTemplate(template, {"bos_token": "<s>"}).render(plain_messages(changed(MESSAGES, source)))

    def try_tokenizer(self, source: random.Random) -> None:
        """A damaged tokenizer.json, or an odd text for an intact one."""
        if source.random() < 0.7:
            for special in (True, False):
                with contextlib.suppress(EdgelmError):
                    self.tokenizer.decode(self.tokenizer.encode(text(source, 300), special=special))
            return
        path = self.folder / "tokenizer.json"
        path.write_bytes(damaged((self.bundle / "tokenizer.json").read_bytes(), source))
        with contextlib.suppress(EdgelmError):
            Tokenizer(path).encode("Once")

    def try_settings(self, source: random.Random) -> None:
        """Settings with odd values."""
        given = {name: SETTINGS[name] for name in source.sample(sorted(SETTINGS), 3)}
        given = changed(given, source, 2)
        if not isinstance(given, dict):
            return
        with contextlib.suppress(EdgelmError):
            settings = GenerationSettings.of(None, given)
            self.engine().generate("Once", settings=settings)

    def try_schema(self, source: random.Random) -> None:
        """A changed schema, and the beginning of an answer that follows it."""
        with contextlib.suppress(EdgelmError):
            self.engine().generate("Once", max_tokens=3, timeout=5, json_schema=changed(SCHEMA, source))

    def try_messages(self, source: random.Random) -> None:
        """Changed messages, prompts and token ids."""
        kind = source.choice(("messages", "prompt", "token_ids"))
        value = {"messages": MESSAGES, "prompt": "Once", "token_ids": [1, 2, 3]}[kind]
        with contextlib.suppress(EdgelmError):
            self.engine().generate(**{kind: changed(value, source)}, max_tokens=1)  # type: ignore[arg-type]

    def try_budgets(self, source: random.Random) -> None:
        """A changed budgets.json, read strictly and as `load` reads it."""
        home = self.home()
        usual = {"version": 1, **budgets.Budgets().values()}
        (home / budgets.FILE_NAME).write_text(as_json(changed(usual, source), source), "utf-8", "replace")
        with contextlib.suppress(EdgelmError):
            budgets.read_budgets(home)
        budgets.default_budgets()

    def home(self) -> Path:
        """EDGELM_HOME, empty."""
        home = self.folder / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        os.environ["EDGELM_HOME"] = str(home)
        return home

    def try_home(self, source: random.Random) -> None:
        """A used home folder is damaged and used again: the answers stay the same."""
        home = self.home()
        with self.load_with_disk() as engine:
            expected = engine.generate("Once upon a time there was a little girl", max_tokens=3).token_ids
        files = [path for path in home.rglob("*") if path.is_file()]
        for path in [source.choice(files), home / source.choice(_PLACES)]:
            self.spoil(path, source)
        with contextlib.suppress(EdgelmError), self.load_with_disk() as engine:
            got = engine.generate("Once upon a time there was a little girl", max_tokens=3).token_ids
            assert got == expected, f"{got} in place of {expected}"
        self.command(["cache", source.choice(("check", "clear")), "--json"])

    @staticmethod
    def spoil(path: Path, source: random.Random) -> None:
        """Damage a file, or replace it with something else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 30 else b"x"
        if path.is_dir():
            return
        path.unlink(missing_ok=True)
        kind = source.randrange(6)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.symlink_to("/dev/zero")
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            with path.open("wb") as file:
                file.truncate(1 << 40)
        elif kind == 4:
            path.write_bytes(damaged(data, source))
        else:
            path.write_text(str(odd(source)), encoding="utf-8", errors="replace")

    def try_command(self, source: random.Random) -> None:
        """A command with odd words."""
        name = source.choice(sorted(COMMANDS))
        known = [*COMMANDS[name], *COMMANDS[name], str(self.folder), "-1", "0", "x", text(source)]
        words = [name, *source.choices(known, k=source.randrange(5))]
        if name not in ("cache", "targets"):
            words.insert(1, str(self.bundle))
        self.home()
        self.command(words)

    @staticmethod
    def command(words: list[str]) -> None:
        """Run a command without input. Its exit status is 0, 1 or 2, and it prints at most one line of errors."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status: Any = main(words)
            except SystemExit as end:
                status = end.code
        assert status in (None, 0, 1, 2), (words, status)
        assert "Traceback" not in err.getvalue(), (words, err.getvalue())

    def try_kernels(self, source: random.Random) -> None:
        """A graph with one call of a kernel."""
        random_graph(source)
