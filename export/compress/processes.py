"""Processes that `accelerate launch` starts for one compression: all train, the first one measures and writes.

Each process holds the whole model and applies every step. They synchronize only inside a training and at the end.
"""

from __future__ import annotations

import os
import sys

from ..errors import RecipeError

# Set by torch's launcher and by MPI launchers.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_first() -> bool:
    """Whether this process measures and writes. True for a single process, whose variables may be another run's."""
    if count_processes() == 1 and "RANK" in os.environ:
        return True
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    return rank == "0"


def count_processes() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_one() -> None:
    """Raise RecipeError if there are several processes."""
    if count_processes() > 1:
        raise RecipeError(
            "edgelm export does not run in several processes: run edgelm compress in them, then edgelm export in one"
        )


def wait_for_all() -> None:
    """Block until every process calls this. Returns at once if no step trained."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
