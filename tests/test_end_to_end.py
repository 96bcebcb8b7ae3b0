"""From a model folder to text: export, load, generate, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgelm.runtime import load

from .conftest import TEXT, tiny_llama


@pytest.mark.parametrize("scheme", ["fp32", "int8-rowwise", "int8-tensor"])
def test_every_scheme_exports_and_answers(export_tiny: Callable[..., Path], scheme: str) -> None:
    with load(export_tiny(scheme=scheme)) as engine:
        done = engine.generate(TEXT[:100], max_tokens=12)
    assert len(done.token_ids) == 12 or done.finish_reason == "stop"
    assert done.stats.prompt_tokens == 100


def test_fp32_tokens_are_those_of_transformers(export_tiny: Callable[..., Path]) -> None:
    import torch

    model = tiny_llama()
    with load(export_tiny(scheme="fp32")) as engine:
        for start in range(0, 500, 100):
            ids = engine.encode(TEXT[start : start + 40])
            output = model.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False, pad_token_id=0)
            expected = [int(token) for token in output[0, len(ids) :]]
            done = engine.generate(token_ids=ids, max_tokens=100)
            if expected[-1] == 256:
                assert done.finish_reason == "stop"
                expected.pop()
            assert list(done.token_ids) == expected
