"""Training steps: they learn, repeat exactly, resume where they stopped, and leave no files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from edgelm.export import ExportConfig, compress_model, export_model
from edgelm.export.compress.recipe import parse_recipe
from edgelm.export.compress.step import Workbench
from edgelm.export.compress.steps.distil import Distil
from edgelm.export.compress.steps.quantization_aware import QuantizationAware
from edgelm.export.compress.steps.recover import Recover
from edgelm.export.compress.training.checkpoint import Checkpoint
from edgelm.export.compress.training.divergence import Mix, divergence
from edgelm.export.compress.training.loop import make_accelerator, pace, rows_of
from edgelm.export.compress.training.precision import fastest
from edgelm.export.compress.training.schedule import Schedule
from edgelm.export.compress.training.simulate import Quantized
from edgelm.export.compress.training.train import distillation, next_token
from edgelm.export.errors import RecipeError
from edgelm.export.module.edits import edit, edits_of
from edgelm.export.passes import fusing_passes, quantizing_passes
from edgelm.export.source.loading import load_module
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.bundle.folder import GRAPH_NAME
from edgelm.runtime.bundle.manifest import CacheType, Model
from edgelm.runtime.sessions.loading import make_session

from .conftest import TEXT, byte_tokenizer, tiny_llama
from .test_compress import write_recipe

QUICK: dict[str, Any] = {"steps": 6, "batch": 2, "length": 32, "learning_rate": 3e-3, "keep": "last"}
PRUNED: Any = ({"use": "prune-magnitude", "ratio": 0.5},)


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path) -> Workbench:
    """The workbench for a step on the tiny model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return Workbench(list(TEXT.encode()), tokenizer, tiny_model, tmp_path / "kept", 512, lambda _: None)


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def same_weights(one: Any, other: Any) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class InterruptedRunError(Exception):
    """Ends a run in the middle."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """End the run after so many checkpoints."""
    save, left = Checkpoint.save, [saves]

    def interrupted(self: Checkpoint, *arguments: Any) -> None:
        save(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise InterruptedRunError

    monkeypatch.setattr(Checkpoint, "save", interrupted)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use": "recover", "steps": 0}, "steps must be 1 or more"),
        ({"use": "recover", "batch": 0}, "batch must be"),
        ({"use": "recover", "length": 1}, "length must be 2 or more"),
        ({"use": "recover", "learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"use": "recover", "warmup": 2}, "warmup is a share"),
        ({"use": "recover", "seed": -1}, "seed must be"),
        ({"use": "recover", "checkpoint_every": 0}, "checkpoint_every must be"),
        ({"use": "recover", "lora_rank": 0}, "lora_rank must be"),
        ({"use": "recover", "alpha": 0.5}, "has no key alpha"),
        ({"use": "distil", "alpha": 1.5}, "alpha must be 0 to 1"),
        ({"use": "distil", "temperature": 0}, "temperature must be above 0"),
        ({"use": "quantization-aware", "weight_bits": 3}, "weight_bits must be 4 to 8"),
        ({"use": "quantization-aware", "precision": "bfloat16"}, "precision must be .float32."),
        ({"use": "recover", "precision": "float16"}, "precision"),
    ],
)
def test_settings_that_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe({"step": [keys]}, "test", "test.toml")


def test_text_that_cannot_be_trained_on(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    for name, words in (("short.txt", "5 tokens, too few"), ("latin.txt", "not UTF-8"), ("none.txt", "cannot be read")):
        with pytest.raises(RecipeError, match=words):
            Recover(text=str(tmp_path / name), **QUICK).apply(tiny_llama(), bench)
    with pytest.raises(RecipeError, match="the calibration text has 3 tokens"):
        Recover(**QUICK).apply(tiny_llama(), replace(bench, token_ids=[1, 2, 3]))
    with pytest.raises(RecipeError, match="context has 512 tokens"):
        Recover(length=600).apply(tiny_llama(), bench)
    assert not bench.checkpoints.exists()


def test_text_is_read_with_the_models_tokenizer(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ab<end>c" * 20, encoding="utf-8")
    ids = Recover(text=str(tmp_path / "t.txt"), **QUICK).read_texts(bench).training
    assert ids[:5] == [64, 65, 256, 66, 64]  # the ids of this tokenizer are in the order of its alphabet


def test_rate_rises_then_falls() -> None:
    step = Recover(steps=100, warmup=0.1)
    shares = [pace(step, index) for index in range(100)]
    assert shares[:10] == pytest.approx([(index + 1) / 10 for index in range(10)])
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert 0 < shares[-1] < 0.01


def test_rows_are_pieces_of_the_text_and_a_function_of_the_seed_and_the_step() -> None:
    text = torch.arange(1000)
    rows = rows_of(text, 16, Recover(batch=4), 7)
    assert rows.shape == (4, 17)
    assert torch.equal(rows - rows[:, :1], torch.arange(17).expand(4, 17))
    assert torch.equal(rows, rows_of(text, 16, Recover(batch=4), 7))
    assert not torch.equal(rows, rows_of(text, 16, Recover(batch=4), 8))
    assert not torch.equal(rows, rows_of(text, 16, Recover(batch=4, seed=1), 7))
    assert torch.equal(rows_of(text[:17], 16, Recover(batch=2), 0), torch.arange(17).expand(2, 17))


# --- losses -----------------------------------------------------------------------------------------------------------


@dataclass
class Fixed:
    """A model with constant logits."""

    logits: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Fixed:
        return self

    def to(self, _: Any) -> Fixed:
        return self


def test_loss_of_distillation_is_that_of_the_literature() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 3, 5, generator=generator) for _ in range(2))
    rows = torch.tensor([[0, 1, 2, 3]])
    p, q = torch.softmax(teacher[0] / 2, -1), torch.softmax(student[0] / 2, -1)
    soft = float((p * (p / q).log()).sum(-1).mean())
    hard = float(-torch.log_softmax(student[0], -1)[[0, 1, 2], [1, 2, 3]].mean())
    loss: Any = distillation(Fixed(teacher), 2.0, 0.7)  # type: ignore[arg-type]
    assert float(loss(Fixed(student), rows)) == pytest.approx(0.7 * 4 * soft + 0.3 * hard, rel=1e-5)
    assert float(next_token(Fixed(student), rows)) == pytest.approx(hard, rel=1e-5)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 50),
    temperature=st.floats(0.5, 4),
    alpha=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 1 << 16),
)
def test_gradient_of_distillation_is_autograds(
    tokens: int, vocabulary: int, temperature: float, alpha: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, teacher = (4 * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    theirs = ours.double().requires_grad_()
    p, q = (torch.log_softmax(logits / temperature, -1) for logits in (teacher.double(), theirs))
    soft = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    naive = alpha * temperature**2 * soft + (1 - alpha) * torch.nn.functional.cross_entropy(theirs, targets)
    (3 * naive).backward()
    ours.requires_grad_()
    found = divergence(ours, teacher, targets, Mix(temperature, alpha))
    (3 * found).backward()
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(naive.detach()), rel=1e-4, abs=1e-5)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad.float(), atol=1e-6, rtol=1e-4)
    rounded = ours.detach().bfloat16().requires_grad_()
    divergence(rounded, teacher, targets, Mix(temperature, alpha)).backward()
    assert rounded.grad is not None and rounded.grad.dtype == torch.bfloat16
    assert float((3 * rounded.grad - theirs.grad).norm()) < 0.05 * float(theirs.grad.norm()) + 1e-3


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_bfloat16_where_the_processor_has_instructions_for_it(
    found: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert fastest(torch.device("cpu")) == expected
    assert Recover().precision_on(torch.device("cpu")) == expected
    assert Recover(precision="float32").precision_on(torch.device("cpu")) == "float32"
    assert QuantizationAware().precision_on(torch.device("cpu")) == "float32"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_multiplies_in_its_precision_and_keeps_float32_weights(precision: Any, bench: Workbench) -> None:
    """Evaluations are in float32 in any case: both trainings begin with the same KL."""
    seen: set[tuple[bool, torch.dtype]] = set()

    def watch(module: Any, _: Any, output: torch.Tensor) -> None:
        seen.add((module.training, output.dtype))

    module = tiny_llama()
    module.lm_head.register_forward_hook(watch)
    done = Distil(precision=precision, **{**QUICK, "steps": 20}).apply(module, bench)
    assert seen == {(True, getattr(torch, precision)), (False, torch.float32)}
    assert done.details["precision"] == precision
    assert {weight.dtype for weight in done.module.parameters()} == {torch.float32}
    plain = Distil(precision="float32", **{**QUICK, "steps": 20}).apply(
        tiny_llama(), replace(bench, checkpoints=bench.checkpoints / "plain")
    )
    first, last = (done.details["training"]["curve"][index]["kl"] for index in (0, -1))
    assert first == plain.details["training"]["curve"][0]["kl"]
    assert last == pytest.approx(plain.details["training"]["curve"][-1]["kl"], rel=0.05)
    assert same_weights(done.module, plain.module) == (precision == "float32")


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        Recover(**QUICK),
        Recover(lora_rank=4, **QUICK),
        QuantizationAware(**QUICK),
        Distil(**QUICK),
        Distil(alpha=0.0, **QUICK),
    ],
    ids=["recover", "lora", "quantization-aware", "distil", "distil-alpha-0"],
)
def test_a_step_learns_repeats_itself_and_leaves_the_module_alone(
    step: Schedule, bench: Workbench, tmp_path: Path
) -> None:
    module = tiny_llama()
    edit(module, "skip_attention", layers=[0])
    before, named = weights_of(module), [name for name, _ in module.named_modules()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = step.apply(module, bench)
    torch.manual_seed(99)
    second = step.apply(module, replace(bench, checkpoints=tmp_path / "again"))
    assert same_weights(first.module, second.module)
    assert first.details == second.details
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(module).items())
    assert not torch.equal(first.module.lm_head.weight, before["model.embed_tokens.weight"]) or step == Recover(
        lora_rank=4, **QUICK
    )
    assert [name for name, _ in first.module.named_modules()] == named
    assert type(first.module) is type(module)
    assert edits_of(first.module) == edits_of(module)
    assert not first.module.training
    assert all(weight.requires_grad for weight in first.module.parameters())
    assert first.module.lm_head.weight is first.module.model.embed_tokens.weight
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_lowers_the_loss(bench: Workbench) -> None:
    details = Recover(**{**QUICK, "steps": 40}).apply(tiny_llama(), bench).details
    assert details["last-loss"] < details["first-loss"] - 1
    assert details["tokens"] == 40 * 2 * 32


def test_lora_trains_few_weights_and_changes_the_linear_layers_alone(bench: Workbench) -> None:
    module = tiny_llama()
    applied = Recover(lora_rank=2, **QUICK).apply(module, bench)
    changed = {
        name for name, weight in weights_of(applied.module).items() if not torch.equal(weight, weights_of(module)[name])
    }
    assert changed == {name for name in weights_of(module) if "_proj" in name}
    # A pair of rank-2 matrices for each of 2 * 7 linear layers.
    assert applied.details["trained"] == 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))


def test_lora_is_refused_if_its_change_could_not_be_added(bench: Workbench) -> None:
    shared = tiny_llama()
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RecipeError, match=r"layers.1.mlp.up_proj and .*layers.0.mlp.up_proj share their weights"):
        Recover(lora_rank=2, **QUICK).apply(shared, bench)
    pruned = tiny_llama()
    pruned.model.layers[0].mlp.up_proj.weight.data[::2] = 0
    with pytest.raises(RecipeError, match="prune-magnitude set weights to zero"):
        Recover(lora_rank=2, **QUICK).apply(pruned, replace(bench, before=PRUNED))
    with pytest.raises(RecipeError, match=r"lora_rank is 33, but the smaller side of .*k_proj is 32"):
        Recover(lora_rank=33, **QUICK).apply(tiny_llama(), bench)


def test_the_models_own_zeros_are_trained_like_other_weights(bench: Workbench, tmp_path: Path) -> None:
    """A real model's embedding has thousands of zeros. Pruned zeros are known from the steps applied before."""
    module = tiny_llama()
    module.model.embed_tokens.weight.data[::8, :8] = 0
    module.model.layers[0].mlp.up_proj.weight.data[::2] = 0
    adapted: Any = Recover(lora_rank=2, **QUICK).apply(module, bench).module
    assert bool((adapted.model.layers[0].mlp.up_proj.weight[::2] != 0).any())
    trained: Any = Recover(**QUICK).apply(module, replace(bench, checkpoints=tmp_path / "all")).module
    assert bool((trained.model.layers[0].mlp.up_proj.weight[::2] != 0).all())
    again = replace(bench, checkpoints=tmp_path / "pruned", before=PRUNED)
    pruned: Any = Recover(**QUICK).apply(module, again).module
    assert bool((pruned.model.layers[0].mlp.up_proj.weight[::2] == 0).all())
    assert bool((pruned.model.embed_tokens.weight[::8, :8] != 0).any())  # prune-magnitude does not prune embeddings


