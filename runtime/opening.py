"""`load`: a folder to an engine."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from .bundle import folder as bundle_files
from .bundle.cuts import accepts_roundings, what_is_off
from .caches.prefixes.cache import PrefixCacheSettings, open_prefix_cache, prefix_settings
from .caches.responses.cache import ResponseCacheSettings, open_response_cache
from .engine import Engine
from .host.memory import give_back
from .sessions.kernels import wanted
from .sessions.loading import find_folder
from .text.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)
# A program that embeds edgelm finds its users' conversations on the disk only if it asks.
IN_MEMORY = ResponseCacheSettings(disk=False)
PREFIXES_IN_MEMORY = PrefixCacheSettings(disk=False)


def load(
    path: str | Path,
    *,
    graph: str | None = None,
    threads: int | None = None,
    response_cache: bool | ResponseCacheSettings = IN_MEMORY,
    prefix_cache: bool | PrefixCacheSettings = PREFIXES_IN_MEMORY,
    prepare: bool | None = None,
    provider: str | None = None,
    exact: bool = True,
    kernels: bool = True,
) -> Engine:
    """Open a bundle, or a folder of optimum's or transformers.js's, and make it ready to generate.

    graph: which ONNX file, relative to the folder, where a folder of another exporter holds several.
    threads: cores to compute with (None: physical cores that this process may use). provider: "cpu" or "cuda" (None:
    what the bundle was made for; one for a GPU runs on the CPU only when it is told to).
    exact: False allows batches, kept prefixes and draft tokens also where they change roundings (`bundle.cuts`), as
    with the schemes of float32 matrices.
    kernels: False leaves the compiled kernels out, as EDGELM_KERNELS=off does for all models of a process.

    Nothing is written to the disk unless one of these asks for it:
    response_cache: keep finished answers and give them again for the same request: in memory (16 MiB) by default, False
    not at all, True also in a database below EDGELM_HOME (256 MiB, readable by this user alone, shared by the
    processes), or as settings say. prefix_cache: keep what was computed for prompts, for later ones that start alike:
    in memory (64 MiB) by default, False not at all, True also in files below EDGELM_HOME (512 MiB, as above), or as
    settings say. `edgelm cache budget` changes what True means for both.
    prepare: True keeps the weights as onnxruntime wants them on this machine below EDGELM_HOME (twice the bundle's
    size, in all at most 8 GiB), which later loads map, unless they say False: faster, in less memory of their own,
    shared by the processes.
    Every file that is read is checked, the weights while onnxruntime loads them: a bundle's against the manifest's
    digests, a prepared form against its own checksums.
    Raises: BundleError and below for the folder, SettingsError for threads and settings, SessionError from onnxruntime,
    MemoryShortageError, MissingExtraError for a Redis server without redis-py. A cache that cannot be used
    gives a warning, not an error.
    """
    responses, settings = open_response_cache(response_cache), prefix_settings(prefix_cache)
    with wanted(kernels):
        bundle, load_model = find_folder(path, threads, graph, prepare, provider)
        bundle = dataclasses.replace(bundle, exact=exact)
        off = what_is_off(bundle.manifest) if bundle.has_manifest and not accepts_roundings(bundle) else None
        if off is not None:
            _logger.warning("%s: %s", bundle.path, off)
        # First, so that the graph takes the room between what parsing the tokenizer leaves: 5 MB less.
        tokenizer = Tokenizer(bundle.path / bundle_files.TOKENIZER_NAME)
        give_back()
        session = load_model()
        give_back()
        return Engine(bundle, session, tokenizer, responses, open_prefix_cache(settings, bundle, session))
