"""pod against a literal reading of it: each weight of each row, on thousands of random cases."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mpcache.cache import Cache
from mpcache.engines.plain import PlainOps
from mpcache.model.prefill import Prefill
from mpcache.ops import as_tensor, as_value
from mpcache.policy import parse_policy
from mpcache.policy.layer_view import LayerView
from mpcache.runtime.program import run
from tests.support.tiny_policies import KERNELS, shape

D, LAYERS, CASES, MOST_RECENT = 4, 4, 2000, 6
BLOCKS = {"none": [], "1-2": [[1, 2]], "0-1-2": [[0, 1, 2]], "0-1/2-3": [[0, 1], [2, 3]], "0-3": [[0, 3]]}


def literal_weights(
    lend: str, sink: int, recent: int, leader: int, layer: int, keys: list[Tensor], queries: list[Tensor],
    new: int, head: int, row: int, group: int,
) -> list[float]:  # fmt: skip
    """What one row of a layer pays each token. keys: per layer (KV, n, d).  new: the step's tokens."""
    n = keys[layer].shape[1]
    seen = n - new + row // group + 1
    distant = range(sink, max(sink, n - new - recent))

    def score(of: int, query_of: int, token: int) -> float:
        return float(keys[of][head, token] @ queries[query_of][head, row])

    def shares(scores: dict[int, float]) -> dict[int, float]:
        top = max(scores.values())
        every = {t: math.exp(s - top) for t, s in scores.items()}
        return {t: e / sum(every.values()) for t, e in every.items()}

    own = {t: score(layer, layer, t) for t in range(seen)}
    if leader == layer or not distant:
        paid = shares(own)
    elif lend == "keys":  # one set of keys for distant tokens
        paid = shares({t: score(leader, layer, t) if t in distant else s for t, s in own.items()})
    elif lend == "scores":
        paid = shares({t: score(leader, leader, t) if t in distant else s for t, s in own.items()})
    else:  # g o_P + (1 - g) o_D: the lowest layer's gate and its attention to distant tokens
        lowest = shares({t: score(leader, leader, t) for t in range(seen)})
        gate = sum(w for t, w in lowest.items() if t not in distant)
        near = shares({t: s for t, s in own.items() if t not in distant})
        paid = {t: lowest[t] if t in distant else gate * near[t] for t in range(seen)}
    return [paid.get(t, 0.0) for t in range(n)]


def check(lend: str, share: str, context: int, kv: int, group: int, steps: list[int], seed: int) -> int:
    """Compare every weight of every row and step. -> rows that borrow."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    sink, recent = rng.choice([0, 1, 3]), rng.randint(1, MOST_RECENT)
    s = shape(layers=LAYERS, heads=kv * group, kv_heads=kv, head_dim=D)
    policy = parse_policy(f"pod:sink={sink},recent={recent},share={share},lend={lend}")
    bound, ops = policy.bind(context, s), PlainOps()
    leaders = {i: block[0] for block in BLOCKS[share] for i in block}
    nobody: Any = None
    k = tuple(torch.randn(kv, context, D, generator=generator) for _ in range(LAYERS))
    none = tuple(torch.zeros(kv * group, 0, D) for _ in range(LAYERS))
    known, total = Prefill(k, k, none, context, torch.zeros(1)), context + sum(steps)
    eye = torch.eye(total).expand(kv, total, total)  # values that show the weights
    layers: list[Any] = [run(bound.fill(ops, s, i, known, KERNELS), nobody) for i in range(LAYERS)]  # type: ignore[arg-type]
    for layer in layers:
        layer.v = eye[:, :context]
    cache, borrowing = Cache(layers, context), 0
    for m in steps:
        positions = cache.advance(m)
        first, queries = int(positions[0]), []
        for i in range(LAYERS):
            new = torch.randn(m, kv, D, generator=generator)
            queries.append(torch.randn(kv, m * group, D, generator=generator))
            v = eye[:, first : first + m].transpose(0, 1)
            run(cache.append(ops, i, as_value(new), as_value(v)), nobody)  # type: ignore[arg-type]
            view = LayerView(ops, s, bound.plan, cache, i, positions)  # type: ignore[arg-type]
            out = as_tensor(run(bound.attend(view, as_value(queries[-1])), nobody))
            run(bound.observe(view), nobody)
            leader = leaders.get(i, i)
            keys = [as_tensor(each.k) for each in layers]
            for h in range(kv):
                for row in range(m * group):
                    want = literal_weights(
                        lend, sink, recent, leader, i, keys, queries, m, h, row, group
                    )  # fmt: skip
                    found = out[h, row, : first + m].tolist()
                    assert found == pytest.approx(want, abs=1e-4), (lend, share, m, i, h, row)
                    borrowing += leader != i and first - recent > sink
    return borrowing


@pytest.mark.parametrize("cases", [8, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lend", ["keys", "scores", "weights"])
@pytest.mark.timeout(1800)
def test_weights_equal_the_literal_ones(lend: str, cases: int) -> None:
    rng, borrowing = random.Random(f"{lend}{cases}"), 0
    for seed in range(cases):
        kv, group = rng.choice([(1, 1), (1, 3), (2, 1), (2, 2)])
        steps = [rng.choice([1, 1, 3]) for _ in range(rng.randint(1, 4))]
        share, context = rng.choice(list(BLOCKS)), rng.randint(MOST_RECENT, 16)
        borrowing += check(lend, share, context, kv, group, steps, seed)
    assert borrowing > cases
