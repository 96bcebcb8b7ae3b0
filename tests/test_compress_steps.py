"""Steps that change weights: they remove the right ones and leave the answers of the rest unchanged, and the log of
edits rebuilds the module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelm.export.compress.folder import write_compressed
from edgelm.export.compress.importance.influence import MOST_TOKENS, all_windows, layer_influence, windows
from edgelm.export.compress.importance.leaving_out import least_missed_attention, least_missed_layers
from edgelm.export.compress.importance.moments import input_moments
from edgelm.export.compress.recipe import available_recipes, load_recipe
from edgelm.export.compress.step import Applied, Workbench, step_class, step_name
from edgelm.export.errors import RecipeError
from edgelm.export.module.edits import edit, edits_of, present_layers, replay
from edgelm.export.module.structure import attention_sublayers
from edgelm.export.passes import fusing_passes
from edgelm.export.quantization.quantizer import Quantizer
from edgelm.export.source.compressed import Record, load_compressed
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.bundle.manifest import Source

from .conftest import TEXT, byte_tokenizer, tiny_llama
from .model_zoo import tiny_model as zoo_model

IDS = list(TEXT.encode())[:600]
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("prune-structured", {"ratio": 0.1}),
    ("prune-structured", {"ratio": 0.1, "importance": "magnitude"}),
    ("low-rank", {"ratio": 0.3}),
    ("low-rank", {"energy": 0.8, "weighted": False}),
    ("share-weights", {"every": 2}),
    ("prune-magnitude", {"ratio": 0.5}),
]


def apply(module: Any, use: str, **keys: Any) -> Applied:
    """Apply one step to a module, with a text for its choices."""
    bench = Workbench(IDS, None, Path(), Path(), 320, print)  # type: ignore[arg-type]
    return step_class(use)(**keys).apply(module, bench)  # type: ignore[no-any-return]


def logits(module: Any, ids: list[int] = IDS[:24]) -> torch.Tensor:
    """The module's logits, without a cache."""
    with torch.no_grad():
        found: torch.Tensor = module(torch.tensor([ids]), use_cache=False).logits
    return found


