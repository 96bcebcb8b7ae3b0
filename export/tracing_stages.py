"""The stages from a model to a proven fp32 graph: load, trace, fuse, compare with torch.

The fp32 graph is written to a scratch folder, because it is what torch is compared with, what calibrates the cache,
what the quantized graphs are made of, and what they are judged by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.bundle.manifest import CacheType, Model
from ..runtime.errors import SessionError, VerificationError
from ..runtime.text.tokenizer import Tokenizer
from .compress.weights_int4 import SCHEME as WEIGHTS_SCHEME
from .compress.weights_int4 import noted_weights, require_agreement
from .errors import RecipeError, TraceError
from .gate import verify
from .gate.cache_prompts import UnusualTokens, unusual_tokens
from .gate.judging import make_judging
from .output import package
from .passes import fusing_passes
from .passes.call_attention import calls_all_attention
from .source.loading import SourceModel, describe_source, load_module, token_embedding
from .source.tokenizer_check import check_tokenizer
from .texts import calibrating_texts
from .tracing.attention import TracedModel
from .tracing.ways import refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from .context import Context, save_graph


def load(context: Context) -> None:
    """The model and its tokenizer, and the text in tokens. Raises: SourceError, RecipeError."""
    module = load_module(context.folder)
    context.module, context.source = module, describe_source(context.config.model, context.folder, module)
    context.blocks = noted_weights(module)
    if context.blocks is not None:
        require_agreement(context.config.scheme, f"{context.config.model} was compressed with weights-int4, which")
        context.scheme = WEIGHTS_SCHEME
    for folder in (context.result, context.reference, context.answers):
        folder.mkdir()
    package.write_tokenizer(context.source.tokenizer, module, context.result)
    texts = context.config.read_texts()
    bundled = Tokenizer(context.result / names.TOKENIZER_NAME)
    check_tokenizer(context.source.tokenizer, bundled, texts.calibrating)
    context.text_ids = bundled.encode(texts.calibrating)
    context.calibrating_ids = [bundled.encode(text) for text in (texts.calibrating, *calibrating_texts())]
    context.unusual = _unusual_tokens(context, module)
    source = context.source
    context.judging = make_judging(texts, bundled, context.result, source.context_length, source.tokens)


def _unusual_tokens(context: Context, module: PreTrainedModel) -> UnusualTokens:
    """Rows behind the tokenizer's last token are padding, and in nobody's text."""
    source, embedding = context.source, token_embedding(module)
    rows = embedding.weight.detach()[: min(source.vocab_size, len(source.tokenizer))]
    return unusual_tokens(source.tokenizer, source.tokens.bos, rows, context.result)


def trace(context: Context) -> None:
    """Trace on the first path, of those that were not tried yet, that the model can go."""
    if context.module is None:
        context.module = load_module(context.folder)
    last: TraceError | None = None
    for name, take in context.paths:
        try:
            traced = take(context.module)
        except TraceError as error:
            context.refusals.append(f"{name}: {error}")
            last = error
            continue
        context.path, context.graph, context.shape = name, traced.graph, _shape(context.source, traced)
        context.kv = _cache_type(context)
        return
    raise refused(f"{context.config.model} cannot be exported", context.refusals) from last


def _shape(source: SourceModel, traced: TracedModel) -> Model:
    return Model(
        vocab_size=source.vocab_size,
        context_length=source.context_length,
        parameters=source.parameters,
        layers=traced.layers,
        kv=CacheType("float32", None),
        cache_layout=traced.layout,
        states=traced.states,
        step_tokens=traced.step_tokens,
    )


def _cache_type(context: Context) -> str:
    """What was asked for, else the scheme's default; but only a fused operator can read an INT8 cache."""
    wanted = context.config.kv or context.profile.kv[context.scheme]
    if context.shape.cache_layout == "in_place" or wanted == "float32":
        return wanted
    if context.profile.activations == "float16":
        raise TraceError(
            f"{context.config.model}'s attention is not fused, which float16 activations need: export it for a CPU"
        )
    if context.config.kv is not None:
        raise RecipeError("this model's attention is not fused, so its cache cannot be int8: leave --kv out")
    return "float32"


def fuse(context: Context) -> None:
    """The graph passes up to the fp32 graph that runs, which is written to the scratch folder."""
    assert context.graph is not None, "set when the model was traced"
    ir.passes.PassManager(fusing_passes(context.source.context_length))(context.graph)
    save_graph(context.graph, context.reference)
    # Kernels give each key and value a scale of its own, where they compute all attention.
    context.granularity = "token" if calls_all_attention(context.graph) else "channel"
    context.graph = None  # it is read from its file from now on; this one holds on to torch's weights


def compare_with_torch(context: Context) -> None:
    """The trial: a path on which the graph does not answer as torch does is given up for the next one."""
    while True:
        answers = _ask_torch(context)
        try:
            with context.session(context.reference, "float32") as session:
                context.source_agreement = verify.compare_with_source(answers, session, context.profile.gate)
            return
        except (VerificationError, SessionError) as error:
            context.refusals.append(f"{context.path}: {error}")
        trace(context)
        fuse(context)


def _ask_torch(context: Context) -> verify.SourceAnswers:
    """torch's answers; its weights are let go then, so that the same weights are not in memory twice when onnxruntime
    loads them. Another path, which few models need, loads them again."""
    assert context.module is not None, "set when the model was traced"
    answers = verify.ask_source(context.module, context.text_ids, context.model("float32"), context.answers)
    # By themselves they would stay: onnxscript's rules for rewriting remember the last graph that they saw.
    for weight in context.module.parameters():
        weight.data = weight.new_empty(0)
    context.module = None
    return answers
