"""A GGUF file as a source. transformers reads it; files that it would misread, or never finish reading, are refused
before.

Weights are dequantized to float32. Tokenizer, chat template and end tokens come from the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from .gguf_file import Header, check_parts, find_parts, join_parts, model_name, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUFFIX = ".gguf"
_FREQUENCIES = "rope_freqs.weight"
_NO_SCALING = ("", "none")
# Keys of further tokens at which llama.cpp ends an answer.
_ENDS = ("eos", "eot", "eom")
# Pre-tokenizers, by the names that convert_hf_to_gguf.py writes, that transformers' reader does not know: single
# digits, then GPT-2's rule. It uses only GPT-2's rule for them.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_AS_GPT2 = ("default", "gpt-2", "phi-2", "mpt", "olmo", "roberta-bpe", "gigachat", "trillion", "jais")
_logger = logging.getLogger(__name__)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its suffix or its first bytes."""
    if path.suffix.lower() == SUFFIX:
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def gguf_in(folder: Path) -> Path | None:
    """The only model in a folder with GGUF files and no safetensors; the first file if it has several parts.

    Raises: SourceError for several models.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())
    if not files or any(folder.glob("*.safetensors")):
        return None
    models = {model_name(path): path for path in reversed(files)}
    if len(models) > 1:
        raise SourceError(
            f"{folder} holds {len(models)} models ({', '.join(sorted(models))}): name one GGUF file of it"
        )
    return files[0]


def check_gguf(path: Path) -> Path:
    """Check the headers of a file, or of all its parts, before weights are read.

    Returns: the file, or the first part. Raises: SourceError.
    """
    headers = _headers(path)
    first, kinds = headers[0], {tensor.type: tensor.name for header in headers for tensor in header.tensors}
    layers = first.get(f"{_architecture(first)}.block_count", 0)
    if not isinstance(layers, int) or layers > sum(len(header.tensors) for header in headers):
        raise SourceError(
            f"{path} is damaged: its header speaks of {layers} layers, more than tensors: download it again"
        )
    for kind, name in kinds.items():
        _check_type(path, kind, name)
    _check_tokenizer(first)
    _check_rope(headers)
    return first.path


def _headers(path: Path) -> list[Header]:
    headers = [read_header(part) for part in find_parts(path)]
    if len(headers) > 1 or headers[0].get("split.count", 1) != 1:
        check_parts(headers)
    return headers


def _architecture(header: Header) -> str:
    found = header.get("general.architecture")
    if not isinstance(found, str):
        raise SourceError(f"{header.path} names no architecture: convert the model again with a newer llama.cpp")
    return found


def _check_type(path: Path, kind: int, name: str) -> None:
    import gguf
    import numpy as np

    found = gguf.GGMLQuantizationType(kind)
    _, size = gguf.GGML_QUANT_SIZES[found]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), found)
    except NotImplementedError as error:  # gguf raises it for types that it cannot dequantize
        raise SourceError(
            f"{path}: its tensor {name} has the type {found.name}, which the package gguf cannot turn into float32: "
            "give another quantization of the model, such as Q8_0 or F16"
        ) from error


def _check_tokenizer(header: Header) -> None:
    tokens = header.get("tokenizer.ggml.tokens")
    if not isinstance(header.get("tokenizer.ggml.model"), str) or not isinstance(tokens, list) or not tokens:
        raise SourceError(
            f"{header.path} has no tokenizer: give a GGUF file with one, or the model's folder in Hugging Face's format"
        )


def _check_rope(headers: list[Header]) -> None:
    """Refuse scaled rotary embeddings: transformers' reader silently ignores the scaling."""
    header, architecture = headers[0], _architecture(headers[0])
    kind = header.get(f"{architecture}.rope.scaling.type", "none")
    names = {tensor.name for item in headers for tensor in item.tensors}
    left_out = next((name for name in sorted(names) if name.startswith("rope_factors")), None)
    if left_out is None and kind not in _NO_SCALING:
        left_out = f"{architecture}.rope.scaling.type {kind!r}"
    if left_out is not None:
        raise SourceError(
            f"{header.path}: its rotary embedding is scaled ({left_out}), which transformers' reader of GGUF leaves "
            "out: give the model's folder in Hugging Face's format"
        )


