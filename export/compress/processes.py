"""The processes that `accelerate launch` started for one compression: all of them train, the first measures and writes.

Each holds the whole model and does every step; they meet only inside a training, and at the end.
"""

from __future__ import annotations

import os
import sys

from ..errors import RecipeError

# As torch's own launcher and those of MPI name it.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_first() -> bool:
    """Whether this process is the one that measures and writes: always, where there is only one."""
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    return rank == "0"


def count_processes() -> int:
    """How many processes a launcher started for this work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_one() -> None:
    """Raises: RecipeError in one of several processes."""
    if count_processes() > 1:
        raise RecipeError("edgelm export does not run in several processes: compress with them, then export in one")


def wait_for_all() -> None:
    """Return when every process has come here. At once where no step trained."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
