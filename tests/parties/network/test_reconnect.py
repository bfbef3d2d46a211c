"""Connections that are cut: for a moment, for seconds, and for good."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mpcache.answer import plain_answer
from mpcache.config import Addresses, PublicConfig, Settings
from mpcache.errors import LinkError, PeerLost
from mpcache.ledger import Ledger
from mpcache.limits import bind_policy
from mpcache.model import load_model
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.session_network import Network
from tests.support.links import free_settings
from tests.support.processes import (
    PARTY,
    SOON_S,
    Process,
    errors_of,
    start,
    started,
    tiny_model,
    write_config,
)
from tests.support.proxy import Proxy, proxy

S, C, D = Rank
QUESTION = "the gate of"
TOKENS = 12


def through(settings: Settings, **addresses: str) -> Settings:
    changed = settings.addresses.model_copy(update=addresses)
    return settings.model_copy(update={"addresses": changed})


@contextlib.contextmanager
def over_a_proxy(reconnect_s: float = 20) -> Iterator[tuple[Network, Network, Proxy]]:
    """Server and client in this process, connected through a proxy."""
    settings = free_settings(reconnect_s=reconnect_s)
    with proxy(settings.addresses.server) as cutter, ThreadPoolExecutor(2) as pool:
        theirs = through(settings, server=cutter.address)
        server, client = pool.map(
            lambda rank, its: connect_all(rank, its, Ledger(), peers={S, C}), (S, C), (settings, theirs)
        )
        try:
            yield server, client, cutter
        finally:
            for network in (server, client):
                network.close("the test is over")


def play(network: Network, peer: Rank, rounds: int) -> list[int]:
    """Exchanges of all sizes, one-way messages and facts; what was received, in order."""
    link, got = network[peer], []
    for number in range(rounds):
        size = (1, 100, 40_000)[number % 3]
        (theirs,) = link.exchange("turn", [torch.full((size,), 2 * number + int(network.rank))])
        assert bool((theirs == theirs[0]).all())
        got.append(int(theirs[0]))
        if number % 10 == 0:
            link.send_facts("note", {"at": number})
            got.append(link.recv_facts("note")["at"])
    return got


def test_many_short_cuts_lose_and_repeat_nothing() -> None:
    rounds, over = 1500, threading.Event()
    with over_a_proxy() as (server, client, cutter), ThreadPoolExecutor(3) as pool:

        def cut() -> int:
            cuts = 0
            while not over.wait(0.05):
                cutter.cut()
                time.sleep(0.02 * (cuts % 4))
                cutter.mend()
                cuts += 1
                over.wait(0.15)
            return cuts

        cuts = pool.submit(cut)
        ends = [pool.submit(play, server, C, rounds), pool.submit(play, client, S, rounds)]
        got = [end.result(timeout=120) for end in ends]
        over.set()
        assert cuts.result() >= 3
        assert cutter.connections >= 3
    for mine, other in zip(got, (1, 0), strict=True):
        expected = [[2 * n + other] + [n] * (n % 10 == 0) for n in range(rounds)]
        assert mine == [value for part in expected for value in part]
    ours, theirs = server[C].ledger, client[S].ledger
    assert ours.total().rounds == theirs.total().rounds == rounds
    assert ours.total().sent == theirs.total().received == ours.total().received
    assert ours.wire_bytes == theirs.wire_bytes  # each frame once at each end
    assert ours.resent_bytes + theirs.resent_bytes > 0  # and what was sent again apart


def test_a_large_message_is_cut_in_its_middle() -> None:
    words = torch.arange(6_000_000)  # 48 MB: more than the room at the other end
    with over_a_proxy() as (server, client, cutter), ThreadPoolExecutor(2) as pool:
        before = cutter.bytes
        ends = [pool.submit(network[peer].exchange, "big", [words + int(network.rank)])
                for network, peer in ((server, C), (client, S))]  # fmt: skip
        while cutter.bytes < before + 10_000_000:
            time.sleep(0.001)
        cutter.cut()
        time.sleep(0.2)
        cutter.mend()
        assert torch.equal(ends[0].result(timeout=60)[0], words + 1)
        assert torch.equal(ends[1].result(timeout=60)[0], words)


def test_a_cut_for_good_ends_both_within_the_configured_time() -> None:
    with over_a_proxy(reconnect_s=1) as (server, client, cutter), ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(network[peer].recv, "layer0/qkv", [(torch.int64, (1,))])
            for network, peer in ((server, C), (client, S))
        ]
        begin = time.monotonic()
        cutter.cut()
        for wait, lost in zip(waiting, ("client", "server"), strict=True):
            with pytest.raises(PeerLost, match=f"at layer0/qkv: lost {lost}"):
                wait.result(timeout=SOON_S)
        assert 0.9 < time.monotonic() - begin < 10  # the receivers would wait for 60 s


def test_who_does_not_know_the_session_cannot_continue_it() -> None:
    with over_a_proxy() as (server, client, _):
        stranger = Network(C, client.settings, Ledger(), peers=[S], session="0" * 32)
        with pytest.raises(LinkError, match="client is not awaited"):
            stranger.wait()
        stranger.close("over")
        known = Network(C, client.settings, Ledger(), peers=[S], session=server.session)
        with pytest.raises(LinkError, match="client is not awaited: server has one already"):
            known.wait()
        known.close("over")
        with ThreadPoolExecutor(2) as pool:  # the session itself goes on
            ends = [pool.submit(play, server, C, 5), pool.submit(play, client, S, 5)]
            assert [len(end.result(timeout=SOON_S)) for end in ends] == [6, 6]


# -------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def parties(
    tmp_path: Path, reconnect_s: float
) -> Iterator[tuple[dict[Rank, Process], dict[str, Proxy], str]]:
    """All three as processes whose links go through proxies, in mid-answer; and the plain answer."""
    model = load_model(tiny_model(tmp_path))
    public = PublicConfig(policy="full", max_new_tokens=TOKENS)
    document = tmp_path / "document.txt"
    document.write_text("and the number of the gate of the city")
    context = model.tokenizer.encode(document.read_text(), bos=True)
    asked = model.tokenizer.encode(QUESTION, bos=False)
    bound = bind_policy(model.shape, public, len(context), len(asked))
    plain = plain_answer(model, bound, context, asked, TOKENS, Sampling(), ())
    settings = free_settings(reconnect_s=reconnect_s).model_copy(update={"public": public})
    server, dealer = settings.addresses.server, settings.addresses.dealer
    with proxy(server) as one, proxy(dealer) as two, proxy(dealer) as three, started() as children:
        routes = {
            S: Addresses(server=server, dealer=two.address),
            C: Addresses(server=one.address, dealer=three.address),
            D: settings.addresses,
        }
        flags: dict[Rank, list[object]] = {
            S: ["--model", model.path, "--context", document],
            C: ["--question", QUESTION, "--no-stop-at-eos"],
            D: [],
        }
        running = {}
        for rank, addresses in routes.items():
            file = tmp_path / f"{rank.label}.yaml"
            config = write_config(settings.model_copy(update={"addresses": addresses}), file)
            running[rank] = start(PARTY, "--rank", int(rank), "--config", config, *flags[rank])
            children.append(running[rank])
        first = running[C].stdout.read(1)  # type: ignore[union-attr]
        cutters = {"server-client": one, "server-dealer": two, "client-dealer": three}
        yield running, cutters, model.tokenizer.decode(plain.ids).removeprefix(first)


def cut_then_mend(cutters: list[Proxy], seconds: float) -> None:
    for cutter in cutters:
        cutter.cut()
    time.sleep(seconds)
    for cutter in cutters:
        cutter.mend()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("seconds", "which"),
    [
        (1, "all"),
        pytest.param(1, "server-client", marks=pytest.mark.slow),
        pytest.param(1, "server-dealer", marks=pytest.mark.slow),
        pytest.param(1, "client-dealer", marks=pytest.mark.slow),
        pytest.param(10, "all", marks=pytest.mark.slow),
    ],
)
def test_an_answer_survives_a_cut(seconds: float, which: str, tmp_path: Path) -> None:
    with parties(tmp_path, reconnect_s=20) as (running, cutters, rest):
        chosen = list(cutters.values()) if which == "all" else [cutters[which]]
        cut_then_mend(chosen, seconds)
        for rank, party in running.items():
            out, noise = party.communicate(timeout=90)
            assert party.returncode == 0, noise
            assert errors_of(noise) == []
            if rank is C:
                assert out.rstrip("\n") == rest
        assert all(cutter.connections >= 2 for cutter in chosen)


@pytest.mark.processes
@pytest.mark.slow
def test_a_cut_for_good_ends_all_three(tmp_path: Path) -> None:
    with parties(tmp_path, reconnect_s=3) as (running, cutters, _):
        for cutter in cutters.values():
            cutter.cut()
        begin = time.monotonic()
        for party in running.values():
            _, noise = party.communicate(timeout=SOON_S)
            assert party.returncode == 3
            (line,) = errors_of(noise)
            assert "lost " in line
            assert "waiting up to 3 s for it to come back" in noise
        assert time.monotonic() - begin < SOON_S
