"""An endpoint that listens, for tests that call it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from mpcache_parties.endpoint.app import Endpoint
from mpcache_parties.endpoint.gate import Admission
from mpcache_parties.endpoint.http_server import listen, server


@contextmanager
def listening(endpoint: Endpoint, admission: Admission | None = None) -> Iterator[str]:
    """Yield its address, such as http://127.0.0.1:8000, as long as it listens."""
    sock = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    running = server(endpoint, admission or Admission())
    thread = Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        limit = time.monotonic() + 10
        while not running.started and time.monotonic() < limit:
            time.sleep(0.005)
        yield address
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
