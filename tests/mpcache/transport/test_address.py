"""HOST:PORT is read in one place, for the config and for flags."""

from __future__ import annotations

import pytest

from mpcache.config import Addresses
from mpcache.transport.address import HostPort


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("server.example:7100", "server.example", 7100, False),
        ("10.0.0.1:1", "10.0.0.1", 1, False),
        ("[fd00::2]:65535", "fd00::2", 65535, False),
        ("[::1]:49100", "::1", 49100, True),
        ("127.3.2.1:80", "127.3.2.1", 80, True),
        ("localhost:80", "localhost", 80, True),
        ("localhost.example:80", "localhost.example", 80, False),
    ],
)
def test_an_address_in_parts(text: str, host: str, port: int, loopback: bool) -> None:
    found = HostPort.parse(text)
    assert (found.host, found.port, found.is_loopback, str(found)) == (host, port, loopback, text)
    assert Addresses(server=text).server == text


@pytest.mark.parametrize("text", ["fd77:1::2:7100", "::1:80", "::1", "fd00::2", "1:2:3:4:5:6:7:8:7100"])
def test_an_ipv6_address_without_brackets_is_refused_when_it_is_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be \[IPV6\]:PORT"):
        HostPort.parse(text)
    with pytest.raises(ValueError, match=r"must be \[IPV6\]:PORT"):
        Addresses(server=text)


@pytest.mark.parametrize(
    "text", ["", ":", "a", "a:", ":80", "a:0", "a:65536", "a:8e1", "a:\u0663", "a b:1", "http://a:1", "[a]:1",
             "[::1:1", "::1]:1", "[]:1", "a:1:2", "[[::1]]:1", "a:000080"]
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="must be HOST:PORT with a port from 1 to 65535"):
        HostPort.parse(text)


def test_a_port_alone_means_the_given_host() -> None:
    assert (
        HostPort.parse("9100", "127.0.0.1")
        == HostPort.parse(":9100", "127.0.0.1")
        == HostPort("127.0.0.1", 9100)
    )
    with pytest.raises(ValueError, match="must be PORT or HOST:PORT"):
        HostPort.parse("host", "127.0.0.1")
