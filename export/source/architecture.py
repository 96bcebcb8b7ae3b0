"""Check by its configuration that a model can be exported: a causal language model of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SourceError

# Parts of a configuration that describe what a model reads besides text.
_SENSES = ("vision_config", "audio_config", "speech_config", "image_config", "video_config")


def check_architecture(place: Path, config: dict[str, Any]) -> None:
    """Check that a configuration is one of a causal model of text that transformers knows. Remote code never runs.

    place: the configuration's file, for messages. Raises: SourceError.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise SourceError(f"{place} needs code of its own ({config['auto_map']}), which edgelm never runs")
        raise SourceError(f"{place}: model_type {kind!r} is unknown to the installed transformers: update it")
    causal = _causal_names(kind)
    # transformers lists encoders such as BERT as causal models too, so the saved class decides.
    saved = config.get("architectures") or causal
    is_causal = bool(causal) and not _all_causal_names(causal).isdisjoint(saved)
    # It also lists some models of text and images.
    senses = [name for name in config if name in _SENSES and config[name] is not None]
    if not is_causal or senses or config.get("is_encoder_decoder"):
        raise SourceError(
            f"{place}: {', '.join(map(str, saved))} (model_type {kind!r}) is {_other_kind(kind, config, senses)}"
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
    """What kind of model it is instead, and what to do about it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    only = "edgelm exports causal models only"
    if senses:
        return f"a multimodal model ({', '.join(senses)}), and {only}: give a model of text alone"
    both = config.get("is_encoder_decoder", getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False))
    what = "an encoder and a decoder" if both else "no causal language model"
    return f"{what}, and {only}: give one whose architecture ends in ForCausalLM"
