"""mpcache and quest against the literal reading of them, on small random cases with many ties."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mpcache.cache import Cache
from mpcache.engines.plain import PlainOps
from mpcache.model.prefill import Prefill
from mpcache.ops import as_tensor, as_value
from mpcache.policy import Policy, parse_policy
from mpcache.policy.clusters import ClusterPlan
from mpcache.policy.layer_view import LayerView
from mpcache.policy.mpcache import largest_attention
from mpcache.runtime.program import run
from tests.support.literal_clusters import Layer, Options, attended, importance, keep
from tests.support.tiny_policies import KERNELS, shape

D = 4
CASES = 2000


def nested(x: torch.Tensor) -> Any:
    return x.tolist()


def whole(generator: torch.Generator, *size: int) -> torch.Tensor:
    """Small whole numbers: exact in float32, and full of ties."""
    return torch.randint(-2, 3, size, generator=generator).float()


def draw(rng: random.Random, kind: str) -> tuple[str, dict[str, Any]]:
    """A policy's spec, and the sizes of a case."""
    coarse, fine = rng.choice([(2, 1), (4, 2), (4, 4), (4, 1), (8, 4), (8, 2)])
    sink, recent = rng.choice([0, 1, 3]), rng.choice([0, 2, 5])
    around = [n for base in (coarse, sink + recent + coarse) for n in (base - 1 or 1, base, base + 1)]
    context = rng.choice([1, *around, *[rng.randint(1, 40) for _ in range(4)]])
    score = rng.choice(["linear", "mean", "bound"])
    options = dict(
        score=score, alpha=rng.choice([0.5, 0.625, 1.0, 0.0]), gqa=rng.choice(["head", "sum"]),
        refresh=rng.choice([1, 1, 3]), share=rng.choice(["none", "0-1"]),
        blocks=rng.choice(["auto", "extremes"] if score != "mean" else ["auto"]),
    )  # fmt: skip
    if kind == "mpcache":
        n_keep = rng.choice([context, context, rng.randint(1, context)])
        options |= dict(
            n_keep=n_keep, coarse=coarse, fine=fine, sink=sink, recent=recent,
            queries=rng.randint(1, context),
            coarse_keep=rng.choice([0.5, 0.3, 1.0]), fine_keep=rng.choice([0.2, 0.5, 1.0]),
        )  # fmt: skip
    else:
        options |= dict(page=coarse, pages=rng.choice([0.2, 0.5]), full=0)
    kv, group = rng.choice([(1, 1), (1, 3), (2, 1), (2, 2)])
    steps = [rng.choice([1, 3]), *[1] * rng.randint(0, 7)]
    sizes = dict(context=context, kv=kv, group=group, steps=steps)
    return f"{kind}:" + ",".join(f"{k}={v}" for k, v in options.items()), sizes


def check(spec: str, context: int, kv: int, group: int, steps: list[int], seed: int) -> int:
    """Every query of every step attends to the same positions. -> choices that were compared."""
    generator = torch.Generator().manual_seed(seed)
    s = shape(layers=2, heads=kv * group, kv_heads=kv, head_dim=D)
    policy = parse_policy(spec)
    bound = policy.bind(context, s)
    ops: Any = PlainOps(KERNELS if seed % 2 else None)
    window = policy.window(context)
    k = [whole(generator, kv, context, D) for _ in range(2)]
    q_w = [torch.randn(kv * group, window, D, generator=generator) for _ in range(2)]
    prefilled = Prefill(tuple(k), tuple(k), tuple(q_w), context - window, torch.zeros(1))
    total = context + sum(steps)
    eye = torch.eye(total).expand(kv, total, total)  # values that show the weights

    layers, literal, keys = [], [], []
    for i in range(2):
        plan = bound.plan.layers[i]
        assert isinstance(plan, ClusterPlan)
        layer = run(bound.fill(ops, s, i, prefilled, KERNELS), None)  # type: ignore[arg-type]
        rows = list(range(context))
        if window:
            source = plan.leader
            scores = importance(nested(q_w[source]), nested(k[source]), context - window, group)
            rows = keep(scores, plan.kept, policy.sink, policy.recent)  # type: ignore[attr-defined]
            assert policy.evict(prefilled, i, bound.plan, KERNELS).tolist() == rows
        there: Any = layer  # plain tensors
        there.v = eye[:, rows]
        layers.append(layer)
        p: Any = policy
        o = Options(
            list(plan.sizes), list(plan.keeps), plan.sink, plan.recent,
            p.score, p.alpha, p.gqa, p.blocks, p.refresh,
        )  # fmt: skip
        keys.append(torch.zeros(kv, total, D))
        keys[i][:, :context] = k[i]
        literal.append(Layer(o, [(t, nested(k[i][:, t])) for t in rows]))

    cache, compared, position = Cache(layers, context), 0, context
    for m in steps:
        positions = cache.advance(m)
        for i in range(2):
            new_k = whole(generator, m, kv, D)
            q = whole(generator, kv, m * group, D)
            keys[i][:, position : position + m] = new_k.transpose(0, 1)
            new_v = eye[:, position : position + m].transpose(0, 1)
            run(cache.append(ops, i, as_value(new_k), as_value(new_v)), None)  # type: ignore[arg-type]
            view = LayerView(ops, s, bound.plan, cache, i, positions)
            out = as_tensor(run(policy.attend(view, as_value(q)), None))  # type: ignore[arg-type]
            run(policy.observe(view), None)  # type: ignore[arg-type]

            literal[i].step([(position + t, nested(new_k[t])) for t in range(m)], nested(q))
            plan = bound.plan.layers[i]
            assert isinstance(plan, ClusterPlan)
            leader = literal[plan.leader]
            for h in range(kv):
                for row in range(m * group):
                    want = attended(literal[i], leader, m, h, row, group)
                    assert set(out[h, row].nonzero().flatten().tolist()) == want, (spec, m, i, h, row)
                    # Each of them once: a token that was gathered twice would weigh double.
                    seen = sorted(want)
                    weights = torch.softmax(keys[i][h, seen] @ q[h, row], 0)
                    assert (out[h, row, seen] - weights).abs().max() < 1e-5
                    compared += leader.chosen is not None
        for read in literal:
            read.after()
        position += m
    return compared


