"""The parties agree on every public field, or say which one differs."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpcache.config import PublicConfig
from mpcache.errors import Desync, LinkError, Mismatch, PeerFailed
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.link import Hello
from mpcache.transport.local import local_pair
from mpcache_parties.handshake import (
    CLIENT_MODES,
    PROTOCOL_VERSION,
    KeepMode,
    agree,
    compare_hellos,
    confirm_facts,
)
from tests.support.links import free_settings, grpc_networks
from tests.support.processes import PARTY, errors_of, start, started, tiny_model, write_config

S, C, D = Rank


def test_three_parties_agree() -> None:
    public = PublicConfig().flat()
    with grpc_networks(free_settings(), S, C, D) as networks, ThreadPoolExecutor(3) as pool:
        hellos = list(pool.map(lambda network: agree(network.links, network.rank, public), networks))
        nonces = {hello.nonce for peers in hellos for hello in peers.values()}
        assert [set(peers) for peers in hellos] == [{C, D}, {S, D}, {S, C}]
        assert len(nonces) == 3
        assert all(hello.public == public for peers in hellos for hello in peers.values())
        totals = [link.ledger.total() for network in networks for link in network.links.values()]
        assert all(total.rounds == total.sent == total.offline_sent == 0 for total in totals)


def test_another_config_names_the_field_on_both_sides() -> None:
    server, client = local_pair(Ledger(), Ledger())
    configs = {S: PublicConfig(policy="mpcache:n_keep=128"), C: PublicConfig(policy="mpcache:n_keep=256")}
    client.send_hello(Hello(PROTOCOL_VERSION, C, "00", configs[C].flat()))
    words = "^Mismatch: policy.n_keep is 128 at server, 256 at client; start both with the same --config and"
    with pytest.raises(Mismatch, match=words):
        agree({C: client.other}, S, configs[S].flat())
    with pytest.raises(Mismatch, match=words):
        agree({S: client}, C, configs[C].flat())


def test_another_config_ends_all_three() -> None:
    flats = {rank: PublicConfig(max_new_tokens=9 if rank is C else 8).flat() for rank in Rank}

    def party(network: object) -> str:
        with pytest.raises(LinkError) as caught, network as entered:  # type: ignore[attr-defined]
            agree(entered.links, entered.rank, flats[entered.rank])
        assert isinstance(caught.value, Mismatch | PeerFailed)
        return str(caught.value)

    with grpc_networks(free_settings(), S, C, D) as networks, ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(party, networks))
    assert all("max_new_tokens is" in text and "9 at client" in text for text in texts)


@pytest.mark.processes
@pytest.mark.slow
def test_a_mismatch_does_not_wait_for_a_peer_that_has_not_come(tmp_path: Path) -> None:
    """Server and client are connected and disagree; nobody has started the dealer."""
    model, document = tiny_model(tmp_path / "model"), tmp_path / "document.txt"
    document.write_text("and the number of the gate of the city is in the book")
    settings = free_settings().model_copy(update={"public": PublicConfig(policy="full", max_new_tokens=4)})
    config = write_config(settings, tmp_path / "c.yaml")
    waiting = ["--config", config, "--connect-timeout", 100]
    with started() as children:
        children += [
            start(PARTY, "--rank", 0, *waiting, "--model", model, "--context", document),
            start(PARTY, "--rank", 1, *waiting, "--question", "the gate of", "--max-new-tokens", 6),
        ]
        noises = [child.communicate(timeout=60)[1] for child in children]
    for child, noise in zip(children, noises, strict=True):
        (line,) = errors_of(noise)
        assert child.returncode == 3
        assert "max_new_tokens is 4 at server, 6 at client" in line


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (
            Hello(PROTOCOL_VERSION, D, "0", {"a": "1"}),
            r"server expects client \(rank 1\), but rank 2 is there",
        ),
        (Hello(99, C, "0", {"a": "1"}), f"protocol version is {PROTOCOL_VERSION} at server, 99 at client"),
        (Hello(PROTOCOL_VERSION, C, "0", {}), "a is 1 at server, not set at client"),
        (Hello(PROTOCOL_VERSION, C, "0", {"a": "1", "b": "2"}), "b is not set at server, 2 at client"),
    ],
)
def test_each_kind_of_difference(theirs: Hello, words: str) -> None:
    with pytest.raises(Mismatch, match=words):
        compare_hellos(Hello(PROTOCOL_VERSION, S, "0", {"a": "1"}), theirs, C)


def hello(rank: Rank, state: str | None) -> Hello:
    return Hello(PROTOCOL_VERSION, rank, "0", {"a": "1"} | ({} if state is None else {"state": state}))


@pytest.mark.parametrize(
    ("peer", "state", "agrees"),
    [
        *((C, state, True) for state in CLIENT_MODES),
        *((D, state, True) for state in (*CLIENT_MODES, KeepMode.AS_CLIENT)),
        *((C, state, False) for state in (KeepMode.AS_CLIENT, "always", "", None)),
        *((D, state, False) for state in ("always", None)),
    ],
)
def test_one_that_serves_keeps_as_the_client_does(peer: Rank, state: str | None, agrees: bool) -> None:
    """Both sides find the same; all else is compared as ever."""
    mine, theirs = hello(S, KeepMode.AS_CLIENT), hello(peer, state)
    for one, other in ((mine, theirs), (theirs, mine)):
        if agrees:
            compare_hellos(one, other, other.rank)
            continue
        words = "state is as the client at server, .* at (client|dealer); start both with the same --state"
        with pytest.raises(Mismatch, match=words):
            compare_hellos(one, other, other.rank)
    more = Hello(PROTOCOL_VERSION, peer, "0", {"a": "2", "state": KeepMode.KEPT})
    with pytest.raises(Mismatch, match="a is 1 at server, 2 at"):
        compare_hellos(mine, more, peer)


@pytest.mark.parametrize("state", ["none", "resumed", KeepMode.AS_CLIENT])
def test_states_of_others_are_equal_or_differ(state: str) -> None:
    with pytest.raises(Mismatch, match=f"state is kept at server, {state} at client; .* --state alone$"):
        compare_hellos(hello(S, KeepMode.KEPT), hello(C, state), C)


# ------------------------------------------------------------------------ what each makes of the facts


def test_facts_are_compared_by_field() -> None:
    facts = {"shape.layers": "3", "plan.layer0.kept": "64", "plan.layer1.kept": "64"}
    same, other = local_pair(Ledger(), Ledger())
    other.send_facts("facts/agreed", facts)
    confirm_facts({C: same}, S, facts)
    server, client = local_pair(Ledger(), Ledger())
    client.send_facts("facts/agreed", facts | {"plan.layer1.kept": "60"})
    words = "^Mismatch: plan.layer1.kept is 64 at server, 60 at client; start both with the same release"
    with pytest.raises(Mismatch, match=words):
        confirm_facts({C: server}, S, facts)
    with pytest.raises(Mismatch, match=words):
        confirm_facts({S: client}, C, facts | {"plan.layer1.kept": "60"})


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"a": "1"}, "b is 2 at server, not set at client"),
        ({"a": "1", "b": "2", "c": ""}, "c is not set at server, empty at client"),
        ({"a": "x\ny" * 100, "b": "2"}, "a is 1 at server, x yx yx"),
    ],
)
def test_facts_that_one_side_lacks(theirs: dict[str, str], words: str) -> None:
    server, client = local_pair(Ledger(), Ledger())
    client.send_facts("facts/agreed", theirs)
    with pytest.raises(Mismatch, match=words) as caught:
        confirm_facts({C: server}, S, {"a": "1", "b": "2"})
    assert len(str(caught.value)) < 300


def test_facts_that_are_none() -> None:
    server, client = local_pair(Ledger(), Ledger())
    client.send_facts("facts/agreed", {"a": 1})
    with pytest.raises(Desync, match="client's facts are not text"):
        confirm_facts({C: server}, S, {"a": "1"})


OTHER_RELEASE = """
from dataclasses import replace
from mpcache.policy.full import Full
from mpcache_parties.main import main

