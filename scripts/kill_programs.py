"""Kill answering programs, and check that none of their caches loses or changes anything.

    python scripts/kill_programs.py BUNDLE [--kills 1000] [--seed 0]

Two programs at a time answer prompts with all caches in one home folder. The prefix cache has room for only a few
prompts, so blocks are evicted constantly. A program prints each answer once it is complete, and is killed with SIGKILL
at a random moment. Each printed answer must be that of an engine without caches. After every 20 kills and at the end,
each must be in the response cache, word for word, and all caches must pass their own check. Exit status 1
otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgelm.runtime import Engine, PrefixCacheSettings, ResponseCacheSettings, load
from edgelm.runtime.caches.kinds import cache_kinds

_PROMPTS, _PROMPT_TOKENS, _ANSWER_TOKENS = 400, (40, 100), 8
_PROGRAMS = 2
_LONGEST_LIFE_S = 2.5


def main() -> int:
    """Parse, run, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder that  edgelm export  wrote")
    parser.add_argument("--kills", type=int, default=1000, help="programs to kill (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and moments (%(default)s)")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.home is not None:
        _answer(arguments.bundle, arguments.home, arguments.seed)
        return 0
    with tempfile.TemporaryDirectory() as home:
        return _kill(arguments, Path(home))


def _answer(bundle: Path, home: Path, seed: int) -> None:
    """The program: answers prompts in random order and prints each answer, until it is killed."""
    source = random.Random(seed)  # noqa: S311, not for cryptography
    with _open(bundle, home) as engine:
        while True:
            number = source.randrange(_PROMPTS)
            answer = engine.generate(token_ids=_prompt(engine, number), max_tokens=_ANSWER_TOKENS)
            os.write(1, (json.dumps([number, answer.token_ids]) + "\n").encode())


def _open(bundle: Path, home: Path) -> Engine:
    prefixes = PrefixCacheSettings(disk_bytes=2**20, memory_bytes=0, folder=home / "prefixes")
    return load(
        bundle,
        threads=1,
        response_cache=ResponseCacheSettings(folder=home / "responses", memory_bytes=0),
        prefix_cache=prefixes,
        prepare=True,
    )


def _prompt(engine: Engine, number: int) -> list[int]:
    """Prompts share one of eight prefixes."""
    size = engine.bundle.manifest.model.vocab_size
    shared, own = (random.Random(seed) for seed in (number % 8, _PROMPTS + number))  # noqa: S311
    beginning = [shared.randrange(size) for _ in range(_PROMPT_TOKENS[0])]
    return beginning + [own.randrange(size) for _ in range(own.randrange(1, _PROMPT_TOKENS[1] - _PROMPT_TOKENS[0]))]


def _kill(arguments: argparse.Namespace, home: Path) -> int:
    os.environ["EDGELM_HOME"] = str(home)
    source = random.Random(arguments.seed)  # noqa: S311
    printed: dict[int, list[int]] = {}
    right: dict[int, list[int]] = {}
    with load(arguments.bundle, threads=1, response_cache=False, prefix_cache=False) as plain:
        for kill in range(0, arguments.kills, _PROGRAMS):
            for number, answer in _killed(arguments.bundle, home, kill, source):
                if number not in right:
                    prompt = _prompt(plain, number)
                    right[number] = list(plain.generate(token_ids=prompt, max_tokens=_ANSWER_TOKENS).token_ids)
                if answer != right[number]:
                    print(f"kill {kill}: the answer to prompt {number} is {answer}, not {right[number]}")
                    return 1
                printed[number] = answer
            last = kill + _PROGRAMS >= arguments.kills
            if kill % (10 * _PROGRAMS) == 0 or last:
                for kind in cache_kinds(home):
                    kind.check()
                lost = _lost(arguments.bundle, home, plain, printed)
                print(
                    f"{kill + _PROGRAMS:5} programs killed, {len(printed)} answers printed, {len(lost)} lost",
                    flush=True,
                )
                if lost:
                    return 1
    return 0


def _killed(bundle: Path, home: Path, seed: int, source: random.Random) -> list[tuple[int, list[int]]]:
    """Start the programs, kill them, and return what they printed."""
    words = [sys.executable, __file__, str(bundle), "--home", str(home)]
    programs = [
        subprocess.Popen([*words, "--seed", str(seed + index)], stdout=subprocess.PIPE, text=True)
        for index in range(_PROGRAMS)
    ]
    time.sleep(source.random() * _LONGEST_LIFE_S)
    printed = []
    for program in programs:
        program.kill()
        text, _ = program.communicate()
        # An incomplete line does not count as printed.
        printed += [tuple(json.loads(line)) for line in text.split("\n")[:-1]]
    return printed


def _lost(bundle: Path, home: Path, plain: Engine, printed: dict[int, list[int]]) -> list[int]:
    """Prompts whose answer is missing from the response cache, or differs."""
    with _open(bundle, home) as engine:
        found = {
            number: engine.generate(token_ids=_prompt(plain, number), max_tokens=_ANSWER_TOKENS) for number in printed
        }
    return [
        number
        for number, answer in found.items()
        if not answer.stats.response_cache_hit or list(answer.token_ids) != printed[number]
    ]


if __name__ == "__main__":
    sys.exit(main())
