"""The example model, its tokenizer and its optimizers, before the first step."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .texts import Recipe

END_OF_TEXT = "<|endoftext|>"


Optimizers = list[torch.optim.Optimizer]


def train_tokenizer(stories: list[str], vocabulary: int) -> Tokenizer:
    """Train byte-level BPE on the stories alone: their words become single tokens, other text falls back to pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id of the token that stands before and after each story."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}")
    return token


def tokenizer_settings(positions: int) -> dict[str, Any]:
    """Return what transformers needs beside ``tokenizer.json`` to load the same tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }


def build_model(recipe: Recipe, end: int) -> LlamaForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Drop a share of the embeddings and of what each block adds, while the model is in training mode.

    By hooks, because Llama itself offers dropout for the attention weights only.
    """

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, share, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def build_optimizers(model: nn.Module, recipe: Recipe) -> Optimizers:
    """Muon for the matrices of the blocks, AdamW for the embeddings and the norms.

    AdamW throughout took twice the steps to the same loss, and processor time is what limits this training. Norm
    weights do not decay, as that would pull them away from one.
    """
    blocks = [weight for name, weight in model.named_parameters() if weight.dim() > 1 and "embed" not in name]
    embeddings = [weight for name, weight in model.named_parameters() if weight.dim() > 1 and "embed" in name]
    norms = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": embeddings, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizers: Optimizers = [
        torch.optim.Muon(blocks, lr=recipe.block_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def pace_at(step: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate: linear warm-up over the first 3 %, then a cosine to zero."""
    warm_up = max(1, recipe.steps * 3 // 100)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))
