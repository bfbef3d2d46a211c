"""Decide who may call: this machine's own programs and its page, and whoever has the key.

A service on loopback is within reach of every page in a browser of the machine. So a request must name this
host (a name that an attacker's DNS leads here is refused), and one that a browser sends for another site's
page is refused before anything is read of it.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpcache_parties.endpoint.refusals import Refusal

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATHS = ("/", "/health")  # nothing of anybody's is there
ALWAYS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"x-frame-options": b"DENY",
    b"cache-control": b"no-store",
}


@dataclass(frozen=True)
class Admission:
    """Who may call. hosts: names of this machine, without a port; empty: any.

    key: what a caller must know; None: nothing.  origins: of other sites' pages that may call.
    """

    hosts: tuple[str, ...] = LOOPBACK
    key: str | None = None
    origins: tuple[str, ...] = ()

    def check(self, path: str, headers: Headers) -> None:
        """Raise Refusal where the caller may not."""
        host = headers.get("host", "").lower()
        if self.hosts and _without_port(host) not in self.hosts:
            raise Refusal(
                403, f"the host {host!r:.80} is not a name of this endpoint; allow it where it is started",
                code="unknown_host",
            )  # fmt: skip
        origin = headers.get("origin")
        foreign = origin is not None and origin not in _own(host) and origin not in self.origins
        site = headers.get("sec-fetch-site", "none")
        if path != "/" and origin is None and site not in ("same-origin", "none"):
            foreign = True
        if foreign:
            raise Refusal(403, "pages of another site may not call this endpoint", code="foreign_origin")
        if self.key is not None and path not in OPEN_PATHS:
            self._check_key(headers.getlist("authorization"))

    def _check_key(self, given: Sequence[str]) -> None:
        kind, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        known = hmac.compare_digest(key.strip().encode("latin-1"), (self.key or "").encode())
        if kind.lower() != "bearer" or not known:
            raise Refusal(
                401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _own(host: str) -> tuple[str, str]:
    """Return the origins of this endpoint's own page, whoever ends TLS before it."""
    return (f"http://{host}", f"https://{host}")


class Gate:
    """Checks each request before the app sees it, and sets the headers that every answer has."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app, self._admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                more = [(name, value) for name, value in ALWAYS.items() if name not in there]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            # A browser asks before it calls for another site: who may is answered within.
            if not (scope["method"] == "OPTIONS" and self._admission.origins):
                self._admission.check(scope["path"], Headers(scope=scope))
        except Refusal as no:
            refused = JSONResponse(no.to_dict(), no.status, no.headers)
            await refused(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)
