"""Parties that share a machine: server and client have cores of their own, the dealer has them all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpcache.rank import Rank
from mpcache_parties.placement import cores_of, on_cores_of

ASK = (sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))")
chosen = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not let one choose cores"
)


@pytest.mark.parametrize("cores", [[3], [0, 1], [2, 5, 7], list(range(16))])
def test_two_share_what_there_is_and_the_dealer_has_all(cores: list[int]) -> None:
    server, client, dealer = (cores_of(rank, cores) for rank in Rank)
    assert dealer == cores and server and client
    if len(cores) > 1:
        assert sorted(server + client) == cores and 0 <= len(server) - len(client) <= 1


@chosen
@pytest.mark.parametrize("rank", Rank)
def test_a_process_is_started_there_and_this_one_goes_on_where_it_was(rank: Rank) -> None:
    mine = sorted(os.sched_getaffinity(0))
    with on_cores_of(rank):
        found = subprocess.run(ASK, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(cores_of(rank, mine))
    assert sorted(os.sched_getaffinity(0)) == mine


@chosen
def test_a_system_that_forbids_it_starts_them_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(process: int, cores: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    with on_cores_of(Rank.SERVER):
        assert subprocess.run(ASK, capture_output=True, check=True).stdout