@pytest.mark.parametrize(("use", "keys"), STEPS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi3", "gpt_neox"])
def test_replayed_edits_take_the_weights(kind: str, use: str, keys: dict[str, Any]) -> None:
    module = zoo_model(kind).eval()
    applied = apply(module, use, **keys).module
    again = zoo_model(kind).eval()
    replay(again, edits_of(applied))
    again.load_state_dict(applied.state_dict())
    assert torch.equal(logits(again), logits(applied))
    assert again.num_parameters() == applied.num_parameters()


def test_each_built_in_recipe_leaves_fewer_parameters() -> None:
    sizes = []
    for name in available_recipes():
        module = tiny_llama(num_hidden_layers=4)
        for step in load_recipe(name).steps:
            if step_name(step) in {use for use, _ in STEPS} | {"drop-layers", "skip-attention"}:
                bench = Workbench(IDS, None, Path(), Path(), 320, print)  # type: ignore[arg-type]
                step.apply(module, bench)
        sizes.append(module.num_parameters())
    assert available_recipes() == ["light", "balanced", "small", "smallest"]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < tiny_llama(num_hidden_layers=4).num_parameters() / 2


# ---- prune-structured


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_unused_channels_and_heads_are_pruned_first(importance: str) -> None:
    module = tiny_llama(num_hidden_layers=3, intermediate_size=128, tie_word_embeddings=False)
    mlp, attention = module.model.layers[1].mlp, module.model.layers[2].self_attn
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data[16:80] = 0
    mlp.down_proj.weight.data[:, 16:80] = 0
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.weight.data[: linear.out_features // 2] = 0
    attention.o_proj.weight.data[:, :32] = 0
    before, whole = logits(module), module.num_parameters()
    dead = 64 * 3 * 64 + 2 * (32 + 16) * 64
    details = apply(module, "prune-structured", ratio=(dead - 1) / whole, importance=importance).details
    assert details["layers"] == {
        "0": {"kv_groups": [2, 2], "channels": [128, 128]},
        "1": {"kv_groups": [2, 2], "channels": [128, 64]},
        "2": {"kv_groups": [2, 1], "channels": [128, 128]},
    }
    assert module.num_parameters() == whole - dead
    torch.testing.assert_close(logits(module), before, rtol=1e-4, atol=1e-4)


def test_ratio_is_of_the_whole_model() -> None:
    module = tiny_llama(num_hidden_layers=4, intermediate_size=256)
    before = module.num_parameters()
    details = apply(module, "prune-structured", ratio=0.3).details
    assert 30 <= details["removed_percent"] < 34
    assert details["removed_percent"] == pytest.approx(100 * (1 - module.num_parameters() / before), abs=0.01)
    sizes = details["layers"].values()
    assert all(layer["kv_groups"][1] >= 1 and layer["channels"][1] >= 16 for layer in sizes)
    assert all(layer["channels"][1] % 16 == 0 for layer in sizes)


def test_a_budget_that_would_empty_a_layer_is_refused() -> None:
    module = tiny_llama()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RecipeError, match="each layer keeps one KV group and 16 channels: lower the ratio"):
        apply(module, "prune-structured", ratio=0.9)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert edits_of(module) == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bloom", "does not call transformers' attention registry"),
        ("falcon", "does not call transformers' attention registry"),
        ("deepseek_v3", "an attention of unknown structure"),
        ("afmoe", "an MLP of unknown structure"),
        ("olmo2", "reordering heads and channels changes the logits"),  # norms queries over all heads
        ("gpt_oss", "reordering heads and channels changes the logits"),  # a number for each head beside the matrices
    ],
)
def test_models_whose_heads_cannot_be_identified_are_refused(kind: str, words: str) -> None:
    module = zoo_model(kind).eval()
    before = logits(module)
    with pytest.raises(RecipeError, match=words):
        apply(module, "prune-structured", ratio=0.1)
    torch.testing.assert_close(logits(module), before)


def test_impossible_orders_of_steps_are_refused() -> None:
    factored, shared = tiny_llama(), tiny_llama()
    apply(factored, "low-rank", ratio=0.3)
    with pytest.raises(RecipeError, match="prune-structured cannot be used with it, nor after low-rank"):
        apply(factored, "prune-structured", ratio=0.1)
    apply(shared, "share-weights", groups=((0, 1),))
    with pytest.raises(RecipeError, match="put prune-structured before share-weights"):
        apply(shared, "prune-structured", ratio=0.1)
    with pytest.raises(RecipeError, match="put low-rank before share-weights"):
        apply(shared, "low-rank", ratio=0.1)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_a_pruned_model_can_be_pruned_again_and_copied(kind: str) -> None:
    module = zoo_model(kind).eval()
    apply(module, "prune-structured", ratio=0.05)
    apply(module, "prune-structured", ratio=0.1, importance="magnitude")
    again = zoo_model(kind).eval()
    replay(again, edits_of(module))
    again.load_state_dict(module.state_dict())
    for other in (again, copy.deepcopy(module)):
        assert torch.equal(logits(other), logits(module))


# ---- low-rank


@pytest.mark.parametrize("weighted", [True, False])
def test_a_matrix_of_low_rank_loses_nothing(weighted: bool) -> None:
    module = tiny_llama()
    matrix = module.model.layers[0].mlp.up_proj.weight
    matrix.data = torch.randn(96, 5) @ torch.randn(5, 64) / 8
    before = logits(module)
    details = apply(module, "low-rank", matrices=("*.0.mlp.up_proj",), energy=0.999999, weighted=weighted).details
    assert details["ranks"] == {"model.layers.0.mlp.up_proj": 5}
    torch.testing.assert_close(logits(module), before, rtol=1e-3, atol=1e-3)


