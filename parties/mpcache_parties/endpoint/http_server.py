"""Listen for the endpoint's callers, until a signal ends this process."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpcache.console.signals import STOPS
from mpcache.errors import PortInUse
from mpcache.transport.address import HostPort
from mpcache_parties.endpoint.app import Endpoint
from mpcache_parties.endpoint.gate import LOOPBACK, Admission
from mpcache_parties.say import Say

HEAD_S = 10.0  # for a request's head to come
HEAD_BYTES = 16 << 10
CONNECTIONS = 128  # at once
END_S = 2.0  # for callers to take what they were sent, once the conversations have ended


class _Connection(H11Protocol):
    """A connection that is closed when a request's head takes too long; uvicorn knows no such limit."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.conn.their_state is h11.IDLE:
            if self._late is None:
                self._late = self.loop.call_later(HEAD_S, self.transport.close)
        elif self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """uvicorn's, which ends the endpoint's conversations before it waits for its callers."""

    def __init__(self, config: uvicorn.Config, endpoint: Endpoint) -> None:
        super().__init__(config)
        self._endpoint = endpoint

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # nobody new
        await self._endpoint.end()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals that end our processes, and leave those alone that this process ignores."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = [each for each in STOPS if signal.getsignal(each) is not signal.SIG_IGN]
        before = {each: signal.signal(each, self.handle_exit) for each in taken}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        for number in self._captured_signals[:1]:  # what was there before says that it came
            signal.raise_signal(number)


def listen(host: str, port: int) -> socket.socket:
    """Bind the endpoint's address. port: 0 is any. Raises PortInUse."""
    place = HostPort(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0])
    except OSError as error:
        raise PortInUse(f"endpoint {place}: cannot listen there: {error.strerror or error}") from None


def server(endpoint: Endpoint, admission: Admission) -> uvicorn.Server:
    """Return a server of the endpoint that has not begun."""
    config = uvicorn.Config(
        endpoint.app(admission),
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=int(END_S),
    )
    return _Server(config, endpoint)


def serve_endpoint(
    endpoint: Endpoint,
    host: str,
    port: int,
    api_key: str | None,
    hosts: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    say: Say | None = None,
) -> None:
    """Serve until a signal ends this process; the signal is raised again at the end.

    api_key: what callers must know; needed where others than this machine can call.  hosts: more names
    under which it is called.  origins: of other sites' pages that may call.  say: told the address.

    Raises PortInUse.
    """
    sock = listen(host, port)
    at = HostPort(host, sock.getsockname()[1])
    named = (*LOOPBACK, *hosts) if at.is_loopback or hosts else ()
    admission = Admission(tuple(name.lower() for name in named), api_key, origins)
    (say or endpoint.say)(f"endpoint: http://{at}/ is its page, http://{at}/v1 speaks OpenAI's API")
    with suppress(KeyboardInterrupt):
        server(endpoint, admission).run(sockets=[sock])