def test_pruned_weights_stay_zero_and_shared_ones_stay_shared(bench: Workbench) -> None:
    module = tiny_llama()
    module.model.layers[1].mlp.up_proj.weight = module.model.layers[0].mlp.up_proj.weight
    matrix = module.model.layers[0].mlp.up_proj.weight
    where = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    matrix.data[where] = 0
    trained: Any = Recover(**QUICK).apply(module, replace(bench, before=PRUNED)).module
    first, second = (trained.model.layers[index].mlp.up_proj.weight for index in (0, 1))
    assert first is second
    assert torch.equal(first == 0, where)
    assert not torch.equal(first, matrix)


def test_with_alpha_0_the_teacher_has_no_effect(bench: Workbench) -> None:
    plain = Recover(**QUICK).apply(tiny_llama(), replace(bench, checkpoints=bench.checkpoints / "plain"))
    alone = Distil(alpha=0.0, **QUICK).apply(tiny_llama(), bench)
    assert same_weights(plain.module, alone.module)


def test_progress_says_how_long_it_takes(bench: Workbench) -> None:
    lines: list[str] = []
    Recover(**QUICK).apply(tiny_llama(), replace(bench, say=lines.append))
    assert lines[0].startswith("evaluating the source on ")
    assert lines[1].startswith("step 0 of 6, held-out loss ")
    assert lines[2].startswith("step 1 of 6, loss ")
    assert all("left" in line for line in lines[1:])
    assert lines[-1].startswith("step 6 of 6, loss ")


