"""Read HOST:PORT, wherever one is written: config, flags, what gRPC calls a peer."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class HostPort:
    """An address. host: a name, or an IP address without brackets."""

    host: str
    port: int

    @staticmethod
    def parse(text: str, host: str | None = None) -> HostPort:
        """Read HOST:PORT; where `host` is given, PORT alone means that host.

        Raises ValueError, which says what it must be.
        """
        name, _, port = text.rpartition(":")
        form = "HOST:PORT" if host is None else "PORT or HOST:PORT"
        if _is_ipv6(text) or _is_ipv6(name):
            raise ValueError("must be [IPV6]:PORT: an IPv6 address stands in brackets")
        bare = name[1:-1] if _is_ipv6(name[1:-1]) and name[0] + name[-1] == "[]" else name or host or ""
        number = int(port) if re.fullmatch(r"\d{1,5}", port, re.ASCII) else 0
        if not bare or (bare == name and re.search(r"[\s:/\[\]@]", bare)) or not 1 <= number <= 65535:
            raise ValueError(f"must be {form} with a port from 1 to 65535")
        return HostPort(bare, number)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether no other host can mean it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