def test_weighting_keeps_more_of_what_the_matrix_computes() -> None:
    errors = {}
    for weighted in (True, False):
        module = tiny_llama()
        layer = module.model.layers[1]
        seen: list[torch.Tensor] = []
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        logits(module, IDS)
        expected = layer.mlp.gate_proj(seen[0]).detach()
        apply(module, "low-rank", matrices=("*.1.mlp.gate_proj",), ratio=0.6, weighted=weighted)
        errors[weighted] = float((layer.mlp.gate_proj(seen[0]).detach() - expected).square().mean())
    assert errors[True] < 0.9 * errors[False]


def test_a_matrix_whose_factors_would_be_larger_is_left_alone() -> None:
    module = tiny_llama()
    before = module.num_parameters()
    details = apply(module, "low-rank", matrices=("*q_proj", "*o_proj"), energy=0.99, weighted=False).details
    assert details["ranks"] == {} and len(details["left_alone"]) == 4
    assert "4 of 4 matrices stay whole" in details["note"]
    assert module.num_parameters() == before


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a name like \*\.c_attn: the model has down_proj, gate_proj"):
        apply(tiny_llama(), "low-rank", matrices=("*.c_attn",), ratio=0.3)


# ---- share-weights


@pytest.mark.parametrize("value", ["mean", "first"])
def test_shared_matrices_are_one(value: str, tmp_path: Path) -> None:
    module = tiny_llama(num_hidden_layers=4, tie_word_embeddings=False)
    layers, table, head = module.model.layers, module.model.embed_tokens, module.lm_head
    first, second = (layers[index].mlp.up_proj.weight.detach().clone() for index in (1, 3))
    embedding, output = table.weight.detach().clone(), head.weight.detach().clone()
    before = module.num_parameters()
    layers[3].input_layernorm.weight.data += 1
    apply(module, "share-weights", groups=((1, 3),), embedding=True, value=value)
    layer = sum(part.weight.numel() for part in layers[0].modules() if isinstance(part, torch.nn.Linear))
    assert module.num_parameters() == before - layer - table.weight.numel()
    assert layers[1].mlp.up_proj.weight is layers[3].mlp.up_proj.weight and head.weight is table.weight
    torch.testing.assert_close(layers[3].mlp.up_proj.weight, first if value == "first" else (first + second) / 2)
    torch.testing.assert_close(head.weight, embedding if value == "first" else (embedding + output) / 2)
    assert not torch.equal(layers[1].input_layernorm.weight, layers[3].input_layernorm.weight), "norms are not shared"

    write(module, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * module.num_parameters() + 20_000
    again = load_compressed(tmp_path)
    assert torch.equal(logits(again), logits(module)) and again.num_parameters() == module.num_parameters()


def test_writing_the_same_weights_gives_the_same_file(tmp_path: Path) -> None:
    """The same bytes, with many matrices of several names, and the same mode as the files beside it."""
    module = tiny_llama(num_hidden_layers=4)
    apply(module, "share-weights", every=2)
    folders = [tmp_path / str(index) for index in range(4)]
    for folder in folders:
        folder.mkdir()
        write(module, folder)
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    assert len({path.stat().st_mode for path in folders[0].iterdir()}) == 1


def write(module: Any, folder: Path) -> None:
    """Write the compressed folder of a module."""
    from transformers import AutoTokenizer

    byte_tokenizer(folder)
    record = Record(Source("tiny", None, "LlamaForCausalLM", None), "tiny", "test", ())
    write_compressed(module, AutoTokenizer.from_pretrained(folder), record, folder)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"groups": ((0, 7),)}, "there is no layer 7: the model has 0, 1"),
        ({"embedding": True}, "shares embedding and head already"),
    ],
)
def test_impossible_sharing_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        apply(tiny_llama(), "share-weights", **keys)


def test_layers_that_differ_cannot_share() -> None:
    module = tiny_llama(num_hidden_layers=3)
    apply(module, "low-rank", matrices=("*.1.mlp.up_proj",), ratio=0.3)
    with pytest.raises(RecipeError, match="layers 0 and 1 differ in their matrices"):
        apply(module, "share-weights", every=3)