# --- distillation -----------------------------------------------------------------------------------------------------


def save_model(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder)
    byte_tokenizer(folder, module.config.vocab_size)
    return folder


def test_student_of_another_folder_takes_the_place_of_the_model(bench: Workbench, tmp_path: Path) -> None:
    folder = save_model(tiny_llama(hidden_size=32, num_hidden_layers=1), tmp_path / "student")
    module = tiny_llama()
    applied = Distil(student=str(folder), **QUICK).apply(module, bench)
    assert applied.module.config.hidden_size == 32
    assert applied.module.num_parameters() < module.num_parameters()
    assert not same_weights(applied.module, load_module(folder))


def test_teacher_of_another_folder_is_learned_from(bench: Workbench, tmp_path: Path) -> None:
    other = tiny_llama()
    other.lm_head.weight.data[:] = other.lm_head.weight.data.flip(0)
    folder = save_model(other, tmp_path / "teacher")
    source = Distil(**QUICK).apply(tiny_llama(), bench)
    with pytest.raises(RecipeError, match="differs in the step's settings, the model: "):
        Distil(teacher=str(folder), **QUICK).apply(tiny_llama(), bench)
    taught = Distil(teacher=str(folder), **QUICK).apply(
        tiny_llama(), replace(bench, checkpoints=bench.checkpoints / "other")
    )
    assert not same_weights(source.module, taught.module)