plan = Full.plan
def another(self, context, shape):
    ours = plan(self, context, shape)
    return replace(ours, layers=(ours.layers[0], replace(ours.layers[1], attended=7), *ours.layers[2:]))
Full.plan = another
main()
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("odd", list(Rank))
def test_a_release_that_plans_otherwise_is_found_before_anything_secret_moves(
    odd: Rank, tmp_path: Path
) -> None:
    """Same config, same version number, another plan: processes, one of which runs changed code."""
    model = tiny_model(tmp_path / "model")
    document = tmp_path / "document.txt"
    document.write_text("and the number of the gate of the city is in the book")
    public = PublicConfig(policy="full", max_new_tokens=4)
    config = write_config(free_settings().model_copy(update={"public": public}), tmp_path / "c.yaml")
    flags: dict[Rank, list[object]] = {
        S: ["--model", model, "--context", document],
        C: ["--question", "the gate of"],
        D: [],
    }
    with started() as children:
        for rank in Rank:
            command = [sys.executable, "-c", OTHER_RELEASE] if rank is odd else PARTY
            children.append(start(command, "--rank", int(rank), "--config", config, *flags[rank],
                                  "--log", tmp_path / rank.label, "--log-level", "debug"))  # fmt: skip
        noises = [child.communicate(timeout=120)[1] for child in children]
    told = 0
    for rank, child, noise in zip(Rank, children, noises, strict=True):
        assert child.returncode == 3
        (line,) = errors_of(noise)
        told += bool(re.search(rf"plan\.layer1\.attended is \d+ at .*7 at {odd.label}|"
                               rf"plan\.layer1\.attended is 7 at {odd.label}, \d+ at", line))  # fmt: skip
        assert '"setup"' not in (tmp_path / rank.label).read_text()
    assert told == 3


@pytest.mark.parametrize(("wanted", "ready", "fits"), [(5, 9, True), (9, 9, True), (10, 9, False)])
@pytest.mark.parametrize("peer", [S, D])
def test_a_client_may_want_fewer_tokens(wanted: int, ready: int, fits: bool, peer: Rank) -> None:
    client = Hello(PROTOCOL_VERSION, C, "0", PublicConfig(max_new_tokens=wanted).flat())
    other = Hello(PROTOCOL_VERSION, peer, "0", PublicConfig(max_new_tokens=ready).flat())
    for mine, theirs in ((client, other), (other, client)):
        if fits:
            compare_hellos(mine, theirs, theirs.rank)
            continue
        with pytest.raises(Mismatch, match="max_new_tokens is"):
            compare_hellos(mine, theirs, theirs.rank)


def test_only_a_client_may() -> None:
    server = Hello(PROTOCOL_VERSION, S, "0", PublicConfig(max_new_tokens=5).flat())
    dealer = Hello(PROTOCOL_VERSION, D, "0", PublicConfig(max_new_tokens=9).flat())
    with pytest.raises(Mismatch, match="max_new_tokens is"):
        compare_hellos(server, dealer, D)
