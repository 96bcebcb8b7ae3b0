"""Measure what draft tokens save if an answer repeats its prompt, and what they cost if nothing repeats.

    python scripts/bench_lookup.py [--work build/bench] [--rounds 7] [--threads 2] [--kv int8] [--json FILE]

Three bundles: the reference model of `bench.py` (135M parameters, random weights, answers without repetition); a model
of the same shape and cost, two layers of which copy from the prompt (`copying_model.py`); and builtin:tales, a real
story model. In "played" cases the reference model must answer with the tokens of an English text, whatever its logits:
as many draft tokens are accepted as on that text, at this model's cost per step.

Each round decodes with and without draft tokens, on two sessions of one bundle, in alternation token by token, so that
other load on the machine affects both. Both must give the same tokens. Prints medians of the speeds, and the median and
range of each round's ratio with / without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copying_model import build_copying_model
from reference_model import prepare

from edgelm.runtime import Bundle, GenerationSettings
from edgelm.runtime.decoding.prompt_lookup import Lookup
from edgelm.runtime.decoding.row import Chooser, Greedy, Row
from edgelm.runtime.decoding.sampling import Sampler
from edgelm.runtime.decoding.sequence import Sequencer
from edgelm.runtime.sessions.loading import open_session
from edgelm.runtime.text.tokenizer import Tokenizer

_SCRIPTS = Path(__file__).parent
_REFERENCE = _SCRIPTS / "reference" / "config.json"
_TEXT = _SCRIPTS.parent / "export" / "text" / "default.txt"
_COPIED = 300
_STORY_PROMPTS = ("Once upon a time", "One day, Tom and Lily went", "The little dog was sad because")


@dataclass(frozen=True)
class Case:
    """One answer to compute. chooser: makes a new one for each run; expected: the tokens that must come, if known."""

    name: str
    prompt: Sequence[int]
    max_tokens: int
    chooser: Callable[[], Chooser] = Greedy
    expected: Sequence[int] | None = None


class Pair:
    """A bundle's two sessions, one for plain decoding and one with draft tokens."""

    def __init__(self, folder: Path, threads: int) -> None:
        bundle = Bundle.open(folder)
        self.manifest = bundle.manifest
        self._sessions = [open_session(bundle, threads) for _ in range(2)]
        self._sequencers = [Sequencer(session) for session in self._sessions]

    def run(self, case: Case, first: int) -> dict[str, Any]:
        """One round. first: which session begins each time. Returns tokens per second of both, and counts."""
        lookup = Lookup()
        streams = [
            sequencer.tokens(Row(case.prompt, case.max_tokens, case.chooser(), self.manifest.tokens.eos, lookup=drafts))
            for sequencer, drafts in zip(self._sequencers, (None, lookup), strict=True)
        ]
        tokens = [[next(stream)] for stream in streams]
        seconds = [0.0, 0.0]
        running = [first, 1 - first]
        while running:
            for which in tuple(running):
                started = time.perf_counter()
                token = next(streams[which], None)
                seconds[which] += time.perf_counter() - started
                if token is None:
                    running.remove(which)
                else:
                    tokens[which].append(token)
        if tokens[0] != tokens[1] or (case.expected is not None and tokens[0] != list(case.expected)):
            raise SystemExit(f"{case.name}: the tokens are wrong, or differ with and without draft tokens")
        plain, drafting = ((len(tokens[0]) - 1) / each for each in seconds)
        return {
            "plain_tokens_per_s": plain,
            "lookup_tokens_per_s": drafting,
            "ratio": drafting / plain,
            "tokens": len(tokens[0]),
            "drafted": lookup.drafted,
            "accepted": lookup.accepted,
        }

    def close(self) -> None:
        """Close both sessions."""
        for session in self._sessions:
            session.close()


