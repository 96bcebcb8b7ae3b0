"""The last position of a context in models with a table of positions, which has no row after it.

With a float32 cache and without kernels, a step of one token has a padding row after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import Bundle, Engine, load
from edgelm.runtime.errors import SessionError
from edgelm.runtime.sessions.loading import open_session

from .conftest import WIDE_TARGET, byte_tokenizer

CONTEXT, ROOM = 64, 7
PROMPT = list(b"It was a bright cold day in April, and the clocks were striking thirteen.")[: CONTEXT - ROOM + 1]


def learned(kind: str) -> Any:
    """A tiny random model with learned positions. OPT's table has two rows before the first position."""
    import torch
    import transformers

    ends = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    torch.manual_seed(3)
    if kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        positions = {"max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32, "init_std": 0.3}
        config = transformers.OPTConfig(vocab_size=257, **sizes, **positions, **ends)
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
        config = transformers.GPT2Config(vocab_size=257, **sizes, **ends, initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(
    scope="module",
    params=[("gpt2", {"scheme": "fp32"}), ("gpt2", {"kv": "float32"}), ("opt", {"scheme": "fp32"})],
    ids=["gpt2 fp32", "gpt2 float32 cache", "opt fp32"],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from edgelm.export import ExportConfig, export_model

    kind, settings = request.param
    folder: Path = tmp_path_factory.mktemp("learned")
    learned(kind).save_pretrained(folder / "model")
    byte_tokenizer(folder / "model")
    export_model(ExportConfig(str(folder / "model"), target=WIDE_TARGET, out=folder / "bundle", **settings))
    with load(folder / "bundle", threads=1, response_cache=False, prefix_cache=False) as opened:
        yield opened


def test_an_answer_reaches_the_last_position(engine: Engine) -> None:
    """The last chosen token needs no position, so a prompt of 58 of 64 tokens leaves room for 7."""
    done = engine.generate(token_ids=PROMPT, max_tokens=10)
    assert (len(done.token_ids), done.finish_reason) == (ROOM, "context_full")
    # The last token must equal the one of the whole text fed at once, which has no padding row.
    whole = engine.generate(token_ids=[*PROMPT, *done.token_ids[:-1]], max_tokens=1)
    assert whole.token_ids == done.token_ids[-1:]


def test_answers_of_a_batch_reach_the_last_position(engine: Engine) -> None:
    alone = engine.generate(token_ids=PROMPT, max_tokens=10)
    batch = engine.generate_batch([PROMPT, PROMPT[1:], PROMPT], max_tokens=10)
    assert [(len(done.token_ids), done.finish_reason) for done in batch] == [
        (ROOM, "context_full"),
        (ROOM + 1, "context_full"),
        (ROOM, "context_full"),
    ]
    assert batch[0].token_ids == batch[2].token_ids == alone.token_ids


def test_an_answer_slides_past_the_last_position(engine: Engine) -> None:
    slid = engine.generate(token_ids=PROMPT, max_tokens=80, context_full="slide")
    stopped = engine.generate(token_ids=PROMPT, max_tokens=80)
    assert (len(slid.token_ids), slid.finish_reason) == (80, "length")
    assert slid.token_ids[:ROOM] == stopped.token_ids


def test_draft_tokens_end_at_the_last_position(engine: Engine) -> None:
    """A repetitive text gets draft tokens up to the end of the context and no further."""
    prompt = (list(b"abcdefgh") * 8)[: CONTEXT - ROOM + 1]
    plain = engine.generate(token_ids=prompt, max_tokens=10, lookup=False)
    assert engine.generate(token_ids=prompt, max_tokens=10).token_ids == plain.token_ids


def test_onnxruntime_writes_nothing_beside_our_error(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = open_session(Bundle.open(tiny_bundle), 1)
    with pytest.raises(SessionError):
        session.step([10**6])
    session.close()
    assert capfd.readouterr().err == ""
