"""What only processes and sockets can do wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from mpcache.config import Addresses, Settings
from mpcache.errors import ConfigError, LinkError, Mismatch, PeerFailed, PeerLost, PeerTimeout, PortInUse
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.handshake import agree
from mpcache_parties.network import grpc_server, session_network
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.session_network import Network
from tests.support.links import free_settings, grpc_networks
from tests.support.one_party import ONE_PARTY, WORD
from tests.support.processes import SOON_S, Process
from tests.support.processes import start as start_process

Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a party as a process; none outlives the test."""
    children: list[Process] = []

    def run(rank: Rank, settings: Settings, task: str, peers: tuple[Rank, ...] = tuple(Rank)) -> Process:
        addresses = settings.addresses
        words = [
            int(rank),
            "".join(str(int(peer)) for peer in peers),
            addresses.server,
            addresses.dealer,
            task,
        ]
        child = start_process(ONE_PARTY, *words)
        children.append(child)
        return child

    yield run
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.communicate()


def connect(rank: Rank, settings: Settings, *peers: Rank) -> Network:
    network = connect_all(rank, settings, Ledger(), peers=peers)
    agree(network.links, rank, settings.public.flat())
    return network


def raised_soon(call: Callable[[], object]) -> LinkError:
    """The error, which comes long before a timeout of 60 s would bring another one."""
    begin = time.monotonic()
    with pytest.raises(LinkError) as caught:
        call()
    assert time.monotonic() - begin < SOON_S
    assert "\n" not in str(caught.value)
    return caught.value


STALLED = [Rank.SERVER, pytest.param(Rank.CLIENT, marks=pytest.mark.slow)]


@pytest.mark.processes
def test_three_processes_in_the_worst_order(start: Start) -> None:
    settings = free_settings()
    client = start(Rank.CLIENT, settings, "round")
    assert client.stderr is not None
    assert client.stderr.readline().startswith("client: waiting for server at 127.0.0.1:")
    server = start(Rank.SERVER, settings, "round")
    assert server.stderr is not None
    assert server.stderr.readline().startswith("server: waiting for ")
    dealer = start(Rank.DEALER, settings, "round")
    for child in (client, server, dealer):
        out, noise = child.communicate(timeout=SOON_S)
        assert (child.returncode, out) == (0, "connected\n")
        assert all("waiting for" in line for line in noise.splitlines())


@pytest.mark.processes
@pytest.mark.parametrize("victim", list(Rank))
def test_a_killed_party_ends_both_others(start: Start, victim: Rank) -> None:
    settings = free_settings()
    child = start(victim, settings, "hang")
    one, two = (rank for rank in Rank if rank is not victim)
    with ThreadPoolExecutor(2) as pool:
        networks = list(pool.map(lambda rank: connect(rank, settings, *(set(Rank) - {rank})), (one, two)))
        assert child.stdout is not None
        assert child.stdout.readline() == "connected\n"
        # One waits for the other, who is busy: neither waits for the one that dies.
        waiting = pool.submit(networks[0][two].recv, "layer0/qkv", WORD)
        time.sleep(0.2)
        os.kill(child.pid, signal.SIGKILL)
        error = raised_soon(lambda: waiting.result(timeout=SOON_S))
        busy_until = time.monotonic() + SOON_S
        while networks[1].failure is None and time.monotonic() < busy_until:
            time.sleep(0.01)
        other = raised_soon(lambda: networks[1][one].send("layer0/qkv", [torch.zeros(1)]))
        for found in (error, other):
            assert isinstance(found, PeerLost)
            assert f"at layer0/qkv: lost {victim.label}" in str(found)
        begin = time.monotonic()
        for network in networks:
            network.close(str(error))
        assert time.monotonic() - begin < SOON_S


@pytest.mark.processes
@pytest.mark.parametrize("stalled", STALLED)
def test_a_stalled_party_is_a_timeout(start: Start, stalled: Rank) -> None:
    settings = free_settings(recv_s=1.5)
    child = start(stalled, settings, "hang", (Rank.SERVER, Rank.CLIENT))
    with connect(stalled.peer, settings, stalled) as network:
        os.kill(child.pid, signal.SIGSTOP)
        error = raised_soon(lambda: network[stalled].recv("layer0/qkv", WORD))
        assert isinstance(error, PeerTimeout)
        begin = time.monotonic()
        network.close(str(error))
        assert time.monotonic() - begin < SOON_S


