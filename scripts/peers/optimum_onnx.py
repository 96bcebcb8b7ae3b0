"""optimum-onnx: its export, its dynamic quantization for this CPU, and its runtime class with IO binding."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig, QuantizationConfig

FILES = ("model_quantized.onnx*",)


def convert(model: Path, folder: Path, variant: str) -> None:
    whole = folder / "whole"
    main_export(str(model), whole, task="text-generation-with-past", library_name="transformers")
    ORTQuantizer.from_pretrained(whole, file_name="model.onnx").quantize(_recipe(), save_dir=folder)


def _recipe() -> QuantizationConfig:
    """optimum's own recipe for this processor."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8") if cpu.exists() else ""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return AutoQuantizationConfig.arm64(is_static=False, per_channel=False)
    if "avx512_vnni" in flags:
        return AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    return AutoQuantizationConfig.avx2(is_static=False, per_channel=False)


class Loaded:
    def __init__(self, model: ORTModelForCausalLM) -> None:
        self._model = model

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        step, past = torch.tensor([ids]), None
        for done in range(count):
            length = len(ids) + done
            begin = length - step.shape[1]
            output = self._model(
                input_ids=step,
                attention_mask=torch.ones((1, length), dtype=torch.int64),
                position_ids=torch.arange(begin, length)[None],
                past_key_values=past,
                use_cache=True,
            )
            past, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(step)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Any:
        step = torch.tensor([ids])
        return (
            self._model(
                input_ids=step,
                attention_mask=torch.ones_like(step),
                position_ids=torch.arange(len(ids))[None],
                past_key_values=None,
                use_cache=True,
            )
            .logits[0]
            .numpy()
        )

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        return list(itertools.takewhile(lambda token: token not in ends, self.generate(ids, count)))


def load(folder: Path, variant: str, threads: int, capacity: int) -> Loaded:
    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return Loaded(
        ORTModelForCausalLM.from_pretrained(folder, file_name="model_quantized.onnx", session_options=options)
    )
