"""Selections and the operations that policies add, on shares against floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcache.argmax import argmax
from mpcache.engines.plain import PlainOps
from mpcache.ops import AnyEngine, Ops, Value
from mpcache.policy.columns import by_item, flat
from mpcache.policy.representatives import extremes
from mpcache.rank import Rank
from mpcache.runtime.program import Program, run
from mpcache.runtime.shares import Share, decode
from tests.support.play import play

CLOSE = 2**-11  # scores nearer than this may be told apart the other way round
PROTOCOLS = ["fast", "fast-bits", pytest.param("stock", marks=pytest.mark.slow)]


def both(
    program: Callable[..., Program[list[Any]]], *inputs: torch.Tensor, protocol: str = "fast"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(secure, plain) of each value that `program(ops, *inputs)` returns; keys are the last input."""

    def enter(ops: AnyEngine, rank: Rank) -> list[Any]:
        return [ops.secret(x if rank is Rank.SERVER else None, x.shape, Rank.SERVER) for x in inputs]

    def party(ops: AnyEngine, party: Any, rank: Rank) -> list[Share]:
        party.begin("test")
        return run(program(ops, *enter(ops, rank)), party)

    played = play(party, protocol)
    nobody: Any = None
    want = run(program(PlainOps(), *inputs), nobody)
    pairs = zip(played.server, played.client, want, strict=True)
    return [(opened(a, b), w) for a, b, w in pairs]


def opened(a: Share, b: Share) -> torch.Tensor:
    """The secret behind two shares modulo 2^ring."""
    away = 64 - a.ring
    return decode((a.data + b.data) << away >> away, a.bits).float()


def apart(rows: int, n: int) -> torch.Tensor:
    """(rows, n) scores that differ by more than what is told apart, at random places."""
    return torch.stack([torch.randperm(n) for _ in range(rows)]).float() * 4 * CLOSE - 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 5), (13, 4), (24, 9)])
def test_a_kept_choice_gathers_scatters_and_marks(n: int, k: int, protocol: str) -> None:
    scores, values, weights = apart(3, n), torch.randn(3, n, 4), torch.rand(3, k, 4)

    def program(ops: Ops, s: Value, v: Value, w: Value) -> Program[list[Value]]:
        selection, (first,) = yield from ops.topk(s, k, [v])
        kept = yield from selection.prepare()
        again = yield from kept.gather(v)
        there = yield from kept.scatter(w)
        direct = yield from selection.gather(v)
        return [first, again, there, direct, kept.marks(), selection.marks()]

    for got, want in both(program, scores, values, weights, protocol=protocol):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_levels_become_one_choice(protocol: str) -> None:
    coarse, fine, tokens = apart(2, 6), apart(2, 12), torch.randn(2, 12, 3)

    def program(ops: Ops, c: Value, f: Value, t: Value) -> Program[list[Value]]:
        first, (f2, t2) = yield from ops.topk(c, 4, [by_item(f, 6), by_item(flat(t), 6)])
        second, (t3,) = yield from ops.topk(flat(f2), 3, [by_item(flat(t2), 8)])
        choice = yield from first.refine(second, 2)
        return [t3, (yield from choice.gather(t)), choice.marks(), (yield from choice.scatter(t3))]

    results = both(program, coarse, fine, tokens, protocol=protocol)
    for got, want in results:
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-3, rtol=0)


def test_selections_are_equal_but_for_close_scores() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        scores = torch.randn(4, 16) * 3

        def program(ops: Ops, s: Value) -> Program[list[Value]]:
            selection, _ = yield from ops.topk(s, 5, [by_item(s, 16)])
            return [selection.marks()]

        ((got, want),) = both(program, scores)
        for row in range(4):
            gap = scores[row].sort(descending=True).values
            if gap[4] - gap[5] > CLOSE:
                assert got[row].tolist() == want[row].tolist()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_positive_is_exact(protocol: str) -> None:
    x = torch.tensor([[-3.0, -(2.0**-16), 0.0, 2.0**-16, 5.5, -1000.0, 1000.0]])

    def program(ops: Ops, v: Value) -> Program[list[Value]]:
        return [(yield from ops.relu(v))]

    ((got, want),) = both(program, x, protocol=protocol)
    torch.testing.assert_close(got, want, atol=0 if protocol != "stock" else 1e-3, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_extremes(size: int) -> None:
    x = torch.randint(-64, 64, (2, 3, size, 4)) / 16

    def program(ops: Ops, v: Value) -> Program[list[Value]]:
        high, low = yield from extremes(ops, v, v)
        again = yield from extremes(ops, high.reshape(2, 1, 3, 4), low.reshape(2, 1, 3, 4))
        return [high, low, *again]

    for (got, plain), want in zip(both(program, x), (x.amax(2), x.amin(2), None, None), strict=True):
        assert torch.equal(got, plain) and (want is None or torch.equal(got, want))


@pytest.mark.parametrize("n", [3, 32, 33, 40, 48, 70])
def test_the_highest_of_many_is_found_in_groups(n: int) -> None:
    scores = torch.randint(0, 40, (2, n)) / 4.0  # with ties: the lower index

    def program(ops: Ops, s: Value) -> Program[list[Value]]:
        return [(yield from argmax(ops, s, 1, 64))]

    ((got, plain),) = both(program, scores)
    want = torch.zeros(2, n)
    for row in range(2):
        want[row, scores[row].tolist().index(scores[row].max())] = 1
    assert torch.equal(got, want) and torch.equal(plain, want)


def test_hidden_scores_get_no_weight() -> None:
    scores = torch.randn(1, 2, 6)

    def program(ops: Ops, q: Value) -> Program[list[Value]]:
        keys = yield from ops.prepare(ops.secret(torch.eye(6)[None], (1, 6, 6), Rank.SERVER))
        alive = ops.ones((1, 6))
        selection, _ = yield from ops.topk(q[:, 0], 2, [by_item(q[:, 0], 6)])
        alive = alive - selection.marks()
        hidden = ops.mask_scores(
            (yield from ops.scores(q, keys)), alive.reshape(1, 1, 6).expand(1, 2, 6), 192
        )
        e, total = yield from ops.softmax(hidden, None)
        return [(yield from ops.mul(e, (yield from ops.reciprocal(total))))]

    ((got, want),) = both(program, scores)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    assert (got < 1e-6).sum() == 4
