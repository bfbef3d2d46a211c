"""What a host tells of a peer's process, and what it does not."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from mpcache_parties.network import liveness as alive
from mpcache_parties.network.liveness import Beacon, Refusals, beacon_at, listens

HOST = "127.0.0.1"


@pytest.fixture
def beacon() -> Iterator[Beacon]:
    made = Beacon(f"{HOST}:7100")
    yield made
    made.close()


def gone_after(refusals: Refusals, seconds: float) -> float | None:
    """When it is known, in s; None if it is not within so many."""
    begin = time.monotonic()
    while (now := time.monotonic() - begin) < seconds:
        if refusals.gone():
            return now
        time.sleep(0.01)
    return None


def test_a_beacon_shines_as_long_as_its_process_and_no_further_than_the_peer(beacon: Beacon) -> None:
    address = f"{HOST}:{beacon.port}"
    assert all(listens(address) for _ in range(20))
    assert beacon._socket.getsockname()[0] == HOST  # not on every interface
    assert gone_after(Refusals(address), 0.7) is None
    beacon.close()
    assert listens(address) is False


def test_gone_is_who_is_refused_all_the_time(beacon: Beacon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "GONE_S", 0.6)
    monkeypatch.setattr(alive, "ASK_EVERY_S", 0.1)
    address = f"{HOST}:{beacon.port}"
    beacon.close()
    refusals = Refusals(address)
    assert gone_after(refusals, 0.4) is None
    with socket.create_server((HOST, beacon.port)):  # back again: whatever it was, it was not the end
        assert gone_after(refusals, 0.3) is None
    found = gone_after(refusals, 3)
    assert found is not None and found >= 0.5


def test_silence_is_no_refusal() -> None:
    with socket.create_server((HOST, 0), backlog=0) as full:
        address = f"{HOST}:{full.getsockname()[1]}"
        answers = [listens(address) for _ in range(4)]  # nobody accepts: the last ones get no answer
        assert answers[0] is True and answers[-1] is None and False not in answers
    assert listens("no-such-host.invalid:7100") is None
    assert not Refusals(None).gone()


@pytest.mark.parametrize(
    ("caller", "port", "address"),
    [
        ("ipv4:127.0.0.1:4242", "7000", "127.0.0.1:7000"),
        ("ipv6:%5B::1%5D:4242", "7000", "[::1]:7000"),
        ("ipv6:[::1]:4242", "7000", "[::1]:7000"),
        ("ipv4:127.0.0.1:4242", "0", None),
        ("ipv4:127.0.0.1:4242", "70000", None),
        ("ipv4:127.0.0.1:4242", "7000:1", None),
        ("ipv4:127.0.0.1:4242", None, None),
        ("unix:/tmp/x", "7000", None),
    ],
)
def test_where_a_beacon_is(caller: str, port: str | None, address: str | None) -> None:
    assert beacon_at(caller, port) == address
