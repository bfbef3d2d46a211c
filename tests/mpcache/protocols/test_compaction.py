"""Rows that are kept by a secret score: the right ones, and nothing but how many is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch

from mpcache.engines.threads import Job
from mpcache.ops import AnyEngine
from mpcache.protocols import compaction
from mpcache.protocols.topk import size_for
from mpcache.rank import Rank
from mpcache.runtime.party import ComputingParty, Party
from mpcache.runtime.program import Opening, Program, local, run
from mpcache.runtime.shares import Share
from tests.support.play import play, reconstruct

RANKS = "ranks of shuffled rows"


def keep(scores: torch.Tensor, k: int, values: Sequence[torch.Tensor], limit: int = 8) -> tuple[Any, Any]:
    """The kept rows, and all ranks that the server saw."""
    seen: list[torch.Tensor] = []

    def program(ops: AnyEngine, party: Party, rank: Rank) -> Any:
        if isinstance(party, ComputingParty) and rank is Rank.SERVER:
            opening = party.open

            def note(items: Sequence[Opening], step: str) -> list[Any]:
                opened = opening(items, step)
                seen.extend(x for item, x in zip(items, opened, strict=True) if item.why == RANKS)
                return opened

            party.open = note  # type: ignore[method-assign]
        party.begin("question")
        mine = [
            ops.secret(x if rank is Rank.SERVER else None, x.shape, Rank.SERVER) for x in (scores, *values)
        ]
        return run(ops.compact(mine[0], k, mine[1:], limit), party)

    job: Job = program
    played = play(job)
    kept = [reconstruct(*both) for both in zip(played.server, played.client, strict=True)]
    return kept, torch.stack([x & (size_for(scores.shape[-1]) - 1) for x in seen])


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (40, 11)])
def test_the_highest_stay_by_rank_and_ties_go_to_the_lower_index(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(0, 6, (2, n), generator=generator).float()
    k_rows, v_rows = (torch.randn(2, n, c, generator=generator) for c in (3, 2))
    kept, _ = keep(scores, k, [k_rows, v_rows])
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k, None]
    for got, rows in zip(kept, (k_rows, v_rows), strict=True):
        assert (got - rows.gather(1, order.expand(-1, -1, rows.shape[-1]))).abs().max() < 2**-14


def spread(scores: Sequence[float], times: int) -> Counter[tuple[int, ...]]:
    """How often each order of opened ranks came, in so many independent rows."""
    rows = torch.tensor([list(scores)] * times)
    _, ranks = keep(rows, 1, [torch.zeros(*rows.shape, 1)])
    return Counter(tuple(row) for row in ranks.reshape(-1, len(scores)).tolist())


def is_uniform(found: Counter[tuple[int, ...]], n: int) -> bool:
    times = found.total()
    orders = list(permutations(range(n)))
    chance = 1 / len(orders)
    far = 5 * (times * chance * (1 - chance)) ** 0.5
    return set(found) <= set(orders) and all(abs(found[o] - times * chance) < far for o in orders)


@pytest.mark.parametrize("scores", [(3.0, 2.0, 1.0), (0.0, 0.0, 0.0), (1.0, 5.0, 5.0)])
def test_opened_ranks_are_any_permutation_whatever_the_scores_are(scores: Sequence[float]) -> None:
    """Tied ones, too: ranks by shuffled place would come in order among them."""
    assert is_uniform(spread(scores, 1200), 3)


def test_ranks_without_a_shuffle_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmoved(side: Any, rows: Sequence[Share], knows: Rank) -> Program[list[Share]]:
        return local(list(rows))

    monkeypatch.setattr(compaction, "shuffle", unmoved)
    assert not is_uniform(spread((3.0, 2.0, 1.0), 1200), 3)


def test_ranks_shuffled_by_one_party_alone_follow_from_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one shuffle they are uniform, and its owner can undo them: so there are two."""
    shuffle, orders = compaction.shuffle, []

    def noted(side: Any, rows: Sequence[Share], knows: Rank) -> Program[list[Share]]:
        out = yield from shuffle(side, rows, knows)
        if side.device != "meta" and side.rank is knows:
            orders.append(knows)
        return out

    monkeypatch.setattr(compaction, "shuffle", noted)
    keep(torch.tensor([[1.0, 3.0, 2.0]]), 1, [torch.zeros(1, 3, 1)])
    assert sorted(orders) == [Rank.SERVER, Rank.CLIENT]
