"""A server's settings: who may call it, from where, how much at once. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SettingsError

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServerSettings:
    """The limits of a server. Immutable.

    api_keys: any of them opens the server; () asks for none. hosts: names that a request's `Host` may have, without
    port; None allows any. The default keeps web pages from reaching the server under a name of their own (DNS
    rebinding). origins: web pages of other origins that may call the server, as "https://name:port".
    max_body_bytes: the largest request. max_waiting: requests to one model that may be under way or wait; one more is
    refused with status 429. max_choices: the largest `n`. max_tokens: for requests without a limit (None: the rest of
    the context). ping_s: seconds of silence after which a stream gets a comment (0: never). body_timeout_s: seconds for
    a request's body to arrive. send_timeout_s: seconds after which a client that reads nothing is cut off.
    memory_bytes: for all loaded models; the least recently used is unloaded first (None: half of what is free). page:
    serve the page to chat with. log_prompts: write prompts to the log.
    Raises: SettingsError.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = LOOPBACK_HOSTS
    origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_waiting: int = 64
    max_choices: int = 8
    max_tokens: int | None = None
    ping_s: float = 10.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    memory_bytes: int | None = None
    page: bool = True
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_waiting", "max_choices", "max_tokens", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be 1 or more, found {value}")
        if self.ping_s < 0 or self.body_timeout_s <= 0 or self.send_timeout_s <= 0:
            raise SettingsError("ping_s must be 0 or more, body_timeout_s and send_timeout_s above 0")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise SettingsError("an API key must be printable ASCII characters without blanks, at least one")
