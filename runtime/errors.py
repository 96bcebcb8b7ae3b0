"""The exception tree of edgelm. Everything raised on purpose derives from `EdgelmError`.

    EdgelmError
    |- BundleError            a bundle cannot be used
    |  |- BundleMissingError      the folder or one of its files is not there
    |  |- BundleCorruptError      a file is truncated, changed or not what the manifest says
    |  |- BundleVersionError      written by a newer edgelm
    |  `- BundleUnsupportedError  written by another exporter in a form that edgelm does not run
    |- InputError             the caller asked for something impossible
    |  |- PromptError             empty, not text, ids out of range
    |  |- ContextLengthError      longer than the model's context
    |  `- SettingsError           a setting that is unknown or out of range
    |- TemplateError          the chat template is missing or fails
    |- EngineError            the engine cannot serve this call
    |  |- EngineBusyError         used again from within one of its own steps
    |  `- EngineClosedError       used after close()
    |- SessionError           onnxruntime refused or failed
    |- MemoryShortageError    the machine has too little memory left
    |- CacheError             a cache on the disk or on a server cannot be used now
    |  |- CacheCorruptError      it is damaged, or breaks its own rules
    |  `- CacheVersionError      written by a newer edgelm
    |- VerificationError      measured answers are outside the tolerance
    `- MissingExtraError      an optional dependency is not installed

Each message says what happened, with what, and what to do about it. `edgelm.export` adds its own branch below
`EdgelmError`. Foreign exceptions are mapped where they arise (`edgelm.runtime.host.ort` for onnxruntime).
"""

from __future__ import annotations

_SHOWN = 60


def shown(value: object) -> str:
    """A value as messages show it: the beginning of its repr, or its type if Python cannot write one (an integer with
    thousands of digits, endlessly nested lists)."""
    try:
        return f"{value!r:.{_SHOWN}}"
    except (ValueError, RecursionError):
        return f"a very large {type(value).__name__}"


class EdgelmError(Exception):
    """Base of all errors that edgelm raises on purpose."""


class BundleError(EdgelmError):
    """A bundle cannot be used."""


class BundleMissingError(BundleError):
    """The bundle's folder, or a file that its manifest names, is not there or cannot be read."""


class BundleCorruptError(BundleError):
    """A file of the bundle is truncated, changed, or not what the manifest says."""


class BundleVersionError(BundleError):
    """The bundle's schema version is not one that this edgelm reads."""


class BundleUnsupportedError(BundleError):
    """Another exporter wrote the folder, in a form that edgelm does not run."""


class InputError(EdgelmError):
    """The caller asked for something that cannot be done."""


class PromptError(InputError):
    """The prompt is empty, is not text, or holds token ids that the model does not have."""


class ContextLengthError(InputError):
    """The prompt does not fit into the model's context."""


class SettingsError(InputError):
    """A setting (of generation, a cache, the threads, a command's option) is unknown, out of its range, or does not go
    with another one."""


class TemplateError(EdgelmError):
    """The bundle has no chat template, or the template failed on these messages."""


class EngineError(EdgelmError):
    """The engine cannot serve this call."""


class EngineBusyError(EngineError):
    """A thread called the engine from within one of its own steps: the call would wait for itself."""


class EngineClosedError(EngineError):
    """The engine was used after `close()`."""


class SessionError(EdgelmError):
    """onnxruntime could not load or run the graph."""


class MemoryShortageError(EdgelmError):
    """The machine, or the process's control group, has too little memory left for what was asked."""


class CacheError(EdgelmError):
    """A cache on the disk or on a server cannot be used now. `generate` and `stream` never raise it: they compute
    instead."""


class CacheCorruptError(CacheError):
    """A cache is damaged: it, or one of its entries, is not what was written."""


class CacheVersionError(CacheError):
    """A cache was written by a newer edgelm, and is left alone."""


class VerificationError(EdgelmError):
    """Measured answers differ from the expected ones by more than the tolerance."""


class MissingExtraError(EdgelmError):
    """A feature needs an optional dependency that is not installed; the message holds the pip command."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs packages that are not installed: run  pip install "edgelm[{extra}]"')
