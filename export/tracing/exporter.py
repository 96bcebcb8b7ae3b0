"""What both ways to trace do around torch's exporter: keep it quiet, and name the weights of its graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir

log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep what torch says beside its result from the user's screen: warnings, and its whole graph where a trace fails.
    It is logged at DEBUG."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "torch.fx"))}
    said = io.StringIO()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        if said.getvalue().strip():
            log.debug("torch's exporter: %s", said.getvalue().strip())


def name_weights(graph: ir.Model) -> None:
    """Give weights their names in the source model, which reports and exclusions show."""
    for value in list(graph.graph.initializers.values()):
        if value.name is not None and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