def test_student_that_does_not_fit(bench: Workbench, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    swapped = save_model(tiny_llama(), tmp_path / "swapped")
    data = json.loads(Tokenizer.from_file(str(swapped / "tokenizer.json")).to_str())
    data["model"]["vocab"]["a"], data["model"]["vocab"]["b"] = data["model"]["vocab"]["b"], data["model"]["vocab"]["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(data))
    wide = save_model(tiny_llama(vocab_size=300), tmp_path / "wide")
    short = save_model(tiny_llama(max_position_embeddings=64), tmp_path / "short")
    for folder, words in ((swapped, "another tokenizer"), (wide, "vocabulary of 300"), (short, "context has 64")):
        for what in ("student", "teacher"):
            with pytest.raises(RecipeError, match=words):
                Distil(**{what: str(folder)}, **QUICK).apply(tiny_llama(), bench)
    assert not bench.checkpoints.exists()


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "step",
    [
        Recover(**QUICK, checkpoint_every=2),
        Recover(**QUICK, checkpoint_every=2, lora_rank=2),
        Distil(**QUICK, checkpoint_every=2),
    ],
    ids=["recover", "lora", "distil"],
)
def test_interrupted_training_goes_on_bit_for_bit(
    step: Schedule, bfloat16: bool, bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first precision, also on a processor that would choose another one."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})
    whole = step.apply(tiny_llama(), replace(bench, checkpoints=tmp_path / "whole"))
    assert whole.details["precision"] == ("bfloat16" if bfloat16 else "float32")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(InterruptedRunError):
            step.apply(tiny_llama(), bench)
    lines: list[str] = []
    with safe_open(bench.checkpoints / "training.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118, not a dict
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not bfloat16})
    again = step.apply(tiny_llama(), replace(bench, say=lines.append))
    assert lines[0].startswith("resumed after step 4 of 6")
    assert same_weights(again.module, whole.module)
    assert again.details == whole.details
    lines.clear()
    done = step.apply(tiny_llama(), replace(bench, say=lines.append))
    assert lines == [f"resumed after step 6 of 6 from {bench.checkpoints / 'training.safetensors'}"]
    assert same_weights(done.module, whole.module)
    with safe_open(bench.checkpoints / "training.safetensors", framework="pt") as file:
        assert {key.partition("/")[0] for key in file.keys()} == {"weight"}  # noqa: SIM118, not a dict


def test_moments_are_resumed_in_the_order_of_their_weight(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is stored by columns: the checkpoint stores rows."""

    def by_columns() -> Any:
        module = tiny_llama()
        projection = module.model.layers[0].mlp.up_proj
        projection.weight = torch.nn.Parameter(projection.weight.detach().t().contiguous().t())
        return module

    step = Recover(**QUICK, checkpoint_every=2, precision="float32")
    whole = step.apply(by_columns(), replace(bench, checkpoints=bench.checkpoints / "whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(InterruptedRunError):
            step.apply(by_columns(), bench)
    assert same_weights(step.apply(by_columns(), bench).module, whole.module)


def test_a_checkpoint_of_another_training_is_refused_and_kept(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recover(**QUICK).apply(tiny_llama(), bench)
    (kept,) = bench.checkpoints.iterdir()
    before = kept.read_bytes()
    other = tiny_llama()
    edit(other, "skip_attention", layers=[0])
    source = save_model(tiny_llama(intermediate_size=64), tmp_path / "source")
    cases: list[tuple[Schedule, Any, Workbench]] = [
        (Recover(**{**QUICK, "learning_rate": 1e-3}), tiny_llama(), bench),
        (Recover(**QUICK, seed=1), tiny_llama(), bench),
        (QuantizationAware(**QUICK), tiny_llama(), bench),
        (Recover(**QUICK), other, bench),
        (Recover(**QUICK), tiny_llama(), replace(bench, before=({"use": "drop-layers", "last": 1},))),
        (Recover(**QUICK), tiny_llama(), replace(bench, token_ids=bench.token_ids[1:])),
        (Recover(**QUICK), tiny_llama(), replace(bench, source=source)),
    ]
    for step, module, place in cases:
        with pytest.raises(RecipeError, match=r"is left unchanged, because it was written by a run that differs in"):
            step.apply(module, place)
    assert kept.read_bytes() == before
    Recover(**QUICK, checkpoint_every=3).apply(tiny_llama(), bench)  # this key does not affect the result
    kept.write_bytes(before[:-100])
    with pytest.raises(RecipeError, match="remove it to start this step over"):
        Recover(**QUICK).apply(tiny_llama(), bench)


def test_a_nan_loss_keeps_the_last_good_checkpoint(bench: Workbench) -> None:
    """A learning rate that is far too high makes the weights overflow."""
    module = tiny_llama()
    before = weights_of(module)
    with pytest.raises(RecipeError, match=r"no longer a finite number after step \d of 6, and there is no checkpoint"):
        Recover(**{**QUICK, "learning_rate": 1e37}).apply(module, bench)
    with pytest.raises(
        RecipeError, match=r"no longer a finite number after step \d of 6, and the last good weights are in"
    ):
        Recover(**{**QUICK, "learning_rate": 1e12}, warmup=1.0, checkpoint_every=1, evaluate_every=6).apply(
            module, bench
        )
    kept = load_file(bench.checkpoints / "training.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(module).items())


def command(model: Path, recipe: str, out: Path) -> list[str]:
    return ["compress", str(model), "--recipe", recipe, "--out", str(out), "--json"]


def test_a_killed_compression_resumes_when_run_again(tiny_model: Path, tmp_path: Path) -> None:
    training = {"steps": 60, "batch": 4, "length": 128, "checkpoint_every": 5}
    recipe = write_recipe(
        tmp_path / "r.toml",
        {"use": "drop-layers", "last": 1},
        {"use": "recover", **training},
    )
    out, whole = tmp_path / "out", tmp_path / "whole"
    kept = tmp_path / "out.checkpoints" / "2-recover" / "training.safetensors"
    words = [sys.executable, "-m", "edgelm.runtime.cli", *command(tiny_model, recipe, out)]
    running = subprocess.Popen(words, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not kept.is_file() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL) if os.name != "nt" else running.kill()
    running.wait()
    assert not out.exists()
    with safe_open(kept, framework="pt") as file:
        done = len(json.loads(file.metadata()["edgelm"])["state"]["losses"])
    assert 5 <= done < 60
    lines: list[str] = []
    again = compress_model(ExportConfig(str(tiny_model), out=out, compress=recipe), say=lines.append)
    assert f"resumed after step {done} of 60 from {kept}" in lines
    fresh = compress_model(ExportConfig(str(tiny_model), out=whole, compress=recipe))
    assert same_weights(load_module(out), load_module(whole))
    assert [step["details"] for step in again.steps] == [step["details"] for step in fresh.steps]
    assert not (tmp_path / "out.checkpoints").exists()


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    recipe = write_recipe(
        tmp_path / "r.toml",
        {"use": "drop-layers", "last": 1},
        {"use": "distil", "steps": 8, "batch": 4, "length": 32, "precision": "float32"},
        {"use": "recover", "steps": 4, "batch": 4, "length": 32, "lora_rank": 2, "precision": "float32"},
    )
    two, one = tmp_path / "two", tmp_path / "one"
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [sys.executable, *launcher, "-m", "edgelm.runtime.cli", *command(tiny_model, recipe, two)]
    done = subprocess.run(
        words, env={**os.environ, "ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    compress_model(ExportConfig(str(tiny_model), out=one, compress=recipe))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-3, rtol=1e-3)
    assert not list(tmp_path.glob(".two*"))


def test_batch_that_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 3)
    with pytest.raises(RecipeError, match="batch is 8, which 3 processes cannot share"):
        make_accelerator(Recover())


def test_one_of_several_processes_writes(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "r.toml", {"use": "drop-layers", "last": 1})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    record = compress_model(ExportConfig(str(tiny_model), out=tmp_path / "out", compress=recipe))
    assert record.steps[0]["details"]["layers"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]
    with pytest.raises(RecipeError, match="does not run in several processes"):
        export_model(ExportConfig(str(tiny_model), out=tmp_path / "out", compress=recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


# --- the simulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "learning_rate"), [(7, 1e-4), (4, 5e-4)])
def test_tuning_brings_the_rounded_model_closer_to_the_original(
    bench: Workbench, bits: int, learning_rate: float
) -> None:
    """On a text not used for tuning. Coarse weights must move farther to reach another value."""
    settings: dict[str, Any] = {**QUICK, "steps": 20, "learning_rate": learning_rate, "weight_bits": bits}
    module = tiny_llama()
    tuned = QuantizationAware(**settings).apply(module, bench).module
    ids = torch.tensor([list(b"What the cat saw in the garden was a very small house with a red door.")])

    def divergence(student: Any) -> float:
        with torch.no_grad(), Quantized(student, bits, origin=module):
            return float(distillation(module, 1.0, 1.0)(student, ids))

    assert divergence(tuned) < 0.8 * divergence(tiny_llama())


@pytest.mark.usefixtures("without_kernels")
def test_tuned_model_in_simulation_answers_as_its_bundle(bench: Workbench, tmp_path: Path) -> None:
    """Products are bit-equal; float32 norms and attention differ by about 1e-6. That may flip a rounding to INT8, after
    which logits of that text differ by more: most short texts have no flip, whatever the processor trained."""
    module = QuantizationAware(**QUICK).apply(tiny_llama(), bench).module
    traced = trace_model(module)
    ir.passes.PassManager([*fusing_passes(512), *quantizing_passes("int8-rowwise", 8, {})])(traced.graph)
    ir.save(traced.graph, tmp_path / GRAPH_NAME, external_data="weights")
    kv = CacheType("float32", None)
    model = Model(
        257, 512, module.num_parameters(), traced.layers, kv, traced.layout, traced.states, traced.step_tokens
    )
    texts = [
        list(word.encode())
        for word in ["Once", "upon", "a", "time,", "there", "was", "a", "cat", "who", "liked", "green", "apples"]
    ]
    session = make_session(tmp_path / GRAPH_NAME, model, 1, ["CPUExecutionProvider"])
    try:
        logits = []
        for ids in texts:
            session.rewind(0)
            logits.append(np.array(session.step(ids, len(ids))))
    finally:
        session.close()
    plain = [answer(module, ids) for ids in texts]
    with Quantized(module, activation_bits=8):
        simulated = [answer(module, ids) for ids in texts]
    assert all(np.abs(one - other).max() > 1e-2 for one, other in zip(plain, logits, strict=True))
    equal = [float(np.abs(one - other).max()) < 1e-4 for one, other in zip(simulated, logits, strict=True)]
    assert sum(equal) >= 0.75 * len(texts)


def answer(module: Any, ids: list[int]) -> Any:
    """The module's logits [tokens, vocabulary] of the ids."""
    with torch.no_grad():
        return module(torch.tensor([ids]), use_cache=False).logits[0].numpy()
