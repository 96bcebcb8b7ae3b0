"""Bundles without weights, small enough to transfer, for measuring speed with random weights.

    python scripts/gpu/skeleton.py CONFIG FOLDER SCHEME...

A model of CONFIG's sizes, without computing its weights, is traced and goes through an export's passes for the target
cuda. FOLDER/SCHEME then holds a bundle except its weights; `random_weights.py` makes them on the machine that runs it.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from reference_model import build_tokenizer

from edgelm.export.codes.blocks import BLOCK_SCHEMES, Blocks, BlockSettings
from edgelm.export.passes import fusing_passes, narrowing_passes, quantizing_passes
from edgelm.export.tracing.attention import trace_model
from edgelm.runtime.bundle.folder import GRAPH_NAME, WEIGHTS_NAME
from edgelm.runtime.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    CacheType,
    LayerCache,
    Manifest,
    Model,
    Quantization,
    Source,
    Target,
    Tokens,
)
from edgelm.targets import load_target

# Computed tables and vectors stay in the graph.
_TABLES = ("rotary.", "pick.")
_PAGE = 4096
Layers = tuple[LayerCache | None, ...]


class ShapesOnly:
    """Replaces a quantizer: returns blocks of the right shapes."""

    def __init__(self, settings: BlockSettings) -> None:
        self.settings = settings

    def quantized(self, _: str, matrix: NDArray[Any], symmetric: bool) -> Blocks:
        inputs, outputs = matrix.shape
        count, size = -(-inputs // self.settings.block), self.settings.block * self.settings.bits // 8
        zeros = -(-count * self.settings.bits // 8)
        return Blocks(
            np.broadcast_to(np.uint8(0), (outputs, count, size)),
            np.broadcast_to(np.float32(0), (outputs, count)),
            None if symmetric else np.broadcast_to(np.uint8(0), (outputs, zeros)),
        )


def main() -> None:
    config, folder, schemes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    module = empty_module(config)
    traced = trace_model(module)
    ir.passes.PassManager(fusing_passes(module.config.max_position_embeddings))(traced.graph)
    for scheme in schemes:
        out = folder / scheme
        out.mkdir(parents=True, exist_ok=True)
        write_skeleton(module, traced.layers, traced.graph.clone(), scheme, out)
        build_tokenizer(out, module.config.vocab_size)
        print(out, sum(file.stat().st_size for file in out.iterdir()), flush=True)


def empty_module(config: Path) -> Any:
    """The model with uninitialized memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32).eval()


def write_skeleton(module: Any, layers: Layers, graph: ir.Model, scheme: str, out: Path) -> None:
    """Write graph and manifest of a fused graph. The manifest lists no files; they are added on the other machine."""
    profile, context_length = load_target("cuda"), module.config.max_position_embeddings
    quantizer: Any = ShapesOnly(BLOCK_SCHEMES[scheme]) if scheme in BLOCK_SCHEMES else None
    passes = [*quantizing_passes(scheme, profile.weight_bits, {}, (), quantizer), *narrowing_passes()]
    ir.passes.PassManager(passes)(graph)
    ir.passes.common.ClearMetadataAndDocStringPass()(graph)
    leave_out_weights(graph)
    ir.save(graph, out / GRAPH_NAME)
    vocabulary = int(module.config.vocab_size)
    shape = Model(vocabulary, context_length, module.num_parameters(), layers, CacheType("float16", None))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=scheme,
        source=Source("random", None, type(module).__name__, None),
        target=Target(profile.name, profile.settings()),
        compression=(),
        quantization=Quantization(scheme, ()),
        model=shape,
        tokens=Tokens(bos=0, eos=(0,), pad=None),
        quality={},
        files={},
        versions={"torch": importlib.metadata.version("torch")},
    )
    (out / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def leave_out_weights(graph: ir.Model) -> None:
    """Make each matrix of weights, scales or zero points external, at its own offset in a file that does not exist."""
    offset = 0
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if len(tensor.shape) < 2 or name.startswith(_TABLES):
            continue
        value.const_value = ir.ExternalTensor(
            WEIGHTS_NAME, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=name
        )
        offset += -(-tensor.nbytes // _PAGE) * _PAGE


if __name__ == "__main__":
    main()