# ---- prune-magnitude


def test_input_moments_are_means_over_all_tokens() -> None:
    """Of windows of any length."""
    module, name = tiny_llama(), "model.layers.1.mlp.down_proj"
    texts = [torch.randint(256, (1, length)) for length in (40, 40, 7, 40, 40, 40, 1)]
    rows: list[torch.Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    with torch.no_grad():
        for ids in texts:
            module(input_ids=ids)
    handle.remove()
    every = torch.cat(rows)
    assert len(every) == sum(ids.numel() for ids in texts)
    torch.testing.assert_close(input_moments(module, [name], texts)[name], every.T @ every / len(every))


def test_the_smallest_weights_become_zero() -> None:
    module = tiny_llama(tie_word_embeddings=False)
    apply(module, "share-weights", groups=((0, 1),))
    matrix = module.model.layers[0].mlp.up_proj.weight
    before, table = matrix.detach().clone(), module.model.embed_tokens.weight.detach().clone()
    details = apply(module, "prune-magnitude", ratio=0.6).details
    gone = matrix == 0
    assert float(gone.float().mean()) == pytest.approx(0.6, abs=1e-3)
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(matrix[~gone], before[~gone])
    assert matrix is module.model.layers[1].mlp.up_proj.weight, "shared matrices stay shared"
    assert torch.equal(module.model.embed_tokens.weight, table)
    assert float((module.lm_head.weight == 0).float().mean()) == pytest.approx(0.6, abs=1e-3)
    sizes = details["compressed_bytes"]
    assert details["zeros_percent"] == pytest.approx(60, abs=0.1) and sizes[1] < 0.75 * sizes[0]


# ---- in the graph


def int8_bytes(module: Any, folder: Path) -> dict[str, int]:
    """Name -> bytes of the INT8 matrices in the module's bundle."""
    import onnx_ir as ir

    folder.mkdir()
    traced = trace_model(module)
    ir.passes.PassManager(fusing_passes(512))(traced.graph)
    ir.save(traced.graph, folder / "fp32.onnx", external_data="fp32.data")
    ir.save(Quantizer(folder / "fp32.onnx", "int8-rowwise", 8, {}).quantized(), folder / "int8.onnx", external_data="w")
    graph = ir.load(folder / "int8.onnx").graph
    left = [
        item.name for item in graph.initializers.values() if item.dtype == ir.DataType.FLOAT and len(item.shape) > 1
    ]
    assert all("rotary" in name for name in left), f"matrices remain in float32: {left}"
    return {
        name: item.const_value.nbytes for name, item in graph.initializers.items() if item.dtype == ir.DataType.INT8
    }


def test_a_shared_matrix_is_stored_once(tmp_path: Path) -> None:
    """Including merged query, key and value matrices and merged gate and up matrices."""
    module = tiny_llama(num_hidden_layers=4, tie_word_embeddings=False)
    whole = int8_bytes(module, tmp_path / "whole")
    apply(module, "share-weights", every=2, embedding=True)
    shared = int8_bytes(module, tmp_path / "shared")
    assert len(whole) == 4 * 4 + 2 and len(shared) == 2 * 4 + 1
    matrices = [value for name, value in module.named_parameters() if value.dim() == 2]
    assert sum(shared.values()) == sum(matrix.numel() for matrix in matrices)


def test_two_factors_are_two_int8_matrices(tmp_path: Path) -> None:
    """Matrices with the same input are merged: the query's factor with whole keys and values."""
    module = tiny_llama()
    apply(module, "low-rank", matrices=("*.q_proj", "*.up_proj"), ratio=0.5)
    stored = int8_bytes(module, tmp_path / "factored")
    matrices = [value for _, value in module.named_parameters() if value.dim() == 2]
    assert sum(stored.values()) == sum(matrix.numel() for matrix in matrices)
    # Per layer: q, k, v; q's second factor; o; gate and up; up's second factor; down. Plus the embedding.
    assert len(stored) == 2 * 6 + 1


# ---- choices by measurement


def test_a_layer_whose_output_no_answer_depends_on_is_dropped_first() -> None:
    """Block influence measures how far a layer turns the residual stream; KL measures whether answers depend on it."""
    module = tiny_llama(num_hidden_layers=4, tie_word_embeddings=False)
    deaf = slice(48, 64)  # part of the stream that the head does not read and mostly layer 3 writes
    module.lm_head.weight.data[:, deaf] = 0
    for linear in (module.model.layers[3].self_attn.o_proj, module.model.layers[3].mlp.down_proj):
        linear.weight.data[:48] = 0
        linear.weight.data[48:] *= 3
    influence = layer_influence(module, IDS, 320)
    assert min(influence, key=lambda index: influence[index]) != 3
    details = apply(module, "drop-layers", least_useful=1).details
    assert details["layers"] == [3]


def test_each_choice_is_measured_on_the_reduced_model() -> None:
    """Each figure is the KL of the model without this layer and those before it in the list."""
    module = tiny_llama(num_hidden_layers=4)
    found = least_missed_layers(module, 3, IDS, 320, layer_influence(module, IDS, 320))
    values = list(found.values())
    whole = logits(module)
    for count in (1, 2, 3):
        smaller = copy.deepcopy(module)
        edit(smaller, "drop_layers", layers=list(found)[:count])
        assert values[count - 1] == pytest.approx(kl(module, smaller), rel=1e-3)
    assert torch.equal(logits(module), whole), "the module is restored"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_measuring_from_a_middle_layer_equals_measuring_the_whole_model(kind: str) -> None:
    module = zoo_model(kind).eval()
    before = logits(module)
    for names, least in ((present_layers, least_missed_layers), (attention_sublayers, least_missed_attention)):
        found = least(module, 1, IDS, 320, dict.fromkeys(names(module), 0.0))
        edited = copy.deepcopy(module)
        edit(edited, "drop_layers" if least is least_missed_layers else "skip_attention", layers=list(found))
        assert next(iter(found.values())) == pytest.approx(kl(module, edited), rel=1e-3, abs=1e-6)
    assert torch.equal(logits(module), before)


# ---- refitting


def kl(module: Any, other: Any) -> float:
    """KL divergence of the second from the first, in nats a token."""
    with torch.no_grad():
        first, second = (
            torch.log_softmax(torch.cat([each(ids).logits[0] for ids in windows(IDS, 320)]), -1)
            for each in (module, other)
        )
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_refitting_reduces_the_divergence() -> None:
    module = tiny_llama(num_hidden_layers=3, intermediate_size=192)
    # Redundant channels, as in a trained model: the others can compute what a removed channel did.
    for layer in module.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[96:] = linear.weight.data[:96] + 0.01 * torch.randn(96, 64)
    lost = {}
    for refit in (True, False):
        smaller = copy.deepcopy(module)
        apply(smaller, "prune-structured", ratio=0.2, refit=refit)
        lost[refit] = kl(module, smaller)
    assert lost[True] < 0.5 * lost[False]


def test_curvature_loses_less_than_taylor_where_channels_repeat_each_other() -> None:
    module = tiny_llama(num_hidden_layers=3, intermediate_size=192)
    for layer in module.model.layers[:2]:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[96:] = linear.weight.data[:96]
    lost = {}
    for importance in ("curvature", "taylor"):
        smaller = copy.deepcopy(module)
        apply(smaller, "prune-structured", ratio=0.15, importance=importance)
        lost[importance] = kl(module, smaller)
    assert lost["curvature"] < 0.5 * lost["taylor"]


def test_calibration_reads_all_of_a_text() -> None:
    assert sum(ids.numel() for ids in all_windows(range(2000), 100)) == 2000
    many = sum(ids.numel() for ids in all_windows(range(100_000), 1024))
    assert 0.5 * MOST_TOKENS < many <= MOST_TOKENS
    assert apply(tiny_llama(), "prune-structured", ratio=0.1).details["tokens"] == 600
