"""Figures of a server for Prometheus. Names begin with `edgelm:` and are llama.cpp's where it has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ..results import Stats
from .models import Models

_COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts that were computed",
    "prompt_tokens_cached_total": "Tokens of prompts that were known",
    "prompt_seconds_total": "Seconds until first tokens, added up",
    "tokens_predicted_total": "Tokens of answers that were computed",
    "tokens_predicted_seconds_total": "Seconds from first tokens to last ones, added up",
    "answers_total": "Answers that ended",
    "answers_cached_total": "Answers that the response cache had",
}
_GAUGES = {
    "requests_processing": "Requests under way or waiting",
    "requests_deferred": "Requests that wait for a row of the running batch",
    "model_loaded": "1 while the model is loaded",
    "model_bytes": "Memory that the model takes, estimated",
}
_PREFIX = "edgelm:"


class Metrics:
    """Counters by model. Used on one event loop."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_COUNTERS, 0.0))

    def answered(self, model: str, stats: Stats) -> None:
        """Count an answer that ended."""
        counts = self._counts[model]
        counts["answers_total"] += 1
        if stats.response_cache_hit:
            counts["answers_cached_total"] += 1
            return
        counts["prompt_tokens_total"] += stats.prompt_tokens - stats.reused_tokens
        counts["prompt_tokens_cached_total"] += stats.reused_tokens
        counts["prompt_seconds_total"] += stats.time_to_first_token_s
        counts["tokens_predicted_total"] += stats.generated_tokens
        if stats.decode_tokens_per_s > 0:
            counts["tokens_predicted_seconds_total"] += (stats.generated_tokens - 1) / stats.decode_tokens_per_s

    def text(self, models: Models) -> str:
        """All figures in Prometheus' text format."""
        gauges: dict[str, dict[str, float]] = {
            model.name: {
                "requests_processing": model.users,
                "requests_deferred": 0 if model.engine is None else model.engine.requests[1],
                "model_loaded": int(model.engine is not None),
                "model_bytes": model.size,
            }
            for model in models
        }
        counts = {name: self._counts[name] for name in gauges}
        lines = [*_lines("counter", _COUNTERS, counts), *_lines("gauge", _GAUGES, gauges)]
        return "\n".join([*lines, ""])


def _lines(kind: str, helps: dict[str, str], values: dict[str, dict[str, float]]) -> Iterator[str]:
    for name, text in helps.items():
        yield f"# HELP {_PREFIX}{name} {text}"
        yield f"# TYPE {_PREFIX}{name} {kind}"
        for model, figures in values.items():
            yield f'{_PREFIX}{name}{{model="{_label(model)}"}} {figures[name]:g}'


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
