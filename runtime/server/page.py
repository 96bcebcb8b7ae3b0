"""The chat page: one file that loads nothing from elsewhere, which its content security policy enforces."""

from __future__ import annotations

import base64
import functools
import hashlib
import re

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_FILE = "page.html"


async def page(_: Request) -> Response:
    """`GET /`."""
    text, policy = _page()
    return HTMLResponse(text, headers={"content-security-policy": policy, "cache-control": "no-cache"})


@functools.cache
def _page() -> tuple[str, str]:
    """The page and its policy: only its own script and styles, by digest, and requests to this server."""
    import importlib.resources  # late, as it costs a start 20 ms

    text = importlib.resources.files(__package__).joinpath(_FILE).read_text(encoding="utf-8")
    sources = {
        kind: " ".join(_digest(found) for found in re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL))
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
