"""llama.cpp through the C functions of llama-cpp-python's bindings; variants: GGUF's types.

Converting needs llama.cpp's own scripts, which are in the bindings' source package but not in the installed one.
LLAMA_CPP_SOURCE names the unpacked package.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np

FILES = ("model.gguf",)
_PIECE = 512
# Flash attention decodes a tenth faster after 128 tokens, and a quarter slower after 1,900.
_SHORT = 512


def convert(model: Path, folder: Path, variant: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if variant == "q8_0":
        _write_gguf(model, folder / "model.gguf", variant)
        return
    whole = folder / "whole.gguf"
    _write_gguf(model, whole, "f32")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant.upper()}")
    code = llama_cpp.llama_model_quantize(bytes(whole), bytes(folder / "model.gguf"), parameters)
    if code:
        raise SystemExit(f"llama_model_quantize ended with {code}")
    whole.unlink()


def _write_gguf(model: Path, file: Path, kind: str) -> None:
    """llama.cpp's own conversion. A tokenizer with an unknown digest gets a known tokenizer's rules for splitting
    words: token ids are passed in, so no measurement depends on the rules."""
    sys.path.insert(0, str(Path(os.environ["LLAMA_CPP_SOURCE"]) / "vendor" / "llama.cpp"))
    import conversion.base
    import convert_hf_to_gguf

    known = conversion.base.TextModel.get_vocab_base_pre

    def rules(self: object, tokenizer: object) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:  # raised for an unknown digest
            return "gpt-2"

    words = ["convert_hf_to_gguf.py", str(model), "--outfile", str(file), "--outtype", kind]
    with mock.patch.object(conversion.base.TextModel, "get_vocab_base_pre", rules), mock.patch("sys.argv", words):
        convert_hf_to_gguf.main()


class Loaded:
    def __init__(self, llama: llama_cpp.Llama) -> None:
        self._llama = llama
        self._vocab = llama.n_vocab()

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        context = self._llama.ctx
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        for begin in range(0, len(ids), _PIECE):
            self._feed(ids[begin : begin + _PIECE])
        for step in range(count):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (self._vocab,))
            token = int(logits.argmax())
            yield token
            if step + 1 < count:
                self._feed([token])

    def logits(self, ids: list[int]) -> Any:
        context = self._llama.ctx
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        rows = np.empty((len(ids), self._vocab), np.float32)
        for begin in range(0, len(ids), _PIECE):
            piece = ids[begin : begin + _PIECE]
            self._feed_all(piece, begin)
            for row in range(len(piece)):
                found = llama_cpp.llama_get_logits_ith(context, row)
                rows[begin + row] = np.ctypeslib.as_array(found, (self._vocab,))
        return rows

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        return list(itertools.takewhile(lambda token: token not in ends, self.generate(ids, count)))

    def _feed_all(self, ids: list[int], begin: int) -> None:
        """Feed tokens and ask for the logits of each."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for row, token in enumerate(ids):
            batch.token[row], batch.pos[row], batch.logits[row] = token, begin + row, 1
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
        code = llama_cpp.llama_decode(self._llama.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode ended with {code}")

    def _feed(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        # A batch made this way returns only the logits of its last token.
        code = llama_cpp.llama_decode(self._llama.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise SystemExit(f"llama_decode ended with {code}")


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    return Loaded(
        llama_cpp.Llama(
            str(folder / "model.gguf"),
            n_ctx=capacity,
            n_batch=_PIECE,
            n_ubatch=_PIECE,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=capacity <= _SHORT,
            verbose=False,
        )
    )