class Player:
    """A chooser that returns given tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def choose(self, logits: Any) -> int:
        """The next token, at the cost of a greedy choice."""
        logits.argmax()
        return next(self._tokens)


def main() -> None:
    """Build what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for models and bundles, kept")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each case (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each session (%(default)s)")
    parser.add_argument("--kv", default="int8", choices=("int8", "float32"), help="KV cache (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    arguments = parser.parse_args()
    figures = {}
    for folder, cases in _build(arguments.work, arguments.kv):
        pair = Pair(folder, arguments.threads)
        for case in cases:
            # One uncounted round feeds the prompt, so that the other rounds find it in the cache.
            rounds = [pair.run(case, number % 2) for number in range(arguments.rounds + 1)][1:]
            figures[case.name] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            figures[case.name]["ratios"] = [one["ratio"] for one in rounds]
            _print(case.name, figures[case.name])
        pair.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _build(work: Path, kv: str) -> Iterator[tuple[Path, list[Case]]]:
    """The bundles, built unless an earlier run did, and their cases."""
    reference, copying, tales = work / f"bundle-{kv}", work / f"copying-bundle-{kv}", work / f"tales-{kv}"
    prepare(work / "model", reference, kv)
    if not (copying / "manifest.json").is_file():
        build_copying_model(work / "copying-model", _REFERENCE)
        prepare(work / "copying-model", copying, kv)
    if not (tales / "manifest.json").is_file():
        from edgelm.export import ExportConfig, export_model

        export_model(ExportConfig("builtin:tales", kv=kv, out=tales))
    tokenizer = Tokenizer(tales / "tokenizer.json")
    english = tokenizer.encode(_TEXT.read_text(encoding="utf-8"))
    text = _without_repetition(english, _COPIED)
    yield copying, list(_copying_cases(text))
    yield reference, list(_plain_cases(english, Bundle.open(reference).manifest.model.vocab_size))
    yield tales, [Case(f"tales: {prompt!r}", tokenizer.encode(prompt), 200) for prompt in _STORY_PROMPTS]


def _copying_cases(text: list[int]) -> Iterator[Case]:
    for others in (0, 1200):
        prompt = [*range(5000, 5000 + others), *text, *text[:3]]
        yield Case(f"copying, prompt of {len(prompt)}", prompt, len(text) - 3, expected=text[3:])


def _plain_cases(english: list[int], vocab_size: int) -> Iterator[Case]:
    drawn = GenerationSettings(temperature=1.0, seed=1)
    for length in (128, 1500):
        prompt = [1000 + 7 * index for index in range(length)]
        yield Case(f"no repetition, prompt of {length}", prompt, 128)
        yield Case(f"the same, drawn, {length}", prompt, 128, lambda ids=prompt: Sampler(drawn, ids, (), vocab_size))
    for begin, length in ((0, 100), (600, 100), (0, 1400)):
        rest = english[begin + length :]
        name = f"played text from {begin}, prompt of {length}"
        yield Case(name, english[begin : begin + length], 250, lambda tokens=rest: Player(tokens))


def _without_repetition(ids: Sequence[int], count: int) -> list[int]:
    """The first piece of a text in which no three consecutive tokens repeat, so that only copying repeats tokens."""
    for begin in range(len(ids) - count):
        piece = list(ids[begin : begin + count])
        if len(set(zip(piece, piece[1:], piece[2:], strict=False))) == count - 2:
            return piece
    raise SystemExit(f"{_TEXT} has no piece of {count} tokens without repetition")


def _print(name: str, figures: dict[str, Any]) -> None:
    speeds = f"{figures['plain_tokens_per_s']:>9.1f}{figures['lookup_tokens_per_s']:>9.1f} tokens/s"
    ratio = f"{figures['ratio']:>7.3f} ({min(figures['ratios']):.2f} to {max(figures['ratios']):.2f})"
    print(
        f"{name:44}{speeds}{ratio}   {figures['accepted']:.0f} of {figures['drafted']:.0f} draft tokens accepted, "
        f"{figures['tokens']:.0f} tokens",
        flush=True,
    )


if __name__ == "__main__":
    main()
