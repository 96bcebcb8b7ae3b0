"""Run many requests through one engine and check that memory stays flat and answers are right.

    python scripts/soak.py BUNDLE [--tokens 20000] [--threads N] [--seed 0]

Prompts share random prefixes, so that blocks are found, evicted and written constantly. The prefix cache has room for a
tenth of the run's tokens in memory, and for twice as many on disk. Every tenth answer is compared with that of an
engine without caches. Prints resident memory on the way. Exit status 1 if an answer differs, or if the last quarter of
the run uses over 16 MiB more than the second.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

from edgelm.runtime import Engine, PrefixCacheSettings, load

# Without caches, resident memory varies by 12 MB with the reference model. Leaking a tenth of what 20,000 tokens
# compute would add 23 MB.
_ALLOWED_BYTES = 16 * 2**20
_BEGINNINGS = 12
_ANSWER_TOKENS = 12


def main() -> int:
    """Parse, run, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder that  edgelm export  wrote")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of all prompts and answers (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads to compute with (physical cores)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return _soak(arguments, Path(folder))


def _soak(arguments: argparse.Namespace, folder: Path) -> int:
    rng = random.Random(arguments.seed)  # noqa: S311, not for cryptography
    with load(arguments.bundle, threads=arguments.threads, response_cache=False, prefix_cache=False) as plain:
        room = arguments.tokens // 10 * _bytes_per_token(plain)
        settings = PrefixCacheSettings(memory_bytes=room, disk_bytes=max(2**20, 2 * room), folder=folder)
        with load(arguments.bundle, threads=arguments.threads, response_cache=False, prefix_cache=settings) as engine:
            return _run(arguments.tokens, rng, engine, plain)


def _run(tokens: int, rng: random.Random, engine: Engine, plain: Engine) -> int:
    model = engine.bundle.manifest.model
    longest = min(300, model.context_length // 2)
    beginnings = [[rng.randrange(model.vocab_size) for _ in range(longest)] for _ in range(_BEGINNINGS)]
    resident: list[int] = []
    done = reused = requests = compared = 0
    while done < tokens:
        prompt = rng.choice(beginnings)[: rng.randint(1, longest)]
        prompt += [rng.randrange(model.vocab_size) for _ in range(rng.randint(1, longest // 4))]
        answer = engine.generate(token_ids=prompt, max_tokens=_ANSWER_TOKENS)
        if requests % 10 == 0:
            compared += 1
            if answer.token_ids != plain.generate(token_ids=prompt, max_tokens=_ANSWER_TOKENS).token_ids:
                print(f"request {requests}: another answer than without caches, prompt {prompt}")
                return 1
        done += len(prompt) + len(answer.token_ids)
        reused += answer.stats.reused_tokens
        requests += 1
        resident.append(answer.stats.resident_bytes)
        if done * 10 // tokens > (done - len(prompt) - len(answer.token_ids)) * 10 // tokens:
            print(
                f"{done:8,} tokens  {requests:5,} requests  {reused:8,} reused  {resident[-1] / 1e6:8.1f} MB resident"
            )
    quarter = len(resident) // 4
    before, after = (statistics.median(part) for part in (resident[quarter : 2 * quarter], resident[-quarter:]))
    print(f"{compared} answers compared; from the second quarter to the last: {(after - before) / 1e6:+.1f} MB")
    return int(after > before + _ALLOWED_BYTES)


def _bytes_per_token(engine: Engine) -> int:
    model = engine.bundle.manifest.model
    values = sum(layer.kv_heads * (layer.key_size + layer.value_size) for layer in model.layers if layer is not None)
    return values * (4 if model.kv.type == "float32" else 1)


if __name__ == "__main__":
    sys.exit(main())
