"""Openings of one round: whatever their widths, senders and recipients, each comes out as its shares say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpcache.rank import Rank
from mpcache.runtime.program import Opening
from tests.support.play import play

SHARES = {rank: torch.randint(-(2**62), 2**62, (3, 5)) for rank in (Rank.SERVER, Rank.CLIENT)}


def opened(items: list[Opening], rank: Rank) -> list[torch.Tensor | None]:
    """Say what a party should learn, by plain arithmetic."""
    one, two = (SHARES[rank] for rank in (Rank.SERVER, Rank.CLIENT))
    values: list[torch.Tensor | None] = []
    for item in items:
        whole = SHARES[item.sender] if item.sender is not None else one ^ two if item.xor else one + two
        kept = (1 << 8 * item.width) - 1 if item.width < 8 else -1
        values.append((whole & kept).T if item.to in (None, rank) else None)
    return values


@pytest.mark.parametrize("ring", [1, 8, 13, 24, 40, 48, 56, 63, 64])
def test_openings_of_all_kinds_share_a_round(ring: int) -> None:
    def items(rank: Rank) -> list[Opening]:
        share = SHARES.get(rank, SHARES[Rank.SERVER]).T  # not contiguous
        ways = [(to, sender) for to in (None, *SHARES) for sender in (None, *SHARES)]
        mixed = [Opening(share, "", to, sender, xor, ring) for to, sender in ways for xor in (False, True)]
        return [Opening(share, "", ring=8 * (1 + ring % 8)), *mixed]

    def job(ops: Any, party: Any, rank: Rank) -> list[torch.Tensor | None]:
        return [] if rank is Rank.DEALER else party.open(items(rank), "open")

    played = play(job)
    for rank, got in ((Rank.SERVER, played.server), (Rank.CLIENT, played.client)):
        for mine, right in zip(got, opened(items(rank), rank), strict=True):
            assert (mine is None) == (right is None)
            assert mine is None or right is None or torch.equal(mine, right)


def test_a_share_that_takes_no_memory_is_opened() -> None:
    nothing = torch.zeros((), dtype=torch.int64).expand(2, 3)

    def job(ops: Any, party: Any, rank: Rank) -> Any:
        return None if rank is Rank.DEALER else party.open([Opening(nothing, "", ring=40)], "open")[0]

    assert not play(job).client.any()
