"""Hold the flags of an endpoint: where it listens, and who may call."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mpcache.errors import BadInput
from mpcache.transport.address import HostPort
from mpcache_parties.endpoint.app import IDLE_S, QUEUE, Endpoint
from mpcache_parties.endpoint.chat_like import Models
from mpcache_parties.endpoint.http_server import listen, serve_endpoint
from mpcache_parties.operations.own_address import own_address
from mpcache_parties.say import Say

KEY_VARIABLE = "MPCACHE_API_KEY"
SHORTEST_KEY = 16  # characters


@dataclass(frozen=True)
class EndpointOptions:
    """Flags as they were given.

    address: [HOST:]PORT.  api_key: a file with the key; None: the environment's, if any.  hosts: names under
    which it is called, beside this machine's own.  origins: of other sites' pages that may call.
    """

    address: str = "8000"
    api_key: Path | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    queue: int = QUEUE
    idle_s: float = IDLE_S
    flag: str = "--api"

    def check(self) -> HostPort:
        """Return where it listens. Raises BadInput."""
        place = own_address(self.flag, self.address)
        if self.read_key() is None and not place.is_loopback:
            raise BadInput(
                f"{self.flag} is {self.address!r}, which others can reach: give --api-key FILE, "
                f"or the key in {KEY_VARIABLE}"
            )
        for origin in self.origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise BadInput(
                    f"--allow-origin is {origin!r}; give scheme and host, such as https://here.example"
                )
        return place

    def check_free(self) -> None:
        """Check, and see that nobody listens there yet. Raises BadInput or PortInUse."""
        place = self.check()
        listen(place.host, place.port).close()

    def read_key(self) -> str | None:
        """Read the key, which no flag holds: everybody can see a process's flags. Raises BadInput."""
        if self.api_key is None:
            key, where = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
        else:
            key, where = _private_line(self.api_key), f"--api-key {self.api_key}"
        if key is not None and not re.fullmatch(rf"[!-~]{{{SHORTEST_KEY},}}", key):
            raise BadInput(f"{where}: a key has {SHORTEST_KEY} or more printable characters and no blanks")
        return key

    def serve(self, models: Models, limit: int, say: Say) -> None:
        """Serve until a signal ends this process. limit: conversations. Raises BadInput or PortInUse."""
        place = self.check()
        endpoint = Endpoint(models, limit, self.queue, self.idle_s, say)
        serve_endpoint(endpoint, place.host, place.port, self.read_key(), self.hosts, self.origins)


def _private_line(file: Path) -> str:
    """Read a line that nobody else may read. Raises BadInput."""
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_mode & 0o077:
                raise BadInput(f"--api-key {file}: others may read this key; run `chmod 600 {file}`")
            return opened.read(4096).decode("ascii").strip()
    except OSError as error:
        raise BadInput(f"--api-key {file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"--api-key {file}: a key is printable ASCII") from None
