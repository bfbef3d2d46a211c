"""Policies that choose tokens and pages against the literal reading of them, on random cases."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mpcache.cache import Cache
from mpcache.engines.plain import PlainOps
from mpcache.model.prefill import Prefill
from mpcache.ops import as_tensor, as_value
from mpcache.policy import parse_policy
from mpcache.policy.layer_view import LayerView
from mpcache.runtime.program import run
from tests.support.literal_choices import Literal
from tests.support.tiny_policies import KERNELS, shape

D, LAYERS, CASES = 4, 3, 2000


def draw(rng: random.Random, kind: str) -> str:
    """A policy's spec, of small sizes."""
    k, dense = rng.randint(1, 6), rng.choice(["true", "false"])
    choose = rng.choice(["1", "0-1", "1-2", "0", "2"])
    refresh = rng.choice([1, 2, 4])
    full = int(choose[0]) if rng.random() < 0.7 else 0
    match kind:
        case "tidal":
            return f"tidal:k={k},choose={choose},full={full},dense={dense},recent={rng.choice([0, 2])}"
        case "delta":
            page, recent, vote = rng.choice([1, 2, 3]), rng.choice([0, 1]), rng.choice(["max", "sum"])
            return (
                f"delta:page={page},pages={rng.randint(1, 2)},recent={recent},choose={choose},full={full},"
                f"dense={dense},vote={vote}"
            )
        case "recycled":
            return f"recycled:k={k},refresh={refresh},dense={dense}"
        case "tokenselect":
            sink, recent, vote = rng.choice([0, 2]), rng.choice([0, 3]), rng.choice(["softmax", "linear"])
            return f"tokenselect:k={k},sink={sink},recent={recent},refresh={refresh},vote={vote}"
        case _:
            block = rng.choice([1, 2])
            sink, recent, full = rng.choice([0, 2]), rng.choice([0, 3]), rng.choice([0, 1])
            return f"hip:k={k},block={block},sink={sink},recent={recent},full={full},refresh={refresh}"


def check(kind: str, spec: str, context: int, kv: int, group: int, steps: list[int], seed: int) -> int:
    """Every query of every step attends to the same places, each of them once. -> rows with a choice."""
    generator = torch.Generator().manual_seed(seed)
    s = shape(layers=LAYERS, heads=kv * group, kv_heads=kv, head_dim=D)
    policy = parse_policy(spec)
    bound, ops = policy.bind(context, s), PlainOps()
    nobody: Any = None
    k = tuple(torch.randn(kv, context, D, generator=generator) for _ in range(LAYERS))
    known = Prefill(
        k, k, tuple(torch.zeros(kv * group, 0, D) for _ in range(LAYERS)), context, torch.zeros(1)
    )
    total = context + sum(steps)
    eye = torch.eye(total).expand(kv, total, total)  # values that show the weights
    layers: list[Any] = []
    for i in range(LAYERS):
        layers.append(run(bound.fill(ops, s, i, known, KERNELS), nobody))  # type: ignore[arg-type]
        layers[i].v = eye[:, :context]
    literal, cache, chosen = Literal(kind, policy, group), Cache(layers, context), 0
    for m in steps:
        positions = cache.advance(m)
        first = int(positions[0])
        for i in range(LAYERS):
            new, q = (
                torch.randn(m, kv, D, generator=generator),
                torch.randn(kv, m * group, D, generator=generator),
            )
            v = eye[:, first : first + m].transpose(0, 1)
            run(cache.append(ops, i, as_value(new), as_value(v)), nobody)  # type: ignore[arg-type]
            view = LayerView(ops, s, bound.plan, cache, i, positions)  # type: ignore[arg-type]
            out = as_tensor(run(bound.attend(view, as_value(q)), nobody))
            run(bound.observe(view), nobody)
            want = literal.step(i, layers[i].k, q, m, context)
            for h in range(kv):
                for row in range(m * group):
                    seen = sorted(want[h][row])
                    weights = torch.zeros(total).index_put(
                        (torch.tensor(seen),), torch.softmax(layers[i].k[h, seen] @ q[h, row], 0)
                    )
                    assert (out[h, row] - weights).abs().max() < 1e-4, (spec, m, i, h, row, seen)
                    chosen += len(seen) < first + row // group + 1
    return chosen


KINDS = ("tidal", "delta", "recycled", "tokenselect", "hip")


@pytest.mark.parametrize("cases", [8, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(1800)
def test_choices_equal_the_literal_ones(kind: str, cases: int) -> None:
    rng, chosen, tried = random.Random(f"{kind}{cases}"), 0, 0
    while tried < cases:
        spec, context = draw(rng, kind), rng.randint(9, 24)
        kv, group = rng.choice([(1, 1), (1, 3), (2, 1), (2, 2)])
        steps = [rng.choice([1, 1, 3]) for _ in range(rng.randint(1, 5))]
        chosen += check(kind, spec, context, kv, group, steps, tried)
        tried += 1
    assert chosen > cases
