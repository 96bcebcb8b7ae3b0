"""Where a model comes from: a local folder, a model of the hub, or the one that comes with edgelm.

Only safetensors are read and remote code is never run. The network is touched for hub ids alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.manifest import Source, Tokens
from .compress.folder import load_compressed, read_record
from .errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILTIN_PREFIX = "builtin:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]
_UNLIMITED_CONTEXT = 1 << 20
# Parts of a configuration that describe what a model reads besides text.
_SENSES = ("vision_config", "audio_config", "speech_config", "image_config", "video_config")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceModel:
    """What an export needs to know of a model beside its weights: they come and go by themselves.

    compression: the steps that it went through, with settings, choices and figures; none for most models.
    """

    tokenizer: PreTrainedTokenizerBase
    source: Source
    tokens: Tokens
    name: str
    context_length: int
    vocab_size: int
    parameters: int
    compression: tuple[dict[str, Any], ...]


def find_source(model: str, revision: str | None) -> Path:
    """The folder that holds a model: builtin, local, or downloaded from the hub.

    Checks what can be told without loading weights. Raises: SourceError.
    """
    folder = _builtin(model) if model.startswith(BUILTIN_PREFIX) else Path(model)
    if not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
            raise SourceError(
                f"{model} is no folder: give a model folder, a hub id such as owner/name, or builtin:tales"
            )
        folder = _download(model, revision)
    elif revision is not None:
        raise SourceError(f"a revision was given, but {model} is a local folder: leave --revision out")
    _check_architecture(folder, read_config(folder))
    _check_weights(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises: SourceError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error.strerror}): give a folder in Hugging Face's format"
        ) from error
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON ({error}): download the model again") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no JSON object: download the model again")
    return config


def load_module(folder: Path) -> PreTrainedModel:
    """The model of a folder from `find_source`, in evaluation mode, float32, every weight a number.

    Cost: the weights in memory, read one at a time. Raises: SourceError.
    """
    if read_record(folder) is not None:
        return _load_compressed(folder)
    import torch
    import transformers

    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are looked for below, where their names can be told
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds for a bad folder
        raise SourceError(f"{folder} cannot be loaded: {_words(error)}") from error
    module: PreTrainedModel = loaded[0].eval()
    info = loaded[1]
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise SourceError(
            f"{folder}: weights are missing or of another shape, such as {names[0]}: download the model again"
        )
    _check_numbers(folder, module)
    return module


def _load_compressed(folder: Path) -> PreTrainedModel:
    try:
        module = load_compressed(folder)
    except SourceError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds for a bad folder
        raise SourceError(f"{folder} cannot be loaded: {_words(error)}: compress the model again") from error
    _check_numbers(folder, module)
    return module


def describe_source(model: str, folder: Path, module: PreTrainedModel) -> SourceModel:
    """Tokenizer and description of a loaded model; a compressed one goes by its source's name. Raises: SourceError."""
    tokenizer = _load_tokenizer(folder)
    record = read_record(folder)
    vocab_size = int(module.config.get_text_config().vocab_size)
    _check_vocabulary(folder, vocab_size, tokenizer)
    return SourceModel(
        tokenizer=tokenizer,
        source=record.source if record else Source(model, _commit(folder), type(module).__name__, _license(folder)),
        tokens=_tokens(folder, module, read_config(folder)),
        name=record.name if record else model.removeprefix(BUILTIN_PREFIX).rstrip("/").rsplit("/", 1)[-1],
        context_length=_context_length(module),
        vocab_size=vocab_size,
        parameters=module.num_parameters(),
        compression=record.steps if record else (),
    )


def token_embedding(module: PreTrainedModel) -> torch.nn.Embedding:
    """The table (vocabulary, hidden) that token ids are looked up in. Raises: SourceError."""
    import torch

    try:
        found: Any = module.get_input_embeddings()
    except NotImplementedError:  # transformers guesses by common names; a registered class may have others
        found = next((item for item in module.modules() if isinstance(item, torch.nn.Embedding)), None)
    if not isinstance(found, torch.nn.Embedding):
        raise SourceError(f"{type(module).__name__} looks token ids up in no table: edgelm cannot export it")
    return found


def cache_argument(module: PreTrainedModel) -> str:
    """The name under which a model takes and returns its cache: models with recurrences have one of their own."""
    known = inspect.signature(module.forward).parameters
    return "past_key_values" if "past_key_values" in known else "cache_params"


def _builtin(model: str) -> Path:
    root = Path(str(resources.files(__package__))) / "builtin"
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    name = model.removeprefix(BUILTIN_PREFIX)
    if name not in names:
        raise SourceError(
            f"no model {name!r} comes with edgelm: there is {', '.join(BUILTIN_PREFIX + item for item in names)}"
        )
    return root / name


