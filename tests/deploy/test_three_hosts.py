"""The topology of deploy/ in network namespaces: addresses, a firewall, a silent link, a killed party."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpcache.certificates import make_identity
from mpcache.config import Addresses, PublicConfig, Settings, Timeouts
from mpcache.rank import Rank
from tests.support.hosts import Hosts, ended, three_hosts, wait_for_answer, why_not
from tests.support.identities import pinned
from tests.support.processes import CLI, PARTY, Process, errors_of, start, started, tiny_model, write_config

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(300)]

S, C, D = Rank
TOKENS = 6
MANY = 40  # so that an answer is surely under way when its link falls silent
ENDS_S = 120.0  # a generous wait; what ends a party is in its line


@dataclass
class Site:
    """One machine per party, each with its own key, and the config that all have."""

    hosts: Hosts
    folder: Path
    config: Path
    children: list[Process]

    def start(self, rank: Rank, *more: object) -> Process:
        own: dict[Rank, list[object]] = {
            S: ["--model", self.folder / "model", "--context", self.folder / "document.txt",
                "--listen", "0.0.0.0:7100"],
            C: ["--question", "the gate of", "--no-stop-at-eos"],
            D: ["--listen", "0.0.0.0:7102"],
        }  # fmt: skip
        child = start(self.hosts.on(rank, PARTY), "--rank", int(rank), "--config", self.config,
                      "--identity", self.folder / rank.label, *own[rank], *more)  # fmt: skip
        self.children.append(child)
        return child

    def all(self, *more: object) -> dict[Rank, Process]:
        return {rank: self.start(rank, *more) for rank in (D, S, C)}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    tiny_model(tmp_path / "model")
    (tmp_path / "document.txt").write_text("and the number of the gate of the city is in the book")
    identities = [make_identity(rank) for rank in Rank]
    for identity in identities:
        identity.write(tmp_path / identity.rank.label)
    with three_hosts() as hosts, started() as children:
        settings = Settings(
            public=PublicConfig(policy="full", max_new_tokens=TOKENS, network="20:1000"),
            addresses=Addresses(server=f"{hosts.address(S)}:7100", dealer=f"{hosts.address(D)}:7102"),
            timeouts=Timeouts(connect_s=90, reconnect_s=6),
        )
        config = write_config(pinned(settings, identities), tmp_path / "session.yaml")
        yield Site(hosts, tmp_path, config, children)


def test_three_hosts_answer_and_check_sees_every_link(site: Site) -> None:
    parties = site.all()
    found = ended(parties, ENDS_S)
    assert [found[rank][0] for rank in Rank] == [0, 0, 0], found
    assert found[C][1].strip()
    for rank in (D, S):
        site.start(rank, "--serve")
    time.sleep(0.5)
    checking = site.hosts.on(C, CLI)
    child = start(checking, "check", "--config", site.config, "--identity", site.folder / "client")
    site.children.append(child)
    out, noise = child.communicate(timeout=ENDS_S)
    assert (child.returncode, noise) == (0, ""), out + noise


def test_a_firewall_between_two_is_named_at_the_one_that_dials(site: Site) -> None:
    site.hosts.silence(C, D)
    client = site.start(C, "--connect-timeout", 12)
    site.start(D), site.start(S)
    _, noise = client.communicate(timeout=ENDS_S)
    (line,) = errors_of(noise)
    assert client.returncode == 3
    assert f"dealer at {site.hosts.address(D)}:7102 (timed out: its host, or a firewall, is silent)" in line


@pytest.mark.parametrize("for_good", [False, True], ids=["a second", "for good"])
def test_a_silent_link_is_borne_for_a_while(for_good: bool, site: Site) -> None:
    parties = site.all("--max-new-tokens", MANY)
    wait_for_answer(parties[C])
    site.hosts.silence(C, S)
    if not for_good:
        time.sleep(1)
        site.hosts.silence(C, S, off=True)
    found = ended(parties, ENDS_S)
    assert [found[rank][0] for rank in Rank] == ([3] * 3 if for_good else [0] * 3), found
    if for_good:
        (line,) = errors_of(found[C][2])
        # Whichever end notices first may tell the other one by way of the dealer.
        assert "lost server" in line or "lost client" in line


def test_a_killed_party_ends_the_others_and_all_go_on_where_they_were(site: Site) -> None:
    kept = {rank: ["--state", site.folder / "state" / rank.label] for rank in Rank}
    whole = ended(site.all(), ENDS_S)
    parties = {rank: site.start(rank, *kept[rank]) for rank in (D, S, C)}
    wait_for_answer(parties[C])
    parties[S].kill()
    begun = time.monotonic()
    found = ended(parties, ENDS_S)
    assert time.monotonic() - begun < 60
    for rank in (C, D):
        assert found[rank][0] == 3
        (line,) = errors_of(found[rank][2])
        assert "server" in line
    again = ended({rank: site.start(rank, *kept[rank], "--resume") for rank in (D, S, C)}, ENDS_S)
    assert [again[rank][0] for rank in Rank] == [0, 0, 0], again
    assert again[C][1] == whole[C][1]
