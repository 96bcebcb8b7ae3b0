"""Load and describe a model that `finding` found. Only safetensors and GGUF are read. Remote code never runs."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.manifest import Source, Tokens
from ...runtime.host.files import MODEL_TEXT_BYTES, read_text
from ..errors import SourceError
from . import gguf as gguf_source
from .architecture import check_architecture
from .compressed import load_compressed, read_record
from .config import one_line, read_config
from .finding import short_name
from .quantized import widening
from .rotation import rotation_name, steady_length
from .tokenizer import check_vocabulary, load_tokenizer, special_tokens
from .unused_weights import check_unused

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNLIMITED_CONTEXT = 1 << 20


@dataclass(frozen=True)
class SourceModel:
    """The description of a model, without its weights.

    compression: earlier compression steps, with settings, choices and figures; notes: where the bundle deviates from
    the model's files, in sentences.
    """

    tokenizer: PreTrainedTokenizerBase
    source: Source
    tokens: Tokens
    name: str
    context_length: int
    vocab_size: int
    parameters: int
    compression: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


def load_module(folder: Path) -> PreTrainedModel:
    """The model of a folder or file from `find_source`, in evaluation mode and float32, with all weights finite.

    Cost: the weights in memory, read one at a time; of GGUF files up to twice that. Raises: SourceError.
    """
    if read_record(folder) is not None:
        return _load_compressed(folder)
    if folder.is_file():
        return _load_gguf(folder)
    import torch
    import transformers

    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported below by name
            output_loading_info=True,
            **widening(read_config(folder)),
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds for a bad folder
        raise SourceError(f"{folder} cannot be loaded: {one_line(error)}") from error
    module = _checked(folder, loaded[0], loaded[1])
    check_unused(folder, module, loaded[1]["unexpected_keys"])
    return module


def _load_gguf(file: Path) -> PreTrainedModel:
    with gguf_source.one_file(file) as whole:
        try:
            config = gguf_source.read_config(whole)
            check_architecture(file, config.to_dict())
            module, info = gguf_source.load_weights(whole, config)
        except SourceError:
            raise
        except Exception as error:  # transformers, gguf and torch each raise their own kinds for what they do not know
            raise SourceError(
                f"{file} cannot be loaded: {one_line(error)}: give the model's folder in Hugging Face's format"
            ) from error
    return _checked(file, module, info)


def _checked(place: Path, module: Any, info: dict[str, Any]) -> PreTrainedModel:
    """The module, after checking that every weight was read and is finite. info: transformers' report about keys."""
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise SourceError(
            f"{place}: weights are missing or of another shape, such as {names[0]}: download the model again"
        )
    _check_numbers(place, module)
    evaluating: PreTrainedModel = module.eval()
    return evaluating


def _load_compressed(folder: Path) -> PreTrainedModel:
    try:
        module = load_compressed(folder)
    except SourceError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds for a bad folder
        raise SourceError(f"{folder} cannot be loaded: {one_line(error)}: compress the model again") from error
    _check_numbers(folder, module)
    return module


def describe_source(model: str, folder: Path, module: PreTrainedModel) -> SourceModel:
    """Tokenizer and description of a loaded model. A compressed model has its source's name. Raises: SourceError."""
    tokenizer = load_tokenizer(folder)
    record = read_record(folder)
    vocab_size = int(module.config.get_text_config().vocab_size)
    spare = check_vocabulary(folder, vocab_size, tokenizer)
    tokens, notes = special_tokens(folder, module, tokenizer)
    notes = (*spare, *notes)
    given = _context_length(module)
    context_length = steady_length(module, given)
    if context_length < given:
        notes = (
            *notes,
            f"the context ends at {context_length:,} of the model's {given:,} tokens: in longer texts its rotary "
            f"embedding ({rotation_name(module)}) rotates every token otherwise, those in the cache too",
        )
    return SourceModel(
        tokenizer=tokenizer,
        source=record.source if record else Source(model, _commit(folder), type(module).__name__, _license(folder)),
        tokens=tokens,
        name=record.name if record else short_name(model),
        context_length=context_length,
        vocab_size=vocab_size,
        parameters=module.num_parameters(),
        compression=record.steps if record else (),
        notes=notes,
    )


def token_embedding(module: PreTrainedModel) -> torch.nn.Embedding:
    """The embedding table (vocabulary, hidden). Raises: SourceError."""
    import torch

    try:
        found: Any = module.get_input_embeddings()
    except NotImplementedError:  # transformers guesses by common names; a registered class may use others
        found = next((item for item in module.modules() if isinstance(item, torch.nn.Embedding)), None)
    if not isinstance(found, torch.nn.Embedding):
        raise SourceError(f"{type(module).__name__} looks token ids up in no table: edgelm cannot export it")
    return found


def cache_argument(module: PreTrainedModel) -> str:
    """The name of a model's cache argument: some recurrent models have their own."""
    known = inspect.signature(module.forward).parameters
    return "past_key_values" if "past_key_values" in known else "cache_params"


def _check_numbers(folder: Path, module: PreTrainedModel) -> None:
    """Check that all weights are finite. Cost: one pass over the weights."""
    import torch

    for name, weight in module.named_parameters():
        # NaN or infinity make the sum not finite, but so may an overflow: only then is each value checked, which takes
        # several passes and masks.
        if bool(torch.isfinite(weight.detach().sum())):
            continue
        wrong = int((~torch.isfinite(weight)).sum())
        if wrong:
            raise SourceError(
                f"{_weight_file(folder, name)}: {wrong} of the {weight.numel()} values of {name} are NaN or "
                "infinite: download the model again, or save it in a type that holds its values"
            )


def _weight_file(folder: Path, name: str) -> Path:
    """The file that holds a weight, by the index of a model in several files, or the only file."""
    if folder.is_file():
        return folder
    index = folder / "model.safetensors.index.json"
    files = json.loads(read_text(index, MODEL_TEXT_BYTES)).get("weight_map", {}) if index.is_file() else {}
    return folder / str(files.get(name, min(path.name for path in folder.glob("*.safetensors"))))


def _context_length(module: PreTrainedModel) -> int:
    """The model's context length. A configuration without one is of a model without a limit (a recurrence, or attention
    by distances): it gets a length that no device reaches."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(module.config.get_text_config(), name, None)
        if isinstance(length, int) and length > 0:
            return length
    return _UNLIMITED_CONTEXT


def _commit(folder: Path) -> str | None:
    """The commit of a downloaded model, by the folder's name in the hub's cache."""
    snapshot = folder.parent if folder.is_file() else folder
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def _license(folder: Path) -> str | None:
    """The licence in the model card's header or in the GGUF file, if any."""
    if folder.is_file():
        return gguf_source.license_of(folder)
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"^license:\s*(\S+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found.group(1) if found else None
