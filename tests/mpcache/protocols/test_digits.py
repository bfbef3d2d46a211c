"""Comparisons by digits, in one level and in two: right everywhere, and what is opened is uniform."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from mpcache.cost.reader import CostParty
from mpcache.cost.tally import sum_tallies
from mpcache.protocols import compare
from mpcache.protocols.compare import Digits, Keys
from mpcache.protocols.digit_levels import cheapest_layout
from mpcache.protocols.topk import topk
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import Opening, Part, Program, Request, draw, open_masked, run
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side
from tests.support.harness import secure
from tests.support.uniformity import SIGMAS, worst_of_ring

WIDTHS = [2, 3, 4, 9, 13, 16, 20, 24, 25, 28, 31, 32]
EITHER = [*((width, levels) for width in WIDTHS for levels in (1, 2)), (40, 2), (63, 2)]


def signs(side: Side, x: Any, how: Digits, seen: list[torch.Tensor] | None = None) -> Program[Any]:
    """Compare x (n,) with zero; note what is opened after x itself."""
    request = Request(how.kind, (Part((how.n,)), *how.random), how.derived, how.derive, how.work)
    r, *parts = yield from draw(request)
    (c,) = yield from open_masked(Opening(x + r, "masked", ring=how.width))
    program, answer = how.sign(side, parts, c), None
    while True:
        try:
            ask = program.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = yield ask
        if seen is not None and side.rank is Rank.SERVER and side.device != "meta":
            seen.append(answer[0])


def compared(x: torch.Tensor, how: Digits, seen: list[torch.Tensor] | None = None) -> Any:
    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return Share((yield from signs(ops.side, share.data, how, seen)), 0)

    return secure(protocol, x, bits=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
@pytest.mark.parametrize(("width", "levels"), EITHER)
def test_signs_over_the_whole_ring(dtype: torch.dtype, width: int, levels: int) -> None:
    """Extremes, ties, neighbours, powers of two; as priced, to the byte."""
    half = 1 << (width - 1)
    powers = 1 << torch.arange(width - 1)
    x = torch.cat([torch.tensor([half - 1, -half, 0, 0, -1, 1, -2, 2]), powers, -powers, 1 - powers])
    x = torch.cat([x.clamp(-half, half - 1), torch.randint(-half, half, (300,))])
    how = Digits(len(x), width, dtype, levels)
    played = compared(x, how)
    found = (played.server.data + played.client.data).to(dtype)
    assert torch.equal(found, (x < 0).to(dtype))
    party = CostParty()
    run(signs(Side(Rank.SERVER, "meta"), MetaTensor(x.shape), how), party)
    priced = sum_tallies(party.steps.items())
    for rank, sent, dealt in (
        (Rank.SERVER, priced.server_sent, priced.server_offline),
        (Rank.CLIENT, priced.client_sent, priced.client_offline),
    ):
        spent = played.ledgers[rank].total()
        assert (spent.rounds, spent.sent, spent.offline_received) == (priced.rounds, sent, dealt)
    assert priced.rounds == 1 + levels and priced.client_offline == 0
    assert priced.server_offline == len(x) * how.layout.nbytes(dtype.itemsize)


@pytest.mark.slow
def test_close_pairs_in_two_levels() -> None:
    x = torch.randint(-4, 5, (200_000,))
    played = compared(x, Digits(len(x), 24, torch.int8, 2))
    assert torch.equal((played.server.data + played.client.data).to(torch.int8), (x < 0).to(torch.int8))


@pytest.mark.parametrize(("levels", "dealt", "products"), [(1, 55, []), (2, 18, [37])])
def test_what_the_dealer_sends_for_24_bits(levels: int, dealt: int, products: Sequence[int]) -> None:
    """A thirteenth and a fortieth of a key tree, which goes to both."""
    how = Digits(1, 24, torch.int8, levels)
    keys = sum(part.nbytes * (2 if part.public else 1) for part in Keys(1, 24, torch.int8).derived)
    assert how.layout.nbytes(1) == sum(part.nbytes for part in how.derived) == dealt
    assert round(keys / dealt) == (13, 40)[levels - 1]
    assert [len(level.products) for level in how.layout.levels[:-1]] == products


def test_too_many_digits_for_one_level_are_refused() -> None:
    with pytest.raises(ValueError, match="40 bits are too many"):
        cheapest_layout(40, 1, 1)


# ------------------------------------------------------------------------------------------- what is seen


def worst(x: int, levels: int, n: int = 40_000) -> float:
    """How far the opened bits of equal values x are from uniform, alone and in pairs, in deviations."""
    seen: list[torch.Tensor] = []
    how = Digits(n, 24, torch.int8, levels)
    compared(torch.full((n,), x), how, seen)
    assert len(seen) == levels
    bits, rings = [], [level.bits for level in how.layout.levels]
    for values, ring in zip(seen, rings, strict=True):
        bits += [((values >> i) & 1).numpy() for i in range(ring)]
    numbers = [values.numpy().astype(np.int64).view(np.uint8).reshape(n, 8) for values in seen]
    alone = max(worst_of_ring(*one) for one in zip(numbers, rings, strict=True))
    pairs = max(abs((a ^ b).mean() - 0.5) * 2 * n**0.5 for a, b in combinations(bits, 2))
    return max(alone, float(pairs))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("x", [0, -1, 1 << 20, -(1 << 23)])
def test_opened_bits_are_uniform_and_tell_nothing_of_each_other(x: int, levels: int) -> None:
    """Ties, neighbours, extremes: without masks most of these bits would hardly ever be 1."""
    assert worst(x, levels) < SIGMAS


@pytest.mark.parametrize("level", [0, 1])
def test_a_mask_that_hides_two_bits_is_seen(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug at either level: the second bit leaves under the mask of the first."""
    how = Digits(1, 24, torch.int8, 2)
    bits = how.layout.levels[level].bits

    def reused(share: Any, mask: Any, count: int, why: str) -> Program[Any]:
        if count == bits and not share.is_meta:
            mask = (mask & ~2) | ((mask & 1) << 1)
        return (yield from opened(share, mask, count, why))

    opened = compare._bits_opened
    monkeypatch.setattr(compare, "_bits_opened", reused)
    assert worst(0, 2) > 10 * SIGMAS


# ------------------------------------------------------------------------------------------- in a top-k


@pytest.mark.parametrize(("many", "rounds"), [(1 << 16, 3), (1, 4)])
def test_many_pairs_are_compared_in_two_levels(
    many: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descending, ties to the lower index, either way; a round more, and a third of the bytes of pairs."""
    monkeypatch.setattr(compare, "MANY", many)
    scores = torch.randint(0, 5, (3, 12)) * 1.0
    values = torch.arange(36.0).reshape(3, 12, 1)

    def protocol(ops, share, items):  # type: ignore[no-untyped-def]
        _, (gathered,) = yield from topk(ops.side, share, 5, [items], 27, Digits)
        return gathered

    played = secure(protocol, scores, values)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :5, None]
    assert (played.value() - values.gather(1, order)).abs().max() < 2**-10
    assert played.ledgers[Rank.SERVER].total().rounds == rounds