@pytest.mark.parametrize("kind", ["mpcache", "quest"])
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_selections_equal_the_literal_ones(kind: str, part: int) -> None:
    rng, compared, met = random.Random(f"{kind}{part}"), 0, set()
    for case in range(CASES // 4 if kind == "mpcache" else CASES // 12):
        spec, sizes = draw(rng, kind)
        compared += check(spec, **sizes, seed=case)
        met |= corners(spec, sizes)
    assert compared > 1000
    assert met >= {"T = 1", "T = coarse - 1", "T = coarse", "T = coarse + 1", "one head", "GQA"}
    assert met >= {"linear", "mean", "bound", "head", "sum", "refresh", "shared", "blocks fill"}
    assert kind == "quest" or met >= {"n_keep = T", "n_keep < T", "two levels", "one level"}


def corners(spec: str, sizes: dict[str, Any]) -> set[str]:
    """Which of the cases that must not be missing this one is."""
    p: Any = parse_policy(spec)
    coarse = getattr(p, "coarse", 0) or p.page
    group, heads, n = sizes["group"], sizes["group"] * sizes["kv"], getattr(p, "n_keep", 0)
    names = {
        f"T = {sizes['context']}": True,
        "T = coarse - 1": sizes["context"] == coarse - 1,
        "T = coarse": sizes["context"] == coarse,
        "T = coarse + 1": sizes["context"] == coarse + 1,
        "one head": heads == 1,
        "GQA": group > 1 and sizes["kv"] > 1,
        p.score: True,
        p.gqa: True,
        "refresh": p.refresh > 1,
        "shared": p.share != "none",
        "blocks fill": len(sizes["steps"]) > coarse,
        "n_keep = T": n == sizes["context"],
        "n_keep < T": n < sizes["context"],
        "two levels": getattr(p, "fine", coarse) < coarse,
        "one level": getattr(p, "fine", coarse) == coarse,
    }
    return {name for name, there in names.items() if there}


def test_largest_attention_is_the_literal_one() -> None:
    q, k = torch.randn(4, 3, D), torch.randn(2, 9, D)
    got = largest_attention(q, k, 6)
    for t in range(9):
        rows = [
            torch.softmax(k[h // 2, : 7 + i] @ q[h, i], 0)[t].item() if t <= 6 + i else 0.0
            for h in range(4)
            for i in range(3)
        ]
        assert abs(got[t].item() - max(rows)) < 1e-6


def test_the_published_rule_reveals_a_count() -> None:
    policy: Policy = parse_policy("mpcache:threshold=0.2,queries=0.5,sink=1,recent=2")
    assert policy.leak == "count" and parse_policy("mpcache").leak == "none"
    assert not policy.plan_is_public and parse_policy("mpcache").plan_is_public
    s = shape(layers=2, heads=4, kv_heads=2, head_dim=D)
    assert [layer.kept for layer in policy.plan(30, s).layers] == [30, 30]  # the most it can be
    counts = set()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        k = tuple(torch.randn(2, 30, D, generator=g) for _ in range(2))
        q = tuple(2 * torch.randn(4, 15, D, generator=g) for _ in range(2))
        prefilled = Prefill(k, k, q, 15, torch.zeros(1))
        resolved = policy.with_counts(policy.count_from_document(prefilled, KERNELS))
        assert resolved.plan_is_public and resolved.leak == "count"
        plan = resolved.plan(30, s)
        for i in range(2):
            rows = policy.evict(prefilled, i, plan, KERNELS)
            forced = {0, 28, 29}
            wanted = {t for t in range(30) if largest_attention(q[i], k[i], 15)[t] > 0.2} | forced
            assert set(rows.tolist()) == wanted
        counts.add(tuple(layer.kept for layer in plan.layers))
    assert len(counts) > 1
