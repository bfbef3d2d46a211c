"""What a KV-cache policy is: a plan from public sizes, and how it evicts, selects and remembers.

A policy is a frozen dataclass of options. `plan` turns them into public integers for one context
length and model, once; everything after that uses the integers. The server evicts in plaintext
(`evict`); the decode program attends through `attend`, on values that may be shares, and lets the
policy `observe` beside the rest of the layer, where its rounds cost nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from mpcache.cache import V_RING, Cache, LayerCache
from mpcache.errors import PolicyError
from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Ops, Value
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, local, together
from mpcache_kernels import Backend

LEAKS = ("none", "count", "static-index", "step-index", "step-bit", "token-class")

FULL_PERCENT = 100  # of the context: no budget

Budget = int | float  # a count, or a ratio written with a point: 0.25
Budgets = Budget | tuple[Budget, ...]  # one for all layers, or one for each: 512/256/256/128


def tokens_of(budget: Budget, whole: int, at_least: int = 1) -> int:
    """A budget as a whole number: ratios are rounded up, once, here."""
    n = math.ceil(budget * whole - 1e-9) if isinstance(budget, float) else budget
    return max(at_least, n)


@dataclass(frozen=True)
class LayerPlan:
    """Public integers of one layer.

    kept: context tokens in its cache.  attended: most context tokens that one query attends to.
    representatives: keys that q is scored against beside the kept tokens.
    """

    kept: int
    attended: int
    representatives: int


@dataclass(frozen=True)
class Plan:
    """Public integers of one policy for one context length and one model."""

    context: int
    layers: tuple[LayerPlan, ...]

    @property
    def kept(self) -> int:
        """Context tokens in the cache of the layer that keeps most."""
        return max(layer.kept for layer in self.layers)

    @property
    def attended(self) -> int:
        return max(layer.attended for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """All integers, a line for each run of layers that are alike."""
        layers = [
            {k: v for k, v in asdict(layer).items() if v not in ((), {}) and (k, v) != ("leader", i)}
            for i, layer in enumerate(self.layers)
        ]
        return [f"{name}: " + ", ".join(f"{k} {v}" for k, v in layer.items()) for name, layer in runs(layers)]


def runs(items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Neighbouring layers that are equal, under one name: `layers 0 to 5`."""
    start = 0
    for i in range(1, len(items) + 1):
        if i == len(items) or items[i] != items[start]:
            yield (f"layers {start} to {i - 1}" if i - start > 1 else f"layer {start}"), items[start]
            start = i


@dataclass(frozen=True)
class LayerView:
    """What a policy sees of layer `index` in one step of m tokens: `rows` queries per KV head, one
    for each token and head of a group, the heads of a token together."""

    ops: Ops
    shape: ModelShape
    plan: Plan
    cache: Cache
    index: int
    positions: torch.Tensor  # (m,)

    @property
    def layer(self) -> LayerCache:
        return self.cache.layers[self.index]

    @property
    def tokens(self) -> int:
        """n, the tokens in this layer's cache, this step's m among them."""
        n: int = self.layer.k.shape[1]
        return n

    @property
    def m(self) -> int:
        return self.positions.shape[0]

    def visible(self, n: int) -> torch.Tensor | None:
        """Causal mask (rows, n), 1 where attended, of n columns that end with this step's tokens.

        None for one token, which sees all.
        """
        if self.m == 1:
            return None
        mask = torch.ones(self.m, n, dtype=torch.int64)
        mask[:, n - self.m :].tril_()
        return mask.repeat_interleave(self.shape.group, 0)