@contextlib.contextmanager
def one_file(path: Path) -> Iterator[Path]:
    """A model's file, or its parts joined in a temporary folder: transformers does not read parts.

    Cost: for parts, the model's size on the disk. Raises: SourceError, OSError.
    """
    headers = _headers(path)
    if len(headers) == 1:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="edgelm-") as scratch:
        whole = Path(scratch) / f"{model_name(path)}{SUFFIX}"
        join_parts(headers, whole)
        yield whole


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration that transformers makes from a file, completed where it ignores entries. Raises: as
    transformers; SourceError."""
    import transformers

    header = read_header(path)
    architecture = _architecture(header)
    config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    size = header.get(f"{architecture}.attention.key_length")
    if isinstance(size, int) and isinstance(getattr(config, "head_dim", None), int):
        config.head_dim = size
    _scale_rope(header, config)
    return config


def _scale_rope(header: Header, config: PreTrainedConfig) -> None:
    """Restore Llama 3's scaling, which the file stores as a factor for each frequency. Raises: SourceError for any
    other scaling."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tensor = next((item for item in header.tensors if item.name == _FREQUENCIES), None)
    if tensor is None:
        return
    factors = np.fromfile(header.path, np.float32, tensor.elements, offset=tensor.offset) if tensor.type == 0 else None
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if factors is not None and "rope_theta" in rope:
        plain = rope["rope_theta"] ** -(np.arange(len(factors)) / len(factors))
        known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        config.rope_parameters = {**rope, "rope_type": "llama3", "factor": float(factors.max()), **known}
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
        if len(found) == len(factors) and np.allclose(found.numpy(), plain / factors, rtol=1e-4, atol=0):
            return
    raise SourceError(
        f"{header.path}: its rotary embedding is scaled ({_FREQUENCIES}) in another way than Llama 3's: give the "
        "model's folder in Hugging Face's format"
    )


def load_weights(path: Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The dequantized model, and transformers' report about keys. Raises: as transformers; SourceError."""
    import torch
    import transformers

    _check_size(path, config)
    # Its progress bar cannot be switched off.
    with contextlib.redirect_stderr(io.StringIO()):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # as for safetensors: the caller reports them
            output_loading_info=True,
        )
    module: PreTrainedModel = loaded[0]
    ends = [read_header(path).get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    known = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if module.generation_config is not None and len(known) > 1:
        module.generation_config.eos_token_id = known
    return module, loaded[1]


def _check_size(path: Path, config: PreTrainedConfig) -> None:
    """Check that the sizes in the header fit the tensors: otherwise transformers silently invents or ignores weights.

    Nothing is allocated. Raises: SourceError.
    """
    import torch
    import transformers

    make: Any = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        wanted = sum(weight.numel() for weight in make(config, trust_remote_code=False).parameters())
    layers = config.get_text_config().num_hidden_layers
    given = sum(tensor.elements for tensor in read_header(path).tensors if not _is_spare(tensor.name, config, layers))
    if given != wanted:
        what = "of which transformers' reader leaves some out" if given > wanted else "so some are missing"
        raise SourceError(
            f"{path} has tensors of {given:,} values, and a {config.model_type} of its sizes has {wanted:,}, {what}: "
            "give the model's folder in Hugging Face's format, or download it again"
        )


def _is_spare(name: str, config: PreTrainedConfig, layers: int) -> bool:
    """Whether a tensor is not needed: a head tied to the embedding, layers for draft tokens, or frequencies that the
    configuration has."""
    parts = name.split(".")
    beyond = parts[0] == "blk" and parts[1].isdigit() and int(parts[1]) >= layers
    return beyond or name == _FREQUENCIES or (name == "output.weight" and bool(config.tie_word_embeddings))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes from a file, with its chat template. Raises: as transformers."""
    import transformers
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    header = read_header(path)
    tokenizer = _without_foreign(tokenizer, len(header.get("tokenizer.ggml.tokens")))
    rule = header.get("tokenizer.ggml.pre", "default")
    if header.get("tokenizer.ggml.model") == "gpt2" and rule not in GGUF_PRE_TOKENIZER_SPLITS:
        if rule in _SINGLE_DIGITS:
            digits = pre_tokenizers.Digits(individual_digits=True)
            cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, cut])
        elif rule not in _AS_GPT2:
            _logger.warning("%s: its rule to cut words, %r, is unknown here, so GPT-2's is taken", path, rule)
    found: PreTrainedTokenizerBase = tokenizer
    return found


def _without_foreign(tokenizer: Any, count: int) -> Any:
    """transformers adds the token <|endoftext|> to every byte-level tokenizer. If the file does not have it, its id is
    behind the model's last one, and it is removed. count: number of the file's tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in backend["added_tokens"] if token["id"] < count]
    if len(own) == len(backend["added_tokens"]):
        return tokenizer
    backend["added_tokens"] = own
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), chat_template=tokenizer.chat_template, **named
    )


def license_of(path: Path) -> str | None:
    """The licence that a file names."""
    found = read_header(path).get("general.license")
    return found if isinstance(found, str) else None
