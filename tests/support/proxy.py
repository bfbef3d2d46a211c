"""A TCP proxy that a test can cut: what the network between two parties does on a bad day."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Proxy:
    """Forwards connections to `target` until it is cut; then new ones get no answer, as on a network that
    is cut: a refusal would be a host that answers."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.bytes = 0  # that were forwarded, both ways
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break what there is and answer nobody, until `mend`."""
        self._drop(cut=True)

    def mend(self) -> None:
        """Forward again what comes from now on."""
        self._drop(cut=False)

    def close(self) -> None:
        """Break what there is, and refuse what comes."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts: the port is free only then
        self._listener.close()
        self._drop(cut=True)

    def _drop(self, cut: bool) -> None:
        with self._lock:
            self._cut = cut
            ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                outer, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._cut:
                    self._ends.append(outer)
                    continue
            try:
                inner = socket.create_connection(self._target)
            except OSError:
                outer.close()
                continue
            with self._lock:
                self._ends += [outer, inner]
                if self._cut:
                    continue
            self.connections += 1
            for end in (outer, inner):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pair in ((outer, inner), (inner, outer)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                self.bytes += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()