@dataclass(frozen=True)
class Policy(ABC):
    """One eviction policy with its options."""

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str]  # what it computes on, in a few words
    leaks: ClassVar[str] = "none"
    may_leak: ClassVar[str] = ""  # what it leaks with which option, if that differs
    plain_only: ClassVar[bool] = False
    evicts: ClassVar[bool] = False  # the context, once: it may stand on the left of STATIC|DYNAMIC
    selects: ClassVar[bool] = False  # at every step: it may stand on the right

    @abstractmethod
    def plan(self, context: int, shape: ModelShape) -> Plan:
        """The integers for a context of so many tokens. Raises PolicyError."""

    def as_selector(self) -> Policy:
        """As it runs behind another's eviction: it evicts nothing. Raises PolicyError."""
        return self

    @property
    def in_the_clear(self) -> bool:
        """Whether it runs in plaintext alone."""
        return self.plain_only

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Policy:
        """This policy, its budget options set so that in no layer a query attends to more than `tokens`
        of `context` tokens, and to fewer by less than one cluster, where it has any. Other options stay.
        Raises PolicyError when it cannot attend to so few.
        """
        raise PolicyError(f"policy {self.spec}: its options cannot be set to a budget of tokens")

    def at_percent(self, percent: float, context: int, shape: ModelShape) -> Policy:
        """At a budget of so many percent of the context, rounded down to whole tokens, at least one; 100:
        this policy as it is. Raises PolicyError."""
        if percent >= FULL_PERCENT:
            return self
        return self.at_budget(max(1, int(context * percent // FULL_PERCENT)), context, shape)

    def selector_at_budget(self, tokens: int, context: int, shape: ModelShape) -> Policy:
        """`at_budget` by choosing alone: on the right of |, where it evicts nothing. Raises PolicyError."""
        return self.at_budget(tokens, context, shape)

    def too_few(self, tokens: int, least: int, why: str) -> PolicyError:
        return PolicyError(
            f"policy {self.name}: cannot attend to {tokens} tokens or fewer; it needs {least} or more: {why}"
        )

    def bind(self, context: int, shape: ModelShape) -> BoundPolicy:
        return BoundPolicy(self, self.plan(context, shape))

    @property
    def leak(self) -> str:
        """The leak class with these options (`leaks`: with the default ones)."""
        return self.leaks

    @property
    def plan_is_public(self) -> bool:
        """Whether the plan follows from public sizes. If not, `plan` gives the largest one, the owner of
        the document `count_from_document`s and announces counts, and all go on with `with_counts` (leak class `count`)."""
        return True

    def count_from_document(self, prefill: Prefill, kernels: Backend) -> list[int]:
        """Server, plaintext: a number for each layer, by the document."""
        return []

    def with_counts(self, counts: Sequence[int]) -> Policy:
        """The policy with announced counts: decided. They are checked by `plan`, as any option is."""
        return self

    def window(self, context: int) -> int:
        """How many of the context's last queries `evict` and `remember` look at."""
        return 0

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        """Server, plaintext: positions that stay, ascending: (kept,), or (KV, kept) by head."""
        return torch.arange(plan.context)

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Any]:
        """What the policy keeps of a layer beside k and v (`LayerCache.memory`). known: at the server."""
        return local(None)

    def fill(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int,
        prefill: Prefill | None, kernels: Backend | None,
    ) -> Program[LayerCache]:  # fmt: skip
        """The evicted context of one layer becomes its cache. `prefill`: at the document's owner."""
        n, kv, d = plan.layers[index].kept, shape.kv_heads, shape.head_dim
        known = k = v = None
        if prefill is not None and kernels is not None:
            rows = self.evict(prefill, index, plan, kernels)
            k, v = (take(t[index], rows) for t in (prefill.k, prefill.v))
            known = PlaintextContext(prefill, kernels, rows, k)
        k, v, memory = yield from together(
            ops.prepare(ops.secret(k, (kv, n, d), Rank.SERVER)),
            ops.prepare(ops.secret(v, (kv, n, d), Rank.SERVER), V_RING),
            self.remember(ops, shape, plan, index, known),
        )
        return LayerCache(k, v, memory)

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        """q (KV, rows, d), scaled, over the layer's cache -> (KV, rows, d)."""
        ops, layer = view.ops, view.layer
        scores = yield from at("scores", ops.scores(q, layer.k))
        e, total = yield from at("softmax", ops.softmax(scores, view.visible(view.tokens)))
        out, _ = yield from average(view, local(e), total)
        return out

    def observe(self, view: LayerView) -> Program[None]:
        """After attention, beside the rest of the layer: remember, evict, form clusters."""
        return local(None)

    @property
    def spec(self) -> str:
        """The policy as the user would write it, options that differ from the default only."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        changed = ",".join(f"{name}={written(value)}" for name, value in options.items())
        return f"{self.name}:{changed}" if changed else self.name

    def fail(self, option: str, allowed: str) -> PolicyError:
        value = written(getattr(self, option))
        return PolicyError(f"policy {self.name}: {option}={value} is out of range; allowed: {allowed}")

    def count(self, option: str, whole: int, what: str, budget: Budget | None = None) -> int:
        """A budget option as a whole number, 1 to `whole`. Raises PolicyError."""
        budget = getattr(self, option) if budget is None else budget
        n = tokens_of(budget, whole)
        if not 1 <= n <= whole or not 0 < budget <= (1 if isinstance(budget, float) else whole):
            raise self.fail(option, f"1 to {whole}, {what}, or a ratio above 0.0 and up to 1.0")
        return n

    def per_layer(self, option: str, whole: int, layers: int) -> list[int]:
        """A budget option for each layer. Raises PolicyError."""
        budgets: Budgets = getattr(self, option)
        if not isinstance(budgets, tuple):
            budgets = (budgets,) * layers
        if len(budgets) != layers:
            raise self.fail(option, f"one number, or one for each of the {layers} layers")
        return [self.count(option, whole, "the context", budget) for budget in budgets]


def average(view: LayerView, weights: Program[Value], total: Value) -> Program[tuple[Value, Value]]:
    """Softmax's deferred division: weights (KV, rows, n) over the cached values, by total (KV, rows, 1)
    -> (KV, rows, d), and 1 / total. What the weights still cost runs beside the reciprocal."""
    ops = view.ops

    def weighted() -> Program[Value]:
        w = yield from weights
        return (yield from at("attend", ops.weighted_sum(w, view.layer.v)))

    out, inverse = yield from together(weighted(), at("attend/inverse", ops.reciprocal(total)))
    return (yield from at("attend", ops.mul(out, inverse))), inverse


@dataclass(frozen=True)
class PlaintextContext:
    """What the server knows of a layer that it fills. rows: as `evict` says.  k: (KV, kept, d)."""

    prefill: Prefill
    kernels: Backend
    rows: torch.Tensor
    k: torch.Tensor


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x (KV, T, ...) at rows (n,) or (KV, n): (KV, n, ...)."""
    if rows.dim() == 1:
        return x[:, rows]
    return torch.stack([head[mine] for head, mine in zip(x, rows, strict=True)])


def by_head(prefill: Prefill, layer: int, kernels: Backend) -> torch.Tensor:
    """What the window's queries pay to each token, per KV head, mean over its group: (KV, T)."""
    q, k = prefill.q_window[layer], prefill.k[layer]
    heads = zip(q.chunk(len(k)), k.split(1), strict=True)
    return torch.stack([kernels.window_importance(*pair, prefill.first_position) for pair in heads])


def written(value: Any) -> str:
    """An option's value as `parse` reads it."""
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class BoundPolicy:
    """A policy with its plan, as the decode program calls it."""

    policy: Policy
    plan: Plan

    def check(self, protocol: str) -> None:
        """Raises PolicyError for a policy that cannot run under a protocol: plain, stock or fast."""
        if self.policy.in_the_clear and protocol != "plain":
            spec = self.policy.spec
            raise PolicyError(f"policy {spec}: runs in plaintext only, not with protocol {protocol}")

    def priced(self) -> BoundPolicy:
        """Itself, if public sizes tell what it costs. Raises PolicyError."""
        if not self.policy.plan_is_public:
            raise PolicyError(
                f"policy {self.policy.spec}: the document decides what stays; to price it, give the counts "
                f"of a run for each of the {len(self.plan.layers)} layers, as in n_keep=512/256/..."
            )
        return self

    def fill(
        self, ops: Ops, shape: ModelShape, index: int, prefill: Prefill | None, kernels: Backend | None
    ) -> Program[LayerCache]:
        return (yield from self.policy.fill(ops, shape, self.plan, index, prefill, kernels))

    def view(
        self, ops: Ops, shape: ModelShape, cache: Cache, index: int, positions: torch.Tensor
    ) -> LayerView:
        return LayerView(ops, shape, self.plan, cache, index, positions)
