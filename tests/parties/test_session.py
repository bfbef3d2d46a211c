"""The parties agree on every public field, or say which one differs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from mpcache.config import PublicConfig
from mpcache.errors import LinkError, Mismatch, PeerFailed
from mpcache.ledger import Ledger
from mpcache.link import Hello
from mpcache.local_link import local_pair
from mpcache.rank import Rank
from parties.session import PROTOCOL_VERSION, agree, compare
from tests.parties.helpers import free_settings, grpc_networks

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
    words = "^Mismatch: policy.n_keep is 128 at server, 256 at client; start both with the same --config$"
    with pytest.raises(Mismatch, match=words):
        agree({C: client.other}, S, configs[S].flat())
    with pytest.raises(Mismatch, match=words):
        agree({S: client}, C, configs[C].flat())


def test_another_config_ends_all_three() -> None:
    flats = {rank: PublicConfig(max_new_tokens=8 if rank is C else 9).flat() for rank in Rank}

    def party(network: object) -> str:
        with pytest.raises(LinkError) as caught, network as entered:  # type: ignore[attr-defined]
            agree(entered.links, entered.rank, flats[entered.rank])
        assert isinstance(caught.value, Mismatch | PeerFailed)
        return str(caught.value)

    with grpc_networks(free_settings(), S, C, D) as networks, ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(party, networks))
    assert all("max_new_tokens is" in text and "8 at client" in text for text in texts)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (
            Hello(PROTOCOL_VERSION, D, "0", {"a": "1"}),
            r"server expects client \(rank 1\), but rank 2 is there",
        ),
        (Hello(99, C, "0", {"a": "1"}), "protocol version is 1 at server, 99 at client"),
        (Hello(PROTOCOL_VERSION, C, "0", {}), "a is 1 at server, not set at client"),
        (Hello(PROTOCOL_VERSION, C, "0", {"a": "1", "b": "2"}), "b is not set at server, 2 at client"),
    ],
)
def test_each_kind_of_difference(theirs: Hello, words: str) -> None:
    with pytest.raises(Mismatch, match=words):
        compare(Hello(PROTOCOL_VERSION, S, "0", {"a": "1"}), theirs, C)
