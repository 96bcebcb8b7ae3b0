"""Several texts decoded together by llama.cpp's C functions, like its server's slots, but without HTTP: its upper
limit. Runs in the environment of llama-cpp-python; prints JSON."""

from __future__ import annotations

import argparse
import json
import time

import llama_cpp
import numpy as np

_PROMPT = 12


class Rows:
    """A context with room for each text."""

    def __init__(self, path: str, threads: int, rows: int, capacity: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * capacity, rows
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def decode(self, rows: int, tokens: int) -> None:
        """Feed a prompt of random tokens for each text, then decode so many tokens of each, together."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        random = np.random.default_rng(0)
        last = []
        for row in range(rows):
            prompt = [(int(token), place, row) for place, token in enumerate(random.integers(1000, 9000, _PROMPT))]
            last += self._run(prompt, [_PROMPT - 1])
        for step in range(tokens - 1):
            place = _PROMPT + step
            last = self._run([(token, place, row) for row, token in enumerate(last)], list(range(rows)))

    def _run(self, tokens: list[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        """One call with (token, position, text); the most likely tokens after the wanted ones."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, (token, place, row) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, place, index in wanted
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
        code = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode ended with {code}")
        found = (llama_cpp.llama_get_logits_ith(self._context, index) for index in wanted)
        return [int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax()) for logits in found]


def main() -> None:
    """Measure after a first run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args()
    loaded = Rows(arguments.gguf, arguments.threads, arguments.rows, _PROMPT + arguments.tokens + 64)
    loaded.decode(arguments.rows, 4)
    wall, cpu = time.perf_counter(), time.process_time()
    loaded.decode(arguments.rows, arguments.tokens)
    count = arguments.rows * arguments.tokens
    rates = {"per_s": count / (time.perf_counter() - wall), "per_cpu_s": count / (time.process_time() - cpu)}
    print(json.dumps({"tokens_" + name: round(rate, 1) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()
