"""The prefix cache that a `Decoder` asks: keys and values of the beginnings of texts, in memory and in files.

A block's key covers all tokens up to its end and everything that decides its bits (`prefixes.keys`). A block is
restored bit for bit, so logits are those of a cold run. If files fail, the engine computes instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...bundle.cuts import may_cut
from ...bundle.folder import GRAPH_NAME, Bundle
from ...errors import CacheError, SettingsError, shown
from ...host.home import home, own_folder
from ...sessions import numerics
from ...sessions.protocol import Blocks, Session
from ..budgets import default_budgets
from .files import FOLDER_NAME, BlockFiles, time_of_use
from .keys import BLOCK_TOKENS, block_keys, root_key
from .memory import Block, BlockMemory, new_block
from .settings import PrefixCacheSettings
from .watch import Watch
from .writer import BlockWriter

__all__ = ["PrefixCache", "PrefixCacheSettings", "default_folder", "open_prefix_cache"]

# Blocks that may wait for the disk. They are in memory anyway, unless memory has a smaller budget.
_WAITING_BYTES = 64 * 2**20

log = logging.getLogger(__name__)


class PrefixCache:
    """Beginnings of texts for the rows of one session. Not safe between threads: only the decoder's owner calls it.

    Between processes: files are shared. Raises: MemoryShortageError, if the KV cache cannot grow; nothing for files.
    """

    def __init__(
        self,
        session: Blocks,
        root: bytes,
        memory: BlockMemory,
        files: BlockFiles | None,
        model_files: Iterable[Path] = (),
    ) -> None:
        """root: `prefixes.keys.root_key`. memory, files: from now on used by this cache alone. model_files: the files
        that the session was loaded from; if one of them is overwritten, nothing more is kept."""
        self._session, self._root = session, root
        self._memory, self._files = memory, files
        self._writer = None if files is None else BlockWriter(files, _WAITING_BYTES)
        self._watch = Watch(model_files)
        self._spoilt = False
        self._block_bytes = session.block_bytes(BLOCK_TOKENS)

    def restore(self, row: int, token_ids: Sequence[int]) -> None:
        """Extend a row by the cached blocks that follow what it holds.

        The row holds the first of token_ids. The last token is never restored, since it must run to give logits. Cost:
        about 0.1 ms a block from memory, 0.4 ms from files.
        """
        keys = block_keys(self._root, token_ids[:-1])
        first = self._session.length(row) // BLOCK_TOKENS
        self._memory.use(keys)
        chain = frozenset(keys)
        for index in range(first, len(keys)):
            block = self._find(keys[index], chain)
            if block is None:
                break
            if index == first:
                self._session.rewind(row, first * BLOCK_TOKENS)
            self._session.append(row, block, BLOCK_TOKENS)
        self._memory.use(keys)

    def keep(self, row: int, token_ids: Sequence[int]) -> None:
        """Store the row's whole blocks that are not stored yet. token_ids: all tokens that the row holds.

        Cost: a copy of the blocks that are new; files are written in the background.
        """
        if self._is_spoilt():
            return
        keys = block_keys(self._root, token_ids)
        self._memory.use(keys)
        chain, room, now = frozenset(keys), True, time.time()
        wanted = frozenset() if self._writer is None else frozenset(key for key in keys if self._writer.wants(key))
        for index, key in enumerate(keys):
            block = self._memory.get(key)
            if block is None and (room or key in wanted):
                try:
                    block = new_block(self._block_bytes)
                except (OSError, MemoryError) as error:  # the answer is there already
                    log.warning("the prefix cache: a block finds no room in memory (%s)", error)
                    break
                self._session.read(row, index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS, block)
                room = room and self._memory.put(key, block, chain)
            if wanted and self._writer is not None:
                self._writer.add(key, time_of_use(now, index), block if key in wanted else None)
        self._memory.use(keys)
        if self._writer is not None:
            self._writer.start()

    def close(self) -> None:
        """Drop the blocks in memory, and wait until the files are written."""
        self._memory.clear()
        if self._writer is not None:
            self._writer.flush()

    def _is_spoilt(self) -> bool:
        written = None if self._spoilt else self._watch.written()
        if written is not None:
            self._spoilt = True
            log.warning("%s was changed while its model is loaded: nothing is kept any more, load it again", written)
        return self._spoilt

    def _find(self, key: bytes, chain: frozenset[bytes]) -> Block | None:
        block = self._memory.get(key)
        if block is None and self._files is not None:
            block = self._files.read(key, self._block_bytes)
            if block is not None:
                self._memory.put(key, block, chain)
        return block


def default_folder() -> Path:
    """The default folder of the files: EDGELM_HOME/prefixes. Raises: CacheError."""
    return own_folder(home() / FOLDER_NAME)


def prefix_settings(wanted: bool | PrefixCacheSettings) -> PrefixCacheSettings | None:
    """The settings that `load` was given; None for False. Raises: SettingsError."""
    if isinstance(wanted, PrefixCacheSettings):
        return wanted
    if not isinstance(wanted, bool):
        raise SettingsError(f"prefix_cache must be True, False or PrefixCacheSettings, found {shown(wanted)}")
    return default_budgets().prefixes if wanted else None


def open_prefix_cache(settings: PrefixCacheSettings | None, bundle: Bundle, session: Session) -> PrefixCache | None:
    """The cache for a session; None if it is not wanted, or would change answers. No file is opened."""
    blocks = session.capabilities.blocks
    if settings is None or blocks is None or not may_cut(bundle):
        return None
    root = root_key(bundle.manifest, numerics.of_machine())
    model_files = [bundle.path / name for name in bundle.manifest.files if name.startswith(GRAPH_NAME)]
    return PrefixCache(blocks, root, BlockMemory(settings.memory_bytes), _files(settings), model_files)


def _files(settings: PrefixCacheSettings) -> BlockFiles | None:
    if not settings.disk:
        return None
    try:
        folder = default_folder() if settings.folder is None else Path(settings.folder).absolute()
    except CacheError as error:
        log.warning("%s; beginnings of prompts are kept in memory only", error)
        return None
    return BlockFiles(folder, settings.disk_bytes)
