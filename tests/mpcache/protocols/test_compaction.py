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
from mpcache.protocols.sorting import merge_exchange
from mpcache.rank import Rank
from mpcache.runtime.party import Party
from mpcache.runtime.program import Program, local, run
from mpcache.runtime.shares import Share
from tests.support.play import play, reconstruct

WAYS = ["compared in all pairs", "sorted"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How many rows are taken as few."""
    if request.param == "sorted":
        monkeypatch.setattr(compaction, "LONG", 0)
    return str(request.param)


def keep(scores: torch.Tensor, k: int, values: Sequence[torch.Tensor], limit: int = 8) -> tuple[Any, Any]:
    """The kept rows, and all orders of shuffled rows that the server saw."""
    seen: list[torch.Tensor] = []

    def noted(order: Any) -> Any:
        def place(side: Any, scores: Share, width: int) -> Program[Any]:
            found = yield from order(side, scores, width)
            if side.device != "meta" and side.rank is Rank.SERVER:
                seen.append(found)
            return found

        return place

    def program(ops: AnyEngine, party: Party, rank: Rank) -> Any:
        party.begin("question")
        mine = [
            ops.secret(x if rank is Rank.SERVER else None, x.shape, Rank.SERVER) for x in (scores, *values)
        ]
        return run(ops.compact(mine[0], k, mine[1:], limit), party)

    job: Job = program
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ranked_places", "sorted_places"):
            patch.setattr(compaction, name, noted(getattr(compaction, name)))
        played = play(job)
    kept = [reconstruct(*both) for both in zip(played.server, played.client, strict=True)]
    return kept, torch.stack(seen)


@pytest.mark.usefixtures("way")
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
    """How often each order of shuffled rows was opened, in so many independent sets of rows."""
    rows = torch.tensor([list(scores)] * times)
    _, places = keep(rows, 1, [torch.zeros(*rows.shape, 1)])
    return Counter(tuple(row) for row in places.reshape(-1, len(scores)).tolist())


def is_uniform(found: Counter[tuple[int, ...]], n: int) -> bool:
    times = found.total()
    orders = list(permutations(range(n)))
    chance = 1 / len(orders)
    far = 5 * (times * chance * (1 - chance)) ** 0.5
    return set(found) <= set(orders) and all(abs(found[o] - times * chance) < far for o in orders)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scores", [(3.0, 2.0, 1.0), (0.0, 0.0, 0.0), (1.0, 5.0, 5.0)])
def test_opened_ranks_are_any_permutation_whatever_the_scores_are(scores: Sequence[float]) -> None:
    """Tied ones, too: ranks by shuffled place would come in order among them."""
    assert is_uniform(spread(scores, 1200), 3)


@pytest.mark.usefixtures("way")
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


# ------------------------------------------------------------------------------------------- many rows


@pytest.mark.parametrize("n", [2, 3, 8, 11])
def test_a_network_sorts_whatever_it_is_given(n: int) -> None:
    """All zeros and ones, which stand for all rows; the places of a layer are apart."""
    rows = torch.cartesian_prod(*[torch.arange(2)] * n)
    for first, second in merge_exchange(n):
        assert len(set(torch.cat([first, second]).tolist())) == 2 * len(first)
        pair = rows[:, first], rows[:, second]
        rows[:, first], rows[:, second] = torch.maximum(*pair), torch.minimum(*pair)
    assert (rows.diff(dim=-1) <= 0).all()


def test_many_rows_take_few_comparisons() -> None:
    few, many = compaction.LONG, compaction.LONG + 1
    assert compaction.compared_rows(few) == few * (few - 1) // 2
    assert compaction.compared_rows(many) == 6820 < compaction.compared_rows(few) // 10