def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{model} is no local folder and cannot be fetched from the hub ({_words(error)}): check the name, the "
            "revision and the connection"
        ) from error


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise SourceError(f"{folder} needs code of its own ({config['auto_map']}), which edgelm never runs")
        raise SourceError(
            f"{folder / 'config.json'}: model_type {kind!r} is unknown to the installed transformers: update it"
        )
    causal = _causal_names(kind)
    # Encoders such as BERT are among transformers' causal models too, so the class that was saved decides.
    saved = config.get("architectures") or causal
    is_causal = bool(causal) and not _all_causal_names(causal).isdisjoint(saved)
    # Some models of text and images are among them as well.
    senses = [name for name in config if name in _SENSES and config[name] is not None]
    if not is_causal or senses or config.get("is_encoder_decoder"):
        raise SourceError(
            f"{folder / 'config.json'}: {', '.join(map(str, saved))} (model_type {kind!r}) is "
            f"{_other_kind(kind, config, senses)}"
        )


def _causal_names(kind: str) -> list[str]:
    """Names of a model type's causal classes: transformers' own, and those that the caller registered with it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = CONFIG_MAPPING[kind]
    if known not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return []
    found = MODEL_FOR_CAUSAL_LM_MAPPING[known]
    return [item.__name__ for item in (found if isinstance(found, tuple) else (found,)) if item is not None]


def _all_causal_names(own: list[str]) -> set[str]:
    """A type's own names and those of all others, under which some models are saved."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    mapped = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return {*own, *(name for names in mapped for name in ([names] if isinstance(names, str) else names))}


def _other_kind(kind: str, config: dict[str, Any], senses: list[str]) -> str:
    """What a model is that is no decoder of text, and what to do about it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    only = "edgelm exports causal models only"
    if senses:
        return f"a multimodal model ({', '.join(senses)}), and {only}: give a model of text alone"
    both = config.get("is_encoder_decoder", getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False))
    what = "an encoder and a decoder" if both else "no causal language model"
    return f"{what}, and {only}: give one whose architecture ends in ForCausalLM"


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
    if pickled:
        raise SourceError(
            f"{folder} has its weights as pickle only ({pickled[0]}), which can run code when read: "
            "convert them to safetensors (model.save_pretrained does) where you trust them"
        )
    raise SourceError(f"{folder} holds no *.safetensors: give a folder with weights")


def _check_numbers(folder: Path, module: PreTrainedModel) -> None:
    """Before anything is computed with them: are all weights numbers? Cost: one pass over the weights."""
    import torch

    for name, weight in module.named_parameters():
        # A NaN or an infinity makes the sum no number. So may an overflow: only then is each value looked at, which
        # takes several passes and writes as many masks.
        if bool(torch.isfinite(weight.detach().sum())):
            continue
        wrong = int((~torch.isfinite(weight)).sum())
        if wrong:
            raise SourceError(
                f"{folder / _weight_file(folder, name)}: {wrong} of the {weight.numel()} values of {name} are NaN or "
                "infinite: download the model again, or save it in a type that holds its values"
            )


def _weight_file(folder: Path, name: str) -> str:
    """The file that holds a weight, as the index of a model in several files says, or whatever there is."""
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}) if index.is_file() else {}
    return str(files.get(name, min(path.name for path in folder.glob("*.safetensors"))))


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a missing file surfaces as OSError, ValueError, TypeError or KeyError
        raise SourceError(
            f"{folder} has no tokenizer that can be loaded ({_words(error)}): {_tokenizer_advice(folder)}"
        ) from error
    if not tokenizer.is_fast or tokenizer.vocab_size == 0:
        raise SourceError(f"{folder} has no tokenizer in the form of tokenizer.json: add that file to the folder")
    return tokenizer


def _check_vocabulary(folder: Path, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fewer tokens than the model has rows are common, as rows are padded. More would be looked for where none are."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise SourceError(
            f"{folder}: the tokenizer gives id {highest}, the model has ids 0 to {vocab_size - 1} only: "
            "give the tokenizer that belongs to the model"
        )


def _tokenizer_advice(folder: Path) -> str:
    """What is missing. transformers' own words name tiktoken wherever it cannot read a file of SentencePiece."""
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


def _tokens(folder: Path, module: PreTrainedModel, config: dict[str, Any]) -> Tokens:
    generation = module.generation_config
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = config.get("eos_token_id")
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    if not ends:
        _logger.warning("%s: config.json names no eos_token_id, so answers end at the limit of tokens only", folder)
    return Tokens(config.get("bos_token_id"), ends, config.get("pad_token_id"))


def _context_length(module: PreTrainedModel) -> int:
    """The most positions of the model. One whose configuration names none has no positions to run out of (a recurrence,
    or attention that only looks at distances): it gets a length that no device reaches."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(module.config.get_text_config(), name, None)
        if isinstance(length, int) and length > 0:
            return length
    return _UNLIMITED_CONTEXT


def _commit(folder: Path) -> str | None:
    """The commit of a model that was downloaded: the hub's cache names its folders so."""
    return folder.name if folder.parent.name == "snapshots" else None


def _license(folder: Path) -> str | None:
    """The licence that the model card's header names, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"^license:\s*(\S+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found.group(1) if found else None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
