"""What a KV-cache policy is: a plan from public sizes, and how it evicts, selects and remembers.

A policy is a frozen dataclass of options. `plan` turns them into public integers for one context length
and model, once; everything after that uses the integers. The methods of `Policy` stand by who runs them:

* public, anybody: `plan`, `bind`, `spec`, `leak`, budgets and errors;
* the document's owner, in plaintext: `window`, `count_from_document`, `evict`;
* all parties, on values that may be shares: `remember`, `fill`, `attend`, `observe`. `observe` runs beside
  the rest of the layer, where its rounds cost nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar

import torch

from mpcache.cache import Cache, LayerCache, SplitLayer, join_heads, take_heads
from mpcache.errors import PolicyError
from mpcache.model import Model, ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Ops, Value, as_tensor, as_value
from mpcache.policy.averages import attend_split, average
from mpcache.policy.layer_view import (
    Kept,
    LayerView,
    OwnersContext,
    PackedContext,
    PlaintextContext,
    part_shape,
    take,
)
from mpcache.policy.plan import (
    FULL_PERCENT,
    Budget,
    Budgets,
    LeakClass,
    Plan,
    SharedEviction,
    SplitPlan,
    tokens_of,
    written,
)
from mpcache.protocols.ranges import WEIGHTED_SUM_RING
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, local, together
from mpcache_kernels import Backend


@dataclass(frozen=True)
class Policy(ABC):
    """One eviction policy with its options."""

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str]  # what it computes on, in a few words
    leaks: ClassVar[LeakClass] = LeakClass.NONE
    may_leak: ClassVar[str] = ""  # what it leaks with which option, if that differs
    example: ClassVar[str] = ""  # how it is written, with options
    plain_only: ClassVar[bool] = False
    skips_padding: ClassVar[bool] = True  # tokens that nothing attends to leave its choice as it is
    evicts: ClassVar[bool] = False  # the context, once: it may stand on the left of STATIC|DYNAMIC
    selects: ClassVar[bool] = False  # at every step: it may stand on the right
    attends_to_all: ClassVar[bool] = False  # that is left: on the right a budget is the left one's
    packs: ClassVar[bool] = True  # what stays of a document is all that a session needs of it
    fixed: ClassVar[frozenset[str]] = frozenset()  # options of a parent's that are what they are

    # ------------------------------------------------------------------------------------- public, anybody

    @abstractmethod
    def plan(self, context: int, shape: ModelShape) -> Plan:
        """Plan for a context of so many tokens. Raises PolicyError."""

    def bind(self, context: int, shape: ModelShape) -> BoundPolicy:
        return BoundPolicy(self, self.plan(context, shape))

    @classmethod
    def options(cls) -> dict[str, Field[Any]]:
        """Return what a user may set, by name."""
        return {f.name: f for f in fields(cls) if f.name not in cls.fixed}

    @property
    def spec(self) -> str:
        """The policy as the user would write it, options that differ from the default only."""
        options = ((name, getattr(self, name), f.default) for name, f in self.options().items())
        changed = ",".join(f"{name}={written(value)}" for name, value, usual in options if value != usual)
        return f"{self.name}:{changed}" if changed else self.name

    @property
    def leak(self) -> str:
        """The leak class with these options (`leaks`: with the default ones)."""
        return self.leaks

    @property
    def in_the_clear(self) -> bool:
        """Whether it runs in plaintext alone."""
        return self.plain_only

    @property
    def can_pack(self) -> bool:
        """Whether what stays of a document is all that a session needs of it."""
        return self.packs and not self.in_the_clear

    @property
    def plan_is_public(self) -> bool:
        """Whether the plan follows from public sizes.

        If not, `plan` gives the largest one, the document's owner announces what `count_from_document` finds,
        and all go on with `with_counts` (leak class `count`).
        """
        return True

    no_shares: ClassVar[str] = "its rule needs the document in plaintext"

    def on_shares(self, tokens: int, shape: ModelShape) -> SharedEviction | None:
        """Say how the policy evicts a document that is held in shares; None: it keeps all of it.

        Raises PolicyError where it cannot.
        """
        raise PolicyError(f"policy {self.spec}: cannot evict a document on shares: {self.no_shares}")

    def heads_summed(self, shape: ModelShape) -> int:
        """Return how many heads' scores are added before tokens are ranked by them."""
        return 1

    @property
    def largest_bias(self) -> float:
        """The size that the biases of kept keys stay within; 0: there are none."""
        return 0.0

    def priced(self, context: int, shape: ModelShape) -> Plan:
        """Plan for a price, from public sizes alone. Raises PolicyError where they do not tell it."""
        plan = self.plan(context, shape)
        if not self.plan_is_public:
            raise PolicyError(
                f"policy {self.spec}: the document decides what stays; to price it, give the counts "
                f"of a run for each of the {len(plan.layers)} layers, as in n_keep=512/256/..."
            )
        return plan

    def with_counts(self, counts: Sequence[int]) -> Policy:
        """Take announced counts as options, which `plan` checks: the plan is public then."""
        return self

    @property
    def counts_given(self) -> tuple[int, ...]:
        """What `with_counts` took; nothing where it was not called."""
        return ()

    def as_selector(self) -> Policy:
        """Return the policy as it runs behind another's eviction: it evicts nothing. Raises PolicyError."""
        return self

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Policy:
        """Set the budget options to so many tokens. Other options stay.

        In no layer a query attends to more than `tokens` of `context` tokens, and to fewer by less than one
        cluster, where there are any. Raises PolicyError when the policy cannot attend to so few.
        """
        raise PolicyError(f"policy {self.spec}: its options cannot be set to a budget of tokens")

    def at_percent(self, percent: float, context: int, shape: ModelShape) -> Policy:
        """Set the budget to so many percent of the context; 100 changes nothing. Raises PolicyError.

        The budget is rounded down to whole tokens, at least one.
        """
        if percent >= FULL_PERCENT:
            return self
        return self.at_budget(max(1, int(context * percent // FULL_PERCENT)), context, shape)

    def selector_at_budget(self, tokens: int, context: int, shape: ModelShape) -> Policy:
        """Set the budget by choosing alone, on the right of |. Raises PolicyError."""
        return self.at_budget(tokens, context, shape)

    def selector_at_share(self, share: float) -> Policy:
        """Choose a share of what each head keeps, on the right of |. Raises PolicyError."""
        raise PolicyError(f"policy {self.spec}: its options cannot be set to a share of a head's tokens")

    def mean_kept(self, context: int) -> int | None:
        """Return the tokens that stay in the mean over all heads, where that alone is public."""
        return None

    def too_few(self, tokens: int, least: int, why: str) -> PolicyError:
        return PolicyError(
            f"policy {self.name}: cannot attend to {tokens} tokens or fewer; it needs {least} or more: {why}"
        )

    def fail(self, option: str, allowed: str) -> PolicyError:
        value = written(getattr(self, option))
        return PolicyError(f"policy {self.name}: {option}={value} is out of range; allowed: {allowed}")

    def count(self, option: str, whole: int, what: str, budget: Budget | None = None) -> int:
        """Turn a budget option into a whole number, 1 to `whole`. Raises PolicyError."""
        budget = getattr(self, option) if budget is None else budget
        n = tokens_of(budget, whole)
        if not 1 <= n <= whole or not 0 < budget <= (1 if isinstance(budget, float) else whole):
            raise self.fail(option, f"1 to {whole}, {what}, or a ratio above 0.0 and up to 1.0")
        return n

    def per_layer(self, option: str, whole: int, layers: int) -> list[int]:
        """Turn a budget option into a whole number for each layer. Raises PolicyError."""
        budgets: Budgets = getattr(self, option)
        if not isinstance(budgets, tuple):
            budgets = (budgets,) * layers
        if len(budgets) != layers:
            raise self.fail(option, f"one number, or one for each of the {layers} layers")
        return [self.count(option, whole, "the context", budget) for budget in budgets]

    # ------------------------------------------------------------------ the document's owner, in plaintext

    def window(self, context: int) -> int:
        """Say how many of the context's last queries `evict` and `remember` look at."""
        return 0

    def count_from_model(self, model: Model, context: int) -> list[int]:
        """Count what stays, by the model and the context's length alone. Nothing, where those do not decide.

        Raises PolicyError.
        """
        return []

    def count_from_document(self, prefill: Prefill, kernels: Backend) -> list[int]:
        """Count what stays in each layer, by the document."""
        return []

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        """Evict, and say what the cache of each part of the layer begins with."""
        rows = self.evict(prefill, layer, plan, kernels)
        return [Kept(rows, *(take(t[layer], rows) for t in (prefill.k, prefill.v)))]

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        """Choose the positions that stay, ascending: (kept,), or (KV, kept) by head."""
        return torch.arange(plan.context)

    # ------------------------------------------------------------------------------ all parties, on shares

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Any]:
        """Keep what the policy needs of a layer beside k and v (`LayerCache.memory`). known: at the owner."""
        return local(None)

    def fill(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int,
        context: OwnersContext | None, kernels: Backend | None,
    ) -> Program[LayerCache | SplitLayer]:  # fmt: skip
        """Make one layer's cache of the evicted context. context, kernels: at the document's owner."""
        mine = plan.layers[index]
        known = self._known(context, plan, index, kernels)
        if not isinstance(mine, SplitPlan):
            return (yield from self._fill(ops, shape, plan, index, known[0]))
        fills = []
        for part, heads, of in zip(mine.parts, mine.heads, known, strict=True):
            small = part_shape(shape, len(heads))
            fills.append(self._fill(ops, small, replace(plan, layers=(part,)), 0, of))
        return SplitLayer(mine.heads, tuple((yield from together(*fills))))

    def _known(
        self, context: OwnersContext | None, plan: Plan, index: int, kernels: Backend | None
    ) -> Sequence[PlaintextContext | None]:
        """Return what is known of each part of a layer; nothing at all but the document's owner."""
        mine = plan.layers[index]
        if context is None or kernels is None:
            return [None] * (len(mine.parts) if isinstance(mine, SplitPlan) else 1)
        if isinstance(context, PackedContext):
            return [PlaintextContext(None, kernels, kept) for kept in context.layers[index]]
        return [
            PlaintextContext(context, kernels, kept) for kept in self.retain(context, index, plan, kernels)
        ]

    def _fill(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[LayerCache]:
        """Make the cache of heads that keep the same number."""
        n, kv, d = plan.layers[index].kept, shape.kv_heads, shape.head_dim
        kept = None if known is None else known.kept
        k, v = (None, None) if kept is None else (kept.k, kept.v)
        k, v, memory = yield from together(
            ops.prepare(ops.secret(k, (kv, n, d), Rank.SERVER)),
            ops.prepare(ops.secret(v, (kv, n, d), Rank.SERVER), WEIGHTED_SUM_RING),
            self.remember(ops, shape, plan, index, known),
        )
        bias = None
        if self.largest_bias:
            size = (kv, 1, n)
            bias = ops.as_scores(ops.secret(None if kept is None else kept.bias, size, Rank.SERVER))
        return LayerCache(k, v, memory, bias)

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        """Attend with q (KV, rows, d), scaled, over the layer's cache -> (KV, rows, d)."""
        ops, layer = view.ops, view.layer
        scores = view.biased((yield from at("scores", ops.scores(q, layer.k))))
        e, total = yield from at("softmax", ops.softmax(scores, view.visible(view.tokens)))
        out, _ = yield from average(view, local(e), total)
        return out

    def observe(self, view: LayerView) -> Program[None]:
        """Remember, evict, form clusters: after attention, beside the rest of the layer."""
        return local(None)


@dataclass(frozen=True)
class BoundPolicy:
    """A policy with its plan, as sessions and the decode program call it."""

    policy: Policy
    plan: Plan
    for_price: bool = False

    # ------------------------------------------------------------------------------- public, anybody

    @property
    def spec(self) -> str:
        """The policy as the user would write it."""
        return self.policy.spec

    @property
    def leak(self) -> str:
        """All that the policy reveals beyond public sizes, with its options."""
        return self.policy.leak

    @property
    def plan_is_public(self) -> bool:
        """Whether public sizes tell the plan (`Policy.plan_is_public`), or it is one for a price."""
        return self.for_price or self.policy.plan_is_public

    @property
    def window(self) -> int:
        """How many of the context's last queries the policy looks at."""
        return self.policy.window(self.plan.context)

    def check_packs(self) -> None:
        """Raise PolicyError for a policy that goes on with more of a document than what stays of it."""
        if not self.policy.can_pack:
            raise PolicyError(
                f"policy {self.spec}: weighs tokens by how the document was read, which no pack holds"
            )

    def check(self, protocol: str) -> None:
        """Raise PolicyError for a policy that cannot run under a protocol: plain, stock or fast."""
        if self.policy.in_the_clear and protocol != "plain":
            raise PolicyError(f"policy {self.spec}: runs in plaintext only, not with protocol {protocol}")

    def priced(self, shape: ModelShape) -> BoundPolicy:
        """Return this policy with the plan that its price is of. Raises PolicyError."""
        return replace(self, plan=self.policy.priced(self.plan.context, shape), for_price=True)

    def with_counts(self, counts: Sequence[int], shape: ModelShape) -> BoundPolicy:
        """Bind the policy anew, with announced counts. Raises PolicyError."""
        return self.policy.with_counts(counts).bind(self.plan.context, shape)

    # ------------------------------------------------------------- the document's owner, in plaintext

    def count_from_model(self, model: Model) -> list[int]:
        """Count what stays, where the model and the context's length decide; nothing where they do not."""
        return [] if self.plan_is_public else self.policy.count_from_model(model, self.plan.context)

    def count_from_document(self, prefill: Prefill, kernels: Backend) -> list[int]:
        """Count what stays, layer by layer, where the document decides."""
        return self.policy.count_from_document(prefill, kernels)

    def retained(self, context: OwnersContext, layer: int, kernels: Backend) -> Sequence[Kept]:
        """Return what stays of a layer's parts, as it was packed or as it is found now."""
        if isinstance(context, PackedContext):
            return context.layers[layer]
        return self.policy.retain(context, layer, self.plan, kernels)

    def largest_values(self, context: OwnersContext, kernels: Backend) -> list[float]:
        """Return the largest size of a value that stays, by layer."""
        kept = (self.retained(context, i, kernels) for i in range(len(self.plan.layers)))
        return [max(float(part.v.abs().max()) for part in parts) for parts in kept]

    # ---------------------------------------------------------------------------- on shares, all alike

    def fill(
        self, ops: Ops, shape: ModelShape, index: int, context: OwnersContext | None, kernels: Backend | None
    ) -> Program[LayerCache | SplitLayer]:
        """Make one layer's cache of the evicted context."""
        return (yield from self.policy.fill(ops, shape, self.plan, index, context, kernels))

    def view(
        self, ops: Ops, shape: ModelShape, cache: Cache, index: int, positions: torch.Tensor
    ) -> LayerView:
        """Show the policy one layer in one step."""
        return LayerView(ops, shape, self.plan, cache, index, positions)

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        """Attend as the policy does: q (KV, rows, d) -> (KV, rows, d); the parts of a layer at once."""
        layer = view.cache.layers[view.index]
        if not isinstance(layer, SplitLayer):
            return (yield from self.policy.attend(view, q))
        ops = view.ops
        if ops.kernels is not None and view.m == 1 and type(self.policy).attend is Policy.attend:
            return as_value(attend_split(ops.kernels, layer, as_tensor(q)))
        parts = zip(view.parts(), layer.heads, strict=True)
        out = yield from together(
            *(self.policy.attend(part, take_heads(ops, q, heads)) for part, heads in parts)
        )
        return join_heads(ops, out, layer.heads)

    def observe(self, view: LayerView) -> Program[None]:
        """Let the policy remember, evict and form clusters, beside the rest of the layer."""
        if isinstance(view.cache.layers[view.index], SplitLayer):
            yield from together(*map(self.policy.observe, view.parts()))
        else:
            yield from self.policy.observe(view)
