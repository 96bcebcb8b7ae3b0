"""`GET /v1/models`, `/health`, `/metrics`: the models and the state of the server."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ...bundle.folder import Bundle
from ...errors import BundleError
from ..context import context_of
from ..http.errors import JsonResponse, unavailable
from ..models import Model, template_source


async def list_models(request: Request) -> Response:
    """All models. Those that are not loaded are described by their manifests."""
    models = context_of(request).models
    entries = [await asyncio.to_thread(_entry, model) for model in models]
    return JsonResponse({"object": "list", "data": entries})


async def one_model(request: Request) -> Response:
    """A model by name. Raises: ApiError (404)."""
    model = context_of(request).models.find(request.path_params["name"])
    return JsonResponse(await asyncio.to_thread(_entry, model))


async def health(request: Request) -> Response:
    """200 once the first model is loaded. Raises: ApiError (503) before."""
    models = context_of(request).models
    if not models.ready:
        models.start()
        raise unavailable("the model is being loaded: try again in a second", "model_loading")
    return JsonResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format."""
    context = context_of(request)
    return PlainTextResponse(context.metrics.text(context.models), media_type="text/plain; version=0.0.4")


def _entry(model: Model) -> dict[str, Any]:
    bundle = _bundle(model)
    entry = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "edgelm",
        "loaded": model.engine is not None,
    }
    if bundle is None:  # of another exporter and not loaded, or gone from the disk
        return entry
    manifest, template = bundle.manifest, model.template if model.engine is not None else template_source(bundle)
    shape = manifest.model
    size = sum(file.bytes for file in manifest.files.values())
    meta = {
        "n_ctx_train": shape.context_length,
        "n_params": shape.parameters,
        "n_vocab": shape.vocab_size,
        "size": size,
    }
    return {
        **entry,
        "max_model_len": shape.context_length,
        "context_length": shape.context_length,
        "digest": manifest.digest,
        "chat": bool(template),
        "meta": meta,
    }


def _bundle(model: Model) -> Bundle | None:
    if model.engine is not None:
        return model.engine.bundle
    assert model.path is not None, "an engine that was given is loaded"
    try:
        return Bundle.open(model.path)
    except BundleError:
        return None
