"""Build a model that copies: the 135M reference architecture, in which two layers repeat what was read.

There is no training: the weights of an induction circuit are set directly. In the first layer, head group g looks g + 1
tokens back and stores a short code of that token. In the second layer, each token looks for the position whose three
preceding tokens are the text's last three, and predicts the token at that position. The other 28 layers and all MLPs
are as large and dense as in any model of this shape, and add nearly nothing. So a step costs as much as in such a
model, and the answer to a text followed by its first words is the text.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from reference_model import build_model

# The hidden state's parts: a token's code, short codes of the three tokens before it, and a constant one.
_CODE, _NOTE = 192, 64
_ONE = _CODE + 3 * _NOTE
_HEAD, _GROUP = 64, 3
_STEP = 1 / math.sqrt(_CODE)  # so that a token's code has length 1
_PREVIOUS_SHARPNESS, _MATCH_SHARPNESS = 15.0, 60.0
_COPIED = 4.0  # weight of the copied token relative to the present one
_LOUDNESS = 0.7  # scale of the logits: some 15 for the copied token, up to 5 by chance
_QUIET = 1e-4


def build_copying_model(folder: Path, config_file: Path) -> None:
    """Write the model in Hugging Face's format, with the tokenizer of the reference model."""
    import torch
    from transformers import AutoModelForCausalLM

    build_model(folder, config_file, "float32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        _write_tokens(model.model.embed_tokens.weight, random)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(_QUIET)
            layer.mlp.down_proj.weight.mul_(_QUIET)
        notes = _signs(random, _NOTE, _CODE) * _STEP
        frequencies = model.model.rotary_emb.inv_freq
        _write_notes(model.model.layers[0].self_attn, notes, frequencies)
        _write_match(model.model.layers[1].self_attn, notes, frequencies, random)
        model.model.norm.weight.fill_(_LOUDNESS)
        model.model.norm.weight[_ONE] = 0
    model.save_pretrained(folder)


def _write_tokens(table: Any, random: Any) -> None:
    table.mul_(_QUIET)
    table[:, :_CODE] = _signs(random, table.shape[0], _CODE) * _STEP
    table[:, _ONE] = 2 * _STEP


def _write_notes(attention: Any, notes: Any, frequencies: Any) -> None:
    """All keys are equal before rotary positions rotate them; queries are rotated back by as many positions as the
    group looks back."""
    import torch

    norm = math.sqrt((_CODE * _STEP**2 + (2 * _STEP) ** 2) / attention.q_proj.in_features)
    one, half = 2 * _STEP / norm, _HEAD // 2
    for group in range(_GROUP):
        query, keys = _GROUP * group * _HEAD, slice(group * _HEAD, (group + 1) * _HEAD)
        attention.q_proj.weight[query : query + _HEAD] = 0
        angle = (group + 1) * frequencies
        attention.q_proj.weight[query : query + half, _ONE] = _PREVIOUS_SHARPNESS / one * torch.cos(angle)
        attention.q_proj.weight[query + half : query + _HEAD, _ONE] = -_PREVIOUS_SHARPNESS / one * torch.sin(angle)
        attention.k_proj.weight[keys] = 0
        attention.k_proj.weight[keys.start : keys.start + half, _ONE] = _PREVIOUS_SHARPNESS / one
        attention.v_proj.weight[keys] = 0
        attention.v_proj.weight[keys, :_CODE] = notes * norm
        place = _CODE + group * _NOTE
        attention.o_proj.weight[place : place + _NOTE, query : query + _HEAD] = torch.eye(_NOTE)


def _write_match(attention: Any, notes: Any, frequencies: Any, random: Any) -> None:
    """Queries hold the last three tokens, keys their three preceding ones, both in dimensions that hardly rotate."""
    import torch

    hidden, half = attention.q_proj.in_features, _HEAD // 2
    # Code and notes have entries of the same magnitude, and the constant is twice as large.
    norm = _STEP * math.sqrt((_CODE + 3 * _NOTE + 4) / hidden)
    slow = [place for place in range(half) if frequencies[place] < 1e-3]  # one radian in 1,000 tokens
    rows = torch.tensor([*slow, *(place + half for place in slow)])
    scale = math.sqrt(_MATCH_SHARPNESS * math.sqrt(_HEAD) / (3 * len(rows))) / _STEP * norm / math.sqrt(_NOTE)
    for group in range(_GROUP):
        query, keys = _GROUP * group * _HEAD, group * _HEAD
        mixes = [torch.randn(len(rows), _NOTE, generator=random) * scale for _ in range(3)]
        for weight in (attention.q_proj.weight[query : query + _HEAD], attention.k_proj.weight[keys : keys + _HEAD]):
            weight.zero_()
        attention.q_proj.weight[query + rows, :_CODE] = mixes[0] @ notes
        for number, mix in enumerate(mixes):
            noted = slice(_CODE + number * _NOTE, _CODE + (number + 1) * _NOTE)
            attention.k_proj.weight[keys + rows, noted] = mix
            if number:
                before = slice(noted.start - _NOTE, noted.start)
                attention.q_proj.weight[query + rows, before] = mix
        values = attention.v_proj.weight[keys : keys + _HEAD]
        values.zero_()
        code = slice(group * _HEAD, (group + 1) * _HEAD)
        values[:, code] = torch.eye(_HEAD) * norm
        attention.o_proj.weight[code, query : query + _HEAD] = torch.eye(_HEAD) * _COPIED


def _signs(random: Any, rows: int, columns: int) -> Any:
    import torch

    return torch.randint(0, 2, (rows, columns), generator=random).float() * 2 - 1
