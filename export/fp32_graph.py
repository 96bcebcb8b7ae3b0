"""From a model to a verified fp32 graph: load, trace, fuse, compare with torch.

The fp32 graph is written to a scratch folder. It is compared with torch, calibrates the cache, is the source of the
quantized graphs, and judges them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ..runtime.bundle import folder as names
from ..runtime.bundle.manifest import CacheType, Model
from ..runtime.errors import SessionError, VerificationError
from ..runtime.sessions import providers
from ..runtime.text.tokenizer import Tokenizer
from .compress.steps.weights_int4 import SCHEME as WEIGHTS_SCHEME
from .compress.steps.weights_int4 import noted_weights, require_agreement
from .errors import RecipeError, TraceError
from .gate import verify
from .gate.cache_prompts import UnusualTokens, unusual_tokens
from .gate.judging import make_judging
from .libraries import collector_off
from .passes import fusing_passes
from .passes.call_attention import calls_all_attention
from .records import Fp32Graph, Job, Loaded, open_session, save_graph
from .source.loading import SourceModel, describe_source, load_module, token_embedding
from .source.tokenizer_check import check_tokenizer
from .source.tokenizer_files import write_tokenizer
from .stages import Stages
from .texts import calibrating_texts
from .tracing.attention import TracedModel
from .tracing.ways import PATHS, TracePath, refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(job: Job, scheme: str) -> tuple[Loaded, PreTrainedModel]:
    """The model, its tokenizer, and the texts in tokens. scheme: of the export. Raises: SourceError, RecipeError."""
    config = job.config
    module = load_module(job.folder)
    source = describe_source(config.model, job.folder, module)
    blocks = noted_weights(module)
    if blocks is not None:
        require_agreement(config.scheme, f"{config.model} was compressed with weights-int4, which")
        scheme = WEIGHTS_SCHEME
    for folder in (job.bundle, job.fp32, job.answers):
        folder.mkdir()
    write_tokenizer(source.tokenizer, module, job.bundle)
    texts = config.read_texts()
    tokenizer = Tokenizer(job.bundle / names.TOKENIZER_NAME)
    check_tokenizer(source.tokenizer, tokenizer, texts.calibrating)
    text_ids = tokenizer.encode(texts.calibrating)
    loaded = Loaded(
        source,
        scheme,
        blocks,
        text_ids,
        calibrating_ids=[text_ids, *(tokenizer.encode(text) for text in calibrating_texts())],
        judging=make_judging(
            texts,
            tokenizer,
            job.bundle,
            source.tokens,
            context_length=source.context_length,
            vocab_size=source.vocab_size,
        ),
        unusual=_unusual_tokens(job, source, module),
    )
    return loaded, module


def _unusual_tokens(job: Job, source: SourceModel, module: PreTrainedModel) -> UnusualTokens:
    """Find tokens that texts seldom contain. Rows behind the tokenizer's last token are padding and are left out."""
    rows = token_embedding(module).weight.detach()[: min(source.vocab_size, len(source.tokenizer))]
    return unusual_tokens(source.tokenizer, source.tokens.bos, rows, job.bundle)


def make_fp32_graph(job: Job, loaded: Loaded, module: PreTrainedModel, stages: Stages) -> Fp32Graph:
    """The graph of the first way to trace whose answers are torch's. A way that fails, or whose graph answers
    differently, is followed by the next one.

    module: its weights are freed when torch has answered. Raises: TraceError, with the reason for each way.
    """
    refusals: list[str] = []
    last: Exception | None = None
    for path in PATHS:
        with stages.stage("trace"):
            if _has_no_weights(module):
                module = load_module(job.folder)
            traced = _trace(path, module, refusals)
        if isinstance(traced, TraceError):
            last = traced
            continue
        shape = _shape(loaded.source, traced)
        kv = _cache_type(job, loaded, shape)
        with stages.stage("fuse"):
            granularity = _fuse(job, loaded, traced)
        del traced  # it keeps torch's weights in memory
        with stages.stage("compare with torch"):
            agreement = _compare_with_torch(job, loaded, module, shape)
        if not isinstance(agreement, Exception):
            return Fp32Graph(job, path[0], tuple(refusals), shape, kv, granularity, agreement)
        refusals.append(f"{path[0]}: {agreement}")
    raise refused(f"{job.config.model} cannot be exported", refusals) from last


def _has_no_weights(module: PreTrainedModel) -> bool:
    return next(module.parameters()).numel() == 0


@collector_off()
def _trace(path: TracePath, module: PreTrainedModel, refusals: list[str]) -> TracedModel | TraceError:
    name, take = path
    try:
        return take(module)
    except TraceError as error:
        refusals.append(f"{name}: {error}")
        return error


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


def _cache_type(job: Job, loaded: Loaded, shape: Model) -> str:
    """The type of the KV cache: the given one, else the scheme's default. Only a fused operator can read an INT8
    cache."""
    wanted = job.config.kv or job.profile.kv[loaded.scheme]
    if shape.cache_layout == "in_place" or wanted == "float32":
        return wanted
    if job.profile.activations == "float16":
        raise TraceError(
            f"{job.config.model}'s attention is not fused, which float16 activations need: export it for a CPU"
        )
    if job.config.kv is not None:
        raise RecipeError("this model's attention is not fused, so its cache cannot be int8: leave --kv out")
    return "float32"


@collector_off()
def _fuse(job: Job, loaded: Loaded, traced: TracedModel) -> str:
    """Run the passes that make the fp32 graph, and write it to the scratch folder. Returns: the granularity of an INT8
    cache's scales."""
    ir.passes.PassManager(fusing_passes(loaded.source.context_length))(traced.graph)
    save_graph(traced.graph, job.fp32)
    # If kernels compute all attention, each key and value gets a scale of its own.
    return "token" if calls_all_attention(traced.graph) else "channel"


def _compare_with_torch(
    job: Job, loaded: Loaded, module: PreTrainedModel, shape: Model
) -> verify.SourceAgreement | VerificationError | SessionError:
    """Compare the graph's answers with torch's. Returns: the agreement, or what is wrong.

    torch's weights are freed before onnxruntime loads them, so that they are not in memory twice.
    """
    answers = verify.ask_source(module, loaded.text_ids, shape, job.answers)
    # Free them explicitly: onnxscript's rewrite rules keep a reference to the last graph.
    for weight in module.parameters():
        weight.data = weight.new_empty(0)
    try:
        with open_session(job.fp32 / names.GRAPH_NAME, shape, providers.CPU) as session:
            return verify.compare_with_source(answers, session, job.profile.gate)
    except (VerificationError, SessionError) as error:
        return error
