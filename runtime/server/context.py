"""What the endpoints of one application share."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from starlette.requests import Request

from .metrics import Metrics
from .models import Models
from .settings import ServerSettings

_log = logging.getLogger("edgelm.server")


@dataclass(frozen=True)
class ServerContext:
    """Settings, models and figures of one application."""

    settings: ServerSettings
    models: Models
    metrics: Metrics

    def log_prompt(self, model: str, text: str) -> None:
        """Write a prompt to the log, where the settings ask for it."""
        if self.settings.log_prompts:
            _log.info("prompt for %s: %r", model, text)


def context_of(request: Request) -> ServerContext:
    """The context of the application that a request came to."""
    context: ServerContext = request.app.state.edgelm
    return context
