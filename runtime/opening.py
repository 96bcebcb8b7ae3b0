"""`load`: open a folder as an engine."""

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
# A program that embeds edgelm must ask for it before conversations are written to the disk.
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
    the one that the bundle was made for; a bundle for a GPU runs on the CPU only if asked to).
    exact: False allows batches, the prefix cache and draft tokens also where they change roundings (`bundle.cuts`), as
    with fp32 and int8-weight.
    kernels: False does not use the compiled kernels, as EDGELM_KERNELS=off does for all models of a process.

    Nothing is written to the disk unless one of these asks for it:
    response_cache: return finished answers again for the same request. By default in memory (16 MiB); False: off; True:
    also in a database below EDGELM_HOME (256 MiB, readable by this user alone, shared by processes); or settings.
    prefix_cache: reuse what was computed for prompts that begin alike. By default in memory (64 MiB); False: off; True:
    also in files below EDGELM_HOME (512 MiB, as above); or settings. `edgelm cache budget` changes what True means.
    prepare: True stores the weights in the order of this machine's kernels below EDGELM_HOME (twice the bundle's size,
    in all at most 8 GiB). Later loads map them unless `prepare` is False: they are faster, and processes share the
    memory.
    Every file is checked, the weights while onnxruntime loads them: a bundle's files by the manifest's digests,
    prepared weights by their own checksums.
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
        # The tokenizer first: the graph then fills the gaps that parsing it leaves in the heap, which saves 5 MB.
        tokenizer = Tokenizer(bundle.path / bundle_files.TOKENIZER_NAME)
        give_back()
        session = load_model()
        give_back()
        return Engine(bundle, session, tokenizer, responses, open_prefix_cache(settings, bundle, session))
