"""A torch model as the runtime's `Session`, so that the same code scores a model and its bundles.

It has no cache: a step runs all tokens again, which is right for every kind of model, including those whose caches
cannot be cut. Scoring feeds a window in pieces, so it costs two to three times one pass over the window.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle.folder import TOKENIZER_NAME
from ...runtime.sessions.protocol import Capabilities
from ...runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class TorchSession:
    """A module in evaluation mode as a `runtime.session.Session`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._ids: list[int] = []
        self.capabilities = Capabilities()

    @property
    def length(self) -> int:
        return len(self._ids)

    def step(self, token_ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        import torch

        self._ids += token_ids
        with torch.no_grad():
            ids = torch.tensor([self._ids], device=next(self._module.parameters()).device)
            logits = self._module(input_ids=ids, use_cache=False).logits
        # Index from the front: `[-0:]` would be the whole text.
        return np.asarray(logits[0, len(self._ids) - keep :].cpu().numpy(), np.float32)

    def expect(self, positions: int) -> None:
        """Do nothing: there is no cache."""

    def can_rewind(self, length: int) -> bool:
        return 0 <= length <= self.length

    def rewind(self, length: int) -> None:
        del self._ids[length:]

    def close(self) -> None:
        self._ids = []


@contextlib.contextmanager
def open_model(model: str, threads: int | None = None) -> Iterator[tuple[int, Tokenizer, TorchSession]]:
    """Open a builtin, local or hub model. Yields: context length, the tokenizer as a bundle has it, a session.

    Raises: MissingExtraError, SourceError.
    """
    from ..libraries import quiet_libraries, require_extra

    require_extra("edgelm eval of a model")
    import torch

    from ..source.finding import find_source
    from ..source.loading import describe_source, load_module
    from ..source.tokenizer_files import write_tokenizer

    quiet_libraries()
    folder = find_source(model, None)
    module = load_module(folder)
    source = describe_source(model, folder, module)
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="edgelm-") as scratch:
        write_tokenizer(source.tokenizer, module, Path(scratch))
        tokenizer = Tokenizer(Path(scratch) / TOKENIZER_NAME)
    yield source.context_length, tokenizer, TorchSession(module)