@pytest.mark.processes
@pytest.mark.parametrize("stalled", STALLED)
def test_a_stalled_party_does_not_answer_pings(
    start: Start, stalled: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_timeout_ms", 500),
        ("grpc.http2.ping_timeout_ms", 500),
    ]
    for module, name in ((session_network, "DIAL_OPTIONS"), (grpc_server, "LISTEN_OPTIONS")):
        options = [option for option in getattr(module, name) if option[0] not in dict(hasty)]
        monkeypatch.setattr(module, name, [*options, *hasty])
    settings = free_settings()
    child = start(stalled, settings, "hang", (Rank.SERVER, Rank.CLIENT))
    with connect(stalled.peer, settings, stalled) as network:
        os.kill(child.pid, signal.SIGSTOP)
        error = raised_soon(lambda: network[stalled].recv("layer0/qkv", WORD))
        assert isinstance(error, PeerLost)
        network.close(str(error))


@pytest.mark.processes
def test_a_party_that_exits_without_closing_says_so(start: Start) -> None:
    settings = free_settings()
    child = start(Rank.SERVER, settings, "vanish", (Rank.SERVER, Rank.CLIENT))
    with connect_all(Rank.CLIENT, settings, Ledger(), peers=[Rank.SERVER]) as network:
        error = raised_soon(lambda: network[Rank.SERVER].recv("s", WORD))
        assert isinstance(error, PeerFailed)
        assert "server exited" in str(error)
        out, noise = child.communicate(timeout=SOON_S)
        assert (child.returncode, out) == (0, "")
        assert all("waiting for" in line for line in noise.splitlines())


@pytest.mark.parametrize("rank", list(Rank))
def test_a_peer_that_never_comes(rank: Rank) -> None:
    said: list[str] = []
    settings = free_settings(connect_s=0.8)
    error = raised_soon(lambda: connect_all(rank, settings, Ledger(), said.append))
    assert isinstance(error, PeerTimeout)
    assert f"{rank.label}: gave up waiting for" in str(error)
    assert "after 0.8 s" in str(error)
    assert len(said) == 1
    assert said[0].startswith(f"{rank.label}: waiting for ")


def test_a_port_in_use() -> None:
    settings = free_settings()
    port = int(settings.addresses.server.rpartition(":")[2])
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        error = raised_soon(lambda: connect_all(Rank.SERVER, settings, Ledger()))
    assert isinstance(error, PortInUse)
    assert settings.addresses.server in str(error)


def test_a_second_party_of_the_same_rank_finds_the_port_in_use() -> None:
    settings = free_settings()
    with grpc_networks(settings, Rank.SERVER, Rank.CLIENT):
        assert isinstance(raised_soon(lambda: connect_all(Rank.SERVER, settings, Ledger())), PortInUse)
        error = raised_soon(lambda: connect_all(Rank.CLIENT, settings, Ledger(), peers=[Rank.SERVER]))
        assert isinstance(error, PeerFailed)
        assert "client is not awaited: server has one already" in str(error)


def test_an_address_of_another_host() -> None:
    settings = Settings(addresses=Addresses(dealer="192.0.2.1:7102"))
    with pytest.raises(ConfigError, match="dealer: cannot listen on 192.0.2.1:7102"):
        connect_all(Rank.DEALER, settings, Ledger())


def test_swapped_addresses() -> None:
    settings = free_settings()
    addresses = Addresses(server=settings.addresses.dealer, dealer=settings.addresses.server)
    swapped = settings.model_copy(update={"addresses": addresses})
    with ThreadPoolExecutor(1) as pool:
        dealer = pool.submit(connect_all, Rank.DEALER, settings, Ledger())
        error = raised_soon(lambda: connect_all(Rank.CLIENT, swapped, Ledger(), peers=[Rank.SERVER]))
        assert isinstance(error, Mismatch)
        assert "rank 2 listens at" in str(error)
        with pytest.raises(PeerFailed, match="client ended the session: .*Mismatch: rank 2"):
            dealer.result(timeout=SOON_S)


def test_an_address_where_something_else_listens() -> None:
    settings = free_settings()
    with ThreadPoolExecutor(1) as pool:
        other = grpc.server(pool)
        other.add_insecure_port(settings.addresses.server)
        other.start()
        error = raised_soon(lambda: connect_all(Rank.CLIENT, settings, Ledger(), peers=[Rank.SERVER]))
        other.stop(0).wait()
    assert isinstance(error, Mismatch)
    assert "not an mpcache party" in str(error)
