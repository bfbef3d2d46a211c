"""Policies that evict a document's tokens against the literal reading of them, on random cases."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpcache.errors import PolicyError
from mpcache.model.prefill import Prefill
from mpcache.policy import parse_policy
from mpcache.policy.topv import transported
from tests.support import literal_evictions as literal
from tests.support.tiny_policies import KERNELS, model, prefilled, shape, tokens

D, CASES = 4, 2000


class Case:
    """A random context of one layer, and what is asked of it."""

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.n, (self.kv, self.group) = (
            self.rng.randint(3, 20),
            self.rng.choice([(1, 1), (1, 3), (2, 1), (2, 2)]),
        )
        self.kept = self.rng.randint(1, self.n)
        self.k, self.v = (self.randn(self.kv, self.n, D) for _ in range(2))
        self.ids = tuple(self.rng.randrange(4) for _ in range(self.n))

    def randn(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator)

    def known(self, window: int) -> Prefill:
        self.q = self.randn(self.kv * self.group, window, D)
        return Prefill(
            (self.k,), (self.v,), (self.q,), self.n - window, torch.zeros(1), token_ids=self.ids
        )  # fmt: skip

    def evicted(self, spec: str, known: Prefill | None = None) -> tuple[Any, list[Any]]:
        """The policy, and what it keeps: positions, or those of each KV head."""
        policy: Any = parse_policy(spec)
        known = known or self.known(policy.window(self.n))
        s = shape(layers=1, heads=self.kv * self.group, kv_heads=self.kv, head_dim=D)
        return policy, policy.evict(known, 0, policy.plan(self.n, s), KERNELS).tolist()


def windowkv(c: Case) -> None:
    suffix, size, score = c.rng.randint(1, 5), c.rng.randint(1, 5), c.rng.choice(["average", "max"])
    _, rows = c.evicted(f"windowkv:cap={c.kept},suffix={suffix},size={size},score={score}")
    assert rows == literal.windowkv(c.q.tolist(), c.k.tolist(), c.kept, suffix, size, score == "max")


def sepllm(c: Case) -> None:
    initial, separators, recent = c.rng.randint(0, 3), c.rng.randint(1, c.n), c.rng.randint(1, c.n)
    spec = f"sepllm:initial={initial},separators={separators},recent={recent},ids=1/3"
    kept = min(c.n, initial + separators + recent)
    assert c.evicted(spec)[1] == literal.sepllm(c.ids, {1, 3}, initial, kept, recent)


def promptdistill(c: Case) -> None:
    pool = c.rng.choice([1, 3, 5])
    _, rows = c.evicted(f"promptdistill:k={c.kept},layer=0,pool={pool}")
    assert rows == literal.promptdistill([q[-1] for q in c.q.tolist()], c.k.tolist(), c.kept, pool)


def topv(c: Case) -> None:
    source, target, far = c.randn(c.n, D), c.randn(c.n, D), c.rng.choice([0.0, 0.5, 2.0])
    worth, share = transported(source, target, far), c.rng.choice([0.0, 0.3, 0.8])
    want = torch.tensor(literal.topv(source.tolist(), target.tolist(), far))
    torch.testing.assert_close(worth.float(), want, atol=1e-3, rtol=1e-3)
    known = c.known(0)
    known.notes["topv", far] = worth
    _, rows = c.evicted(f"topv:cap={c.kept},recover={share},far={far}", known)
    assert rows == literal.recovered(worth.tolist(), c.kept, share, 4)


def keyformer(c: Case) -> None:
    share = c.rng.choice([0.0, 0.3, 0.6])
    policy, rows = c.evicted(f"keyformer:cap={c.kept},recent={share},seed={c.rng.randint(0, 9)}")
    noise, recent = policy.noise(0, c.kv, 0, c.n).tolist(), int(share * c.kept)
    for kv in range(c.kv):
        want = literal.keyformer(c.q.tolist(), c.k.tolist(), noise, c.kept, recent, kv)
        assert rows[kv] == want


def cascade(c: Case) -> None:
    tiers, sink, duel = c.rng.randint(1, 4), c.rng.randint(0, 3), c.rng.choice([True, False])
    policy: Any = parse_policy(f"cascade:places={c.kept},tiers={tiers},sink={sink},duel={str(duel).lower()}")
    known = c.known(policy.window(c.n))
    _, rows = c.evicted(policy.spec, known)
    paid = policy.paid(known, 0) if duel else torch.zeros(c.kv, c.n)
    places = [p for p in (c.kept // tiers + (i < c.kept % tiers) for i in range(tiers)) if p]
    for kv in range(c.kv):
        assert rows[kv] == literal.cascade(paid[kv].tolist(), sink, places, duel)


def shadowkv(c: Case) -> None:
    size, recent = c.rng.randint(2, 4), c.rng.randint(0, 2)
    total = max(0, c.n - recent * size) // size
    picked = c.rng.randint(1, max(1, total - 1))
    if total < 2:
        return
    _, rows = c.evicted(f"shadowkv:page={size},outliers={picked},pages=1,recent={recent},rank=0")
    for kv in range(c.kv):
        worth = literal.outliers(c.k[kv].tolist(), size, total)
        assert rows[kv] == literal.fronted(worth, size, picked, c.n)


def nosa(c: Case) -> None:
    size = c.rng.randint(1, 4)
    total = c.n // size
    picked = c.rng.randint(1, max(1, total - 1))
    if total < 2:
        return
    _, rows = c.evicted(f"nosa:page={size},always={picked},pages=1,recent=0")
    for kv in range(c.kv):
        lengths = c.v[kv].norm(dim=-1).tolist()
        worth = [sum(lengths[b * size : (b + 1) * size]) for b in range(total)]
        assert rows[kv] == literal.fronted([literal.INFINITE, *worth[1:]], size, picked, c.n)


def pact(c: Case) -> None:
    cutoff, share = c.rng.choice([0.1, 0.4, 1.0]), c.rng.choice([0.3, 0.55, 1.0])
    policy: Any = parse_policy(f"pact:keep={share},centres={c.kept},cutoff={cutoff}")
    known = c.known(c.n)
    known.notes["stream sizes"] = (c.randn(c.n).abs(),)
    mean = c.q.mean(1)
    paid = torch.stack([torch.softmax(c.k[h // c.group] @ mean[h], 0) for h in range(len(mean))]).mean(0)
    worth = (paid * known.notes["stream sizes"][0]).tolist()
    s = shape(layers=1, heads=c.kv * c.group, kv_heads=c.kv, head_dim=D)
    (kept,) = policy.retain(known, 0, policy.plan(c.n, s), KERNELS)
    spared = max(c.kept, -int(-share * c.n // 1))
    for kv in range(c.kv):
        rows, values, sizes = literal.pact(
            c.k[kv].tolist(), c.v[kv].tolist(), worth, spared, c.kept, 1.5 * cutoff, 4
        )
        assert kept.rows[kv].tolist() == rows
        torch.testing.assert_close(kept.v[kv], torch.tensor(values), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(kept.bias[kv], torch.tensor(sizes).log(), atol=1e-5, rtol=1e-5)


CHECKS: list[Callable[[Case], None]] = [
    windowkv, sepllm, promptdistill, topv, keyformer, cascade, shadowkv, nosa, pact,
]  # fmt: skip


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cases", [20, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_evictions_equal_the_literal_ones(check: Callable[[Case], None], cases: int) -> None:
    for seed in range(cases):
        check(Case(seed))


def test_keys_of_low_rank_are_near_and_exact_where_they_must_be() -> None:
    """Outliers and what stands behind the chunks keep their keys; at the whole rank all do."""
    s = shape(layers=1)
    spec = "shadowkv:page=4,outliers=1,pages=2,recent=1,rank={}"
    known = prefilled(parse_policy(spec.format(0)), s, tokens(24))
    kept = {}
    for rank in (0, 3, 8):
        policy = parse_policy(spec.format(rank))
        (kept[rank],) = policy.retain(known, 0, policy.plan(24, s), KERNELS)
    assert torch.equal(kept[0].k, kept[8].k)  # two KV heads of four dimensions
    exact = (kept[0].k - kept[3].k).abs().amax(-1) < 1e-6
    assert exact[:, :4].all() and exact[:, 20:].all() and not exact[:, 4:20].any()


def test_a_trained_head_is_read_from_a_file(tmp_path: Path) -> None:
    s = shape(layers=2)
    policy = parse_policy("nosa:page=4,always=1,pages=2,head=file")
    there: Any = model(s)
    there = type(there)(**{**vars(there), "path": tmp_path})
    known = replace(prefilled(policy, s, tokens(24)), model=there)
    plan = policy.plan(24, s)
    with pytest.raises(PolicyError, match="mpcache-nosa.safetensors, which is not there"):
        policy.retain(known, 0, plan, KERNELS)
    a, w = torch.randn(2, 2), torch.randn(2, 2, 4)
    save_file({"a": a, "w": w}, tmp_path / "mpcache-nosa.safetensors")
    (kept,) = policy.retain(known, 1, plan, KERNELS)
    assert kept.bias is not None and policy.largest_bias > 0
    for head in range(2):
        for place, t in enumerate(kept.rows[head].tolist()):
            c = a[1, head] * torch.log1p(torch.exp(w[1, head] @ known.v[1][head, t]))
            assert abs(kept.bias[head, place] - c.clamp(-3, 3)) < 1e-5
    save_file({"a": a, "w": w[:1].clone()}, tmp_path / "mpcache-nosa.safetensors")
    with pytest.raises(PolicyError, match="the model needs"):
        policy.retain(known, 0, plan, KERNELS)
    (tmp_path / "mpcache-nosa.safetensors").write_bytes(b"no tensors")
    with pytest.raises(PolicyError, match="is no trained head"):
        policy.retain(known, 0, plan, KERNELS)
    assert parse_policy("nosa").largest_bias == 0  # the stand-in leaves the logits alone
