"""A byte-pair tokenizer with fewer tokens.

Without the merge that makes it, a token's text is written with the two tokens that the merge joined, or with their
parts: no text becomes impossible. Tokens stay by how often a text has them; the rest by the rank of their merge, which
follows how often the pair occurred in the text that the tokenizer was made from.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....runtime.bundle.folder import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from ...errors import RecipeError
from ...source.tokenizer import load_tokenizer
from ...source.tokenizer_check import HARD_TEXTS
from .trimmed import Trimmed, configs, named_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MULTIPLE = 64  # the number of rows that remain; matrix products prefer it


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel, rows: int, token_ids: Sequence[int]
) -> Trimmed:
    """Remove tokens, until the embedding needs at most `rows` rows, rounded up to a multiple of 64.

    tokenizer: the model's; module: its vocabulary and the token ids in its configuration; token_ids: of a text whose
    tokens stay first, the frequent ones before the rare ones. Raises: RecipeError if the tokenizer is not of byte-pair
    encoding, or needs more rows without any merge.
    """
    backend: Any = tokenizer.backend_tokenizer
    data: dict[str, Any] = json.loads(backend.to_str())
    if data["model"]["type"] != "BPE" or data["model"].get("continuing_subword_prefix"):
        raise RecipeError(
            f"the model's tokenizer is of the kind {data['model']['type']}, and trim-vocabulary works with byte-pair "
            "encoding only: remove this step"
        )
    before = int(module.config.get_text_config().vocab_size)
    named = {index for config in configs(module) for index in named_ids(config) if 0 <= index < before}
    often = [token for token, _ in Counter(token_ids).most_common()]
    kept = _shorten(data, named, often, -(-rows // _MULTIPLE) * _MULTIPLE)
    if len(kept) == before:
        raise RecipeError(
            f"the ratio removes none of {before:,} rows, of which a multiple of {_MULTIPLE} stays: raise it"
        )
    new = {old: index for index, old in enumerate(kept)}
    _renumber(data, new)
    # Tokens that were added behind the model's rows have none, before and after.
    rowed = tuple(index for index in kept if index < before)
    trimmed = Trimmed(_rebuilt(tokenizer, data, new), rowed, _parts_of(backend, data, new, before))
    _check_texts(tokenizer, trimmed.tokenizer)
    return trimmed


def _shorten(data: dict[str, Any], named: set[int], often: Sequence[int], rows: int) -> list[int]:
    """Remove tokens and their merges from a tokenizer's JSON. named: ids that stay; often: ids that stay first. Returns
    the ids that stay, ascending."""
    vocab: dict[str, int] = data["model"]["vocab"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in data["model"]["merges"]]
    made_of: dict[int, tuple[int, int]] = {}
    for one, other in merges:
        made_of.setdefault(vocab[one + other], (vocab[one], vocab[other]))
    kept = {token["id"] for token in data["added_tokens"]} | {index for index in vocab.values() if index not in made_of}
    for index in named:
        kept |= _with_parts(index, made_of, kept)
    if len(kept) > rows:
        raise RecipeError(
            f"the model's tokenizer has {len(kept):,} tokens that cannot be removed, and the ratio leaves "
            f"{max(rows, 0):,}: lower the ratio"
        )
    for index in (*often, *made_of):
        gained = _with_parts(index, made_of, kept)
        if len(kept) + len(gained) > rows:
            break
        kept |= gained
    data["model"]["merges"] = [
        [one, other] for one, other in merges if {vocab[one], vocab[other], vocab[one + other]} <= kept
    ]
    data["model"]["vocab"] = {token: index for token, index in vocab.items() if index in kept}
    return sorted(kept)


def _with_parts(index: int, made_of: dict[int, tuple[int, int]], kept: set[int]) -> set[int]:
    """A token and the tokens that its merges join, without those that are kept already."""
    found, left = set(), [index]
    while left:
        token = left.pop()
        if token not in kept and token not in found:
            found.add(token)
            left += made_of.get(token, ())
    return found


def _renumber(data: Any, new: dict[int, int]) -> None:
    """Give the kept tokens their new ids, wherever a tokenizer's JSON names them."""
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {token: new[index] for token, index in vocab.items()}
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    if data.get("padding"):
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    for part in _processors(data.get("post_processor")):
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], new[part[name][1]]]
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new[index] for index in token["ids"]]


def _processors(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A post-processor of a tokenizer's JSON, or the parts of a sequence of them."""
    if part is None:
        return []
    return [each for inner in part["processors"] for each in _processors(inner)] if "processors" in part else [part]


def _rebuilt(tokenizer: PreTrainedTokenizerBase, data: dict[str, Any], new: dict[int, int]) -> PreTrainedTokenizerBase:
    """The tokenizer of transformers with another core. Its other files stay, but for those that hold a vocabulary."""
    with tempfile.TemporaryDirectory(prefix="edgelm-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            if path.name in ("vocab.json", "merges.txt") or path.suffix == ".model":
                path.unlink()
        (folder / TOKENIZER_NAME).write_text(json.dumps(data), encoding="utf-8")
        settings_file = folder / TOKENIZER_CONFIG_NAME
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in settings:
            added = settings["added_tokens_decoder"].items()
            settings["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in added}
            settings_file.write_text(json.dumps(settings), encoding="utf-8")
        return load_tokenizer(folder)


def _parts_of(whole: Any, data: dict[str, Any], new: dict[int, int], rows: int) -> tuple[tuple[int, ...], ...]:
    """For each id of the whole tokenizer, the ids of its characters in the shorter one's JSON."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(json.dumps(data)).model
    parts: list[tuple[int, ...]] = []
    for old in range(rows):
        if old in new:
            parts.append((new[old],))
        else:
            token = whole.id_to_token(old)
            parts.append(() if token is None else tuple(part.id for part in model.tokenize(token)))
    return tuple(parts)


def _check_texts(whole: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase) -> None:
    """Check on hard texts that the smaller tokenizer's ids give back the same text. Raises: RecipeError."""
    for text in HARD_TEXTS:
        expected, found = (each.decode(each(text, verbose=False)["input_ids"]) for each in (whole, smaller))
        if found != expected:
            raise RecipeError(
                f"with fewer tokens, the model's tokenizer gives {found!r:.60} back for {expected!r:.60}: remove the "
                "step trim-vocabulary"
            )
