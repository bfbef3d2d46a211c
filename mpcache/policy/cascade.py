"""cascade: tiers of tokens, each of which takes every second one that the one before drops (Cascading KV).

Behind the first tokens the last ones fill a tier. What it drops comes to the next tier, which keeps every
second arrival, and so on: the further back, the sparser. An arrival that is not kept duels with the newest
token of the tier, and the one with the higher average of attention takes its place. Which places change is
public and follows from counting; who wins is secret: one comparison for each KV head, and the winner's key
and value are masked anew. A step has one duel at most, because what duels drops nothing further.

Differs from the paper: positions stay those of the text, not those in the cache. The document's duels are
decided by the averages at its end, not by those at the time. Tokens of a question do not duel among
themselves: each second one is dropped. `duel=false` drops every second arrival without a comparison, by
position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Operand, Ops, Value
from mpcache.policy.averages import average
from mpcache.policy.base import Policy
from mpcache.policy.layer_view import LayerView, PlaintextContext
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting, tokens_of
from mpcache.protocols.ranges import WEIGHTED_SUM_RING
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, local, together
from mpcache_kernels import Backend

Winner = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of two tokens, by KV head
FORGOTTEN = 100  # a token's attention counts a hundredth after as many tokens as there are places


@dataclass
class Tiers:
    """How many tokens each tier may hold, holds, and has seen arrive; behind `sink` first tokens."""

    sink: int
    places: list[int]
    held: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.held = self.held or [0] * len(self.places)
        self.arrived = self.arrived or [0] * len(self.places)

    def take(self) -> tuple[int, bool] | None:
        """Take one more token in. Return the place that goes, and whether it duels with the one before it.

        Tokens stand from the last tier to the first, so that what passes to another tier does not move.
        """
        self.held[0] += 1
        for i, most in enumerate(self.places):
            if self.held[i] <= most:
                return None
            place = self.sink + sum(self.held[i + 1 :])
            self.held[i] -= 1
            if i + 1 == len(self.places):
                return place, False
            self.arrived[i + 1] += 1
            if self.arrived[i + 1] % 2 == 0:
                return place, self.held[i + 1] > 0
            self.held[i + 1] += 1
        raise AssertionError("the last tier drops what it cannot hold")


@dataclass
class Cascaded:
    """A layer's tiers. importance: averages of attention, secret (KV, n).  weights, inverse: a step's."""

    tiers: Tiers
    importance: Value
    weights: Value | None = None
    inverse: Value | None = None


@dataclass(frozen=True)
class Cascade(Policy):
    """Options of cascade."""

    name = "cascade"
    source = "Cascading KV Cache, arXiv 2406.17808"
    needs = "the context's last queries; one comparison per KV head and step"
    evicts = True
    packs = False  # it goes on with averages of the context's attention
    skips_padding = False  # it would take places
    example = "cascade:places=256,tiers=4"

    places: Budget = setting(0.2, "tokens in all tiers", "1 to the context, or a ratio up to 1.0")
    tiers: int = setting(4, "how many, of equal size", "1 or more")
    sink: int = setting(4, "first tokens, which stay", "0 or more")
    duel: bool = setting(True, "let attention decide which of two neighbours stays", "true, false")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.tiers < 1:
            raise self.fail("tiers", "1 or more")
        if self.sink < 0:
            raise self.fail("sink", "0 or more")
        kept = len(self._kept(context, lambda coming, there: there))
        return Plan(context, (LayerPlan(kept, kept, 0),) * shape.layers)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Cascade:
        """Take as many tiers as the context fills."""
        if tokens <= self.sink:
            raise self.too_few(tokens, self.sink + 1, "the first ones and another one")
        for tiers in range(self.tiers, 0, -1):
            found = replace(self, places=tokens - self.sink, tiers=tiers)
            if found.plan(context, shape).kept == min(tokens, context):
                return found
        raise AssertionError("one tier is a window, which any context fills")

    def start(self, context: int) -> Tiers:
        """Return empty tiers for a context of so many tokens."""
        places = self.count("places", context, "the context")
        least, more = divmod(places, self.tiers)
        sizes = [least + (i < more) for i in range(self.tiers)]
        return Tiers(min(self.sink, context), [size for size in sizes if size])

    def _kept(self, context: int, winner: Winner, tiers: Tiers | None = None) -> list[torch.Tensor]:
        """Let a context's tokens come one after another; return which of them are left, by KV head (KV,)."""
        tiers = tiers or self.start(context)
        rows = [torch.tensor([t]) for t in range(tiers.sink)]
        for t in range(tiers.sink, context):
            rows.append(torch.tensor([t]))
            gone = tiers.take()
            if gone is not None:
                place, duels = gone
                if duels and self.duel:
                    rows[place - 1] = winner(rows[place], rows[place - 1])
                del rows[place]
        return rows

    # ------------------------------------------------------------------ the document's owner, in plaintext

    @staticmethod
    def fading(places: int) -> float:
        """Return how much of an average is left after one more token."""
        return math.exp(-math.log(FORGOTTEN) / places)

    def window(self, context: int) -> int:
        return min(context, tokens_of(self.places, context)) if self.duel else 0

    def paid(self, prefill: Prefill, layer: int) -> torch.Tensor:
        """Average what the last queries pay each token, by the mean of a KV head's group: (KV, T)."""
        q, k = prefill.q_window[layer], prefill.k[layer]
        kv, n = k.shape[:2]
        beta = self.fading(self.count("places", n, "the context"))
        w = q.shape[1]
        rows = torch.arange(n - w, n, device=k.device)
        scores = q.reshape(kv, -1, w, q.shape[2]) @ k[:, None].transpose(-1, -2)
        attention = scores.masked_fill(torch.arange(n, device=k.device) > rows[:, None], -torch.inf).softmax(
            -1
        )
        fade = (1 - beta) * beta ** torch.arange(w - 1, -1, -1, device=k.device, dtype=torch.float32)
        return (attention.mean(1) * fade[:, None]).sum(1)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        k = prefill.k[layer]
        paid = self.paid(prefill, layer) if self.duel else torch.zeros(k.shape[:2], device=k.device)

        def winner(coming: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
            coming, there = (x.to(k.device).expand(len(k)) for x in (coming, there))
            worth = [paid.gather(1, x[:, None])[:, 0] for x in (coming, there)]
            return torch.where(worth[0] >= worth[1], coming, there)

        rows = self._kept(plan.context, winner)
        return torch.stack([x.to(k.device).expand(len(k)) for x in rows], 1)

    # ------------------------------------------------------------------------------ all parties, on shares

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Cascaded]:
        tiers, size = self.start(plan.context), (shape.kv_heads, plan.layers[index].kept)
        self._kept(plan.context, lambda coming, there: there, tiers)
        worth = None
        if known is not None:
            worth = torch.zeros(size)
            if self.duel:
                assert known.prefill is not None, "no document is packed for cascade"
                worth = self.paid(known.prefill, index).gather(1, known.rows)
        return local(Cascaded(tiers, ops.secret(worth, size, Rank.SERVER)))

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        ops, mine = view.ops, view.layer.memory
        scores = yield from at("scores", ops.scores(q, view.layer.k))
        e, total = yield from at("softmax", ops.softmax(scores, view.visible(view.tokens)))
        out, inverse = yield from average(view, local(e), total)
        mine.weights, mine.inverse = e, inverse
        return out

    def observe(self, view: LayerView) -> Program[None]:
        """Bring averages up to date, and let the step's tokens in."""
        mine = view.layer.memory
        if self.duel:
            mine.importance = yield from self._averaged(view, mine)
        mine.weights = mine.inverse = None
        for _ in range(view.m):
            gone = mine.tiers.take()
            if gone is not None:
                place, duels = gone
                if duels and self.duel and view.m == 1:
                    yield from at("duel", self._fight(view, mine, place))
                else:
                    self._replace(view, mine, place, place + 1, [], [], [])

    def _averaged(self, view: LayerView, mine: Cascaded) -> Program[Value]:
        """Fade the averages, and add this step's attention."""
        ops, m, g = view.ops, view.m, view.shape.group
        assert mine.weights is not None and mine.inverse is not None
        paid = yield from at("attention", ops.mul(mine.weights, mine.inverse))
        paid = yield from at("attention", ops.rescale(paid))  # (KV, m g, n)
        beta = self.fading(sum(mine.tiers.places))
        kv, new = paid.shape[0], ops.scale(paid[:, 0, :m], 0.0)
        faded = ops.cat([ops.scale(mine.importance, beta**m), new], -1)
        for t in range(m):
            rows = paid[:, t * g : (t + 1) * g].sum(1)
            faded = faded + ops.scale(rows, (1 - beta) * beta ** (m - 1 - t) / g)
        return (yield from at("attention", ops.rescale(faded.reshape(kv, view.tokens))))

    def _fight(self, view: LayerView, mine: Cascaded, place: int) -> Program[None]:
        """Let the token at a place duel with the one before it: the winner stands where that one stood."""
        ops, layer = view.ops, view.layer
        pair = [place, place - 1]  # of equal ones the coming one wins
        k, v = ops.value(layer.k[:, pair]), ops.value(layer.v[:, pair])
        worth = mine.importance[:, pair]
        rows = ops.cat([k, v, worth.reshape(*worth.shape, 1)], -1)
        _, (won,) = yield from ops.topk(worth, 1, [rows], 2)
        d = view.shape.head_dim
        new_k, new_v, kept = yield from together(
            ops.prepare(won[..., :d]),
            ops.prepare(won[..., d : 2 * d], WEIGHTED_SUM_RING),
            ops.rescale(won[..., 2 * d]),
        )
        self._replace(view, mine, place - 1, place + 1, [new_k], [new_v], [kept])

    def _replace(
        self, view: LayerView, mine: Cascaded, first: int, end: int,
        k: list[Operand], v: list[Operand], worth: list[Value],
    ) -> None:  # fmt: skip
        """Put rows in the place of those from `first` to `end`."""
        ops, layer = view.ops, view.layer
        layer.k = ops.cat_operands([layer.k[:, :first], *k, layer.k[:, end:]], 1)
        layer.v = ops.cat_operands([layer.v[:, :first], *v, layer.v[:, end:]], 1)
        if self.duel:
            mine.importance = ops.cat([mine.importance[:, :first], *worth, mine.importance[:, end:]], -1)
