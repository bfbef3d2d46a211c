"""What a policy sees: a layer in one step, and at the document's owner what stays of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mpcache.cache import Cache, LayerCache, SplitLayer
from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Ops, Value
from mpcache.policy.plan import Plan, SplitPlan
from mpcache.protocols.ranges import MASKED_SCORE
from mpcache_kernels import Backend


@dataclass(frozen=True)
class LayerView:
    """What a policy sees of layer `index` in one step of m tokens.

    `rows` are queries per KV head, one for each token and head of a group, the heads of a token together.
    """

    ops: Ops
    shape: ModelShape
    plan: Plan
    cache: Cache
    index: int
    positions: torch.Tensor  # (m,)

    @property
    def layer(self) -> LayerCache:
        return self.cache.whole(self.index)

    def parts(self) -> list[LayerView]:
        """See each part of a split layer as a layer of its own, the first of a model that has no other."""
        plan, layer = self.plan.layers[self.index], self.cache.layers[self.index]
        assert isinstance(plan, SplitPlan) and isinstance(layer, SplitLayer)
        return [
            replace(
                self, shape=part_shape(self.shape, len(heads)), plan=replace(self.plan, layers=(part,)),
                cache=replace(self.cache, layers=[mine]), index=0,
            )
            for heads, part, mine in zip(plan.heads, plan.parts, layer.parts, strict=True)
        ]  # fmt: skip

    def biased(self, scores: Value) -> Value:
        """Add the biases of the kept context, the first of scores' columns (KV, rows, n); hide padding.

        No cost.
        """
        bias, seen = self.layer.bias, self._seen()
        if bias is not None:
            n = bias.shape[-1]
            kept = scores[..., :n] + bias.expand(*scores.shape[:-1], n)
            scores = self.ops.cat([kept, scores[..., n:]], -1)
        if seen is not None:
            n = scores.shape[-1] - seen.shape[-1]
            marks = seen.expand(*scores.shape[:-1], seen.shape[-1])
            hidden = self.ops.mask_scores(scores[..., n:], marks, MASKED_SCORE)
            scores = self.ops.cat([scores[..., :n], hidden], -1)
        return scores

    def _seen(self) -> Value | None:
        """Return the marks of the last columns, 0 for padding: (n,), or (KV, 1, n) after an eviction."""
        kept, later = self.layer.seen, self.cache.seen
        if kept is None or later is None:
            return later if kept is None else kept
        return self.ops.cat([kept, later.expand(*kept.shape[:-1], later.shape[-1])], -1)

    @property
    def tokens(self) -> int:
        """n, the tokens in this layer's cache, this step's m among them."""
        n: int = self.layer.k.shape[1]
        return n

    @property
    def m(self) -> int:
        return self.positions.shape[0]

    def visible(self, n: int) -> torch.Tensor | None:
        """Return the causal mask (rows, n), 1 where attended, of n columns that end with this step's tokens.

        None for one token, which sees all.
        """
        if self.m == 1:
            return None
        mask = torch.ones(self.m, n, dtype=torch.int64)
        mask[:, n - self.m :].tril_()
        return mask.repeat_interleave(self.shape.group, 0)


@dataclass(frozen=True)
class Kept:
    """What stays of heads that keep the same number. rows: as `evict` says.

    k, v: (KV, kept, d).  bias: (KV, kept), where a policy has them.
    """

    rows: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Kept:
        """Return it with its tensors on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Kept(self.rows.to(device), self.k.to(device), self.v.to(device), bias)


@dataclass(frozen=True, eq=False)
class PackedContext:
    """What stays of a context that was read and evicted before: all that a session needs of it.

    length: its tokens, before eviction.  spec: of the policy that evicted.  counts: what the model or the
    document decided of the plan; nothing where that is public.  layers: what each part of each layer keeps.
    largest_scores, largest_values: per layer, as a `Prefill` has them.
    """

    length: int
    spec: str
    counts: tuple[int, ...]
    layers: tuple[tuple[Kept, ...], ...]
    largest_scores: tuple[float, ...]
    largest_values: tuple[float, ...]

    @cached_property
    def digest(self) -> str:
        """A digest of all that a cache follows from."""
        found = hashlib.sha256(repr((self.length, self.spec, self.counts)).encode())
        for parts in self.layers:
            for kept in parts:
                for tensor in (kept.rows, kept.k, kept.v, kept.bias):
                    if tensor is not None:
                        found.update(f"{tuple(tensor.shape)} ".encode())
                        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def to(self, device: torch.device | str) -> PackedContext:
        """Return it with its tensors on a device."""
        return replace(self, layers=tuple(tuple(kept.to(device) for kept in parts) for parts in self.layers))


OwnersContext = Prefill | PackedContext  # what the document's owner fills a cache from


@dataclass(frozen=True)
class PlaintextContext:
    """What the server knows of the heads whose cache it fills. prefill: None where it was packed before."""

    prefill: Prefill | None
    kernels: Backend
    kept: Kept

    @property
    def rows(self) -> torch.Tensor:
        return self.kept.rows

    @property
    def k(self) -> torch.Tensor:
        return self.kept.k


def part_shape(shape: ModelShape, kv_heads: int) -> ModelShape:
    """Return the shape of a model of one layer and so many of the KV heads, each with its group."""
    return replace(shape, layers=1, heads=kv_heads * shape.group, kv_heads=kv_heads)


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Take x (KV, T, ...) at rows (n,) or (KV, n): (KV, n, ...)."""
    if rows.dim() == 1:
        return x[:, rows]
    return torch.stack([head[mine] for head, mine in zip(x, rows, strict=True)])
