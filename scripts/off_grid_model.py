"""Make a Llama model that computes the same with weights off their grid, for fair comparisons of weights in blocks.

    python scripts/off_grid_model.py [MODEL] [OUT]

The weights of build/smollm2 lie on a 4-bit grid of blocks of 32 inputs, which every quantizer with such blocks finds
again without loss. Here the weights of each norm are multiplied into the matrices behind it, and the channels of the
hidden state, of each KV head and of each MLP are permuted. Answers change by roundings alone. Without arguments,
build/smollm2 (real_model.py) becomes build/smollm2-off-grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import real_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 1
# Roundings of float32, in units of the largest logit.
_TOLERANCE = 1e-4


def main() -> None:
    """Make the model and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a Llama in Hugging Face's format (build/smollm2)")
    parser.add_argument("out", type=Path, nargs="?", help="the folder to write (MODEL-off-grid)")
    arguments = parser.parse_args()
    model = arguments.model or real_model.make()
    out = arguments.out or model.with_name(f"{model.name}-off-grid")
    make(model, out)
    print(out)


def make(model: Path, out: Path) -> None:
    """Write the model. Raises: SystemExit, if its answers are not those of the source."""
    module: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.arange(100, 200)[None]
    with torch.no_grad():
        before = module(ids).logits
        move_off_grid(module)
        difference = float((module(ids).logits - before).abs().max() / before.abs().max())
    if not difference <= _TOLERANCE:
        raise SystemExit(
            f"the answers of {model} changed by {difference:.2g} of the largest logit: it is no plain Llama"
        )
    module.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def move_off_grid(module: Any) -> None:
    """Fold the norms of each layer into its matrices and permute all channels, in place."""
    config, draw = module.config, torch.Generator().manual_seed(SEED)
    hidden = torch.randperm(config.hidden_size, generator=draw)
    for weight in (module.model.embed_tokens.weight, module.model.norm.weight):
        weight.copy_(weight[..., hidden])
    for layer in module.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), hidden)
        _fold(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), hidden)
        values, outputs = _value_channels(config, draw)
        inner = torch.randperm(config.intermediate_size, generator=draw)
        _reorder(attention.v_proj, rows=values)
        _reorder(attention.o_proj, rows=hidden, columns=outputs)
        _reorder(mlp.gate_proj, rows=inner)
        _reorder(mlp.up_proj, rows=inner)
        _reorder(mlp.down_proj, rows=hidden, columns=inner)


def _fold(norm: Any, readers: tuple[Any, ...], hidden: Any) -> None:
    for reader in readers:
        reader.weight.copy_((reader.weight * norm.weight)[:, hidden])
    norm.weight.fill_(1)


def _reorder(linear: Any, rows: Any, columns: Any = slice(None)) -> None:
    linear.weight.copy_(linear.weight[rows][:, columns])


def _value_channels(config: Any, draw: torch.Generator) -> tuple[Any, Any]:
    """Orders of the channels of values (kv_heads * size), and of the attention's outputs (heads * size), whose query
    heads share the values of a KV head. Queries and keys stay: rotary embedding pairs their channels."""
    size = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    orders = [torch.randperm(size, generator=draw) for _ in range(config.num_key_value_heads)]
    values = torch.cat([head * size + order for head, order in enumerate(orders)])
    outputs = torch.cat([head * size + orders[head // shared] for head in range(config.num_attention_heads)])
    return values, outputs


if __name__ == "__main__":
    main()
