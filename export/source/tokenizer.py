"""A model's tokenizer: load it, check it against the vocabulary, find the special tokens at which answers end."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.manifest import Tokens
from ..errors import SourceError
from . import gguf
from .config import one_line, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or GGUF file. Raises: SourceError."""
    import transformers

    if folder.is_file():
        return _load_gguf_tokenizer(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a missing file surfaces as OSError, ValueError, TypeError or KeyError
        raise SourceError(
            f"{folder} has no tokenizer that can be loaded ({one_line(error)}): {_tokenizer_advice(folder)}"
        ) from error
    if not tokenizer.is_fast or tokenizer.vocab_size == 0:
        raise SourceError(f"{folder} has no tokenizer in the form of tokenizer.json: add that file to the folder")
    return tokenizer


def _load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    try:
        return gguf.load_tokenizer(file)
    except Exception as error:  # transformers and tokenizers each raise their own kinds for what they do not know
        raise SourceError(
            f"{file} has no tokenizer that can be loaded ({one_line(error)}): give the model's folder in Hugging "
            "Face's format"
        ) from error


def check_vocabulary(folder: Path, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Check that every token has a row in the model. More rows than tokens are common, since rows are padded. A padding
    token without a row, added for training, is accepted: prompts do not need it.

    Returns: notes for the user. Raises: SourceError.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    needed = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    template = str(tokenizer.chat_template or "")
    spare = [token for token in tokenizer.get_added_vocab() if token not in needed and token not in template]
    wrong = [index for token, index in beyond.items() if token not in spare]
    if wrong:
        raise SourceError(
            f"{folder}: the tokenizer gives id {max(wrong)}, the model has ids 0 to {vocab_size - 1} only: "
            "give the tokenizer that belongs to the model"
        )
    named = ", ".join(map(repr, sorted(beyond)))
    return (f"prompts that hold {named} are refused: the model has no row for what was added behind",) if beyond else ()


def _tokenizer_advice(folder: Path) -> str:
    """What is missing. transformers' own message wrongly names tiktoken if it cannot read a SentencePiece file."""
    packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [package for module, package in packages.items() if not _installed(module)]
    if missing and any(folder.glob("*.model")) and not (folder / "tokenizer.json").is_file():
        return f"pip install {' '.join(missing)} if it is of SentencePiece, or add its tokenizer.json"
    return "add its tokenizer.json"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around a submodule is missing
        return False


def special_tokens(
    folder: Path, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokens, tuple[str, ...]]:
    """Special tokens, and notes for the user.

    An answer ends at the tokens of the generation configuration and at the tokenizer's end token, which in chat models
    is the end of a turn. Authors often change only one of the two.
    """
    config = module.config.to_dict() if folder.is_file() else read_config(folder)
    generation = module.generation_config
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = config.get("eos_token_id")
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    own = _own_end(tokenizer, int(module.config.get_text_config().vocab_size))
    notes = []
    if own is not None and own not in ends:
        known = ", ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in ends) or "no token"
        notes.append(
            f"answers end at the tokenizer's end token {tokenizer.eos_token!r} too, where the generation configuration "
            f"names {known}"
        )
        ends = (*ends, own)
    if not ends:
        _logger.warning("%s names no eos_token_id, so answers end at the limit of tokens only", folder)
    return Tokens(config.get("bos_token_id"), ends, config.get("pad_token_id")), tuple(notes)


def _own_end(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    """The id of the tokenizer's end token; None if it has none or the model lacks it: for an unknown name, tokenizers
    return the id of the unknown token."""
    found: Any = tokenizer.eos_token_id
    if found is None or found >= vocab_size or tokenizer.convert_ids_to_tokens(found) != tokenizer.eos_token:
        return None
    return int(found)
