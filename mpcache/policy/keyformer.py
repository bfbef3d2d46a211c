"""keyformer: h2o, judged by a softmax with Gumbel noise and a temperature (Keyformer).

A token's worth is the sum of what all queries so far would have paid it, had its score had a random number
added and been divided by a temperature above one: dropped tokens leave the softmax too sharp, and the noise
makes up for it. The noise is public, of a seed; the temperature rises with each generated token.

Differs from the paper: the temperature rises over `length` tokens, because nobody knows how long an answer
will be, and all tokens of a question have the same one. Behind the context a kept token's noise is that of
its place in the cache: its position is secret. The second softmax takes another opening of the queries and
as many exponentials as the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Ops, Value
from mpcache.policy.evicting import Evicting, LivingPlan
from mpcache.policy.layer_view import LayerView, PlaintextContext
from mpcache.policy.plan import Budget, Plan, setting
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at
from mpcache_kernels import Backend

ROWS = 256  # queries that are judged at once
BLOCK = 256  # tokens whose noise is drawn at once


@dataclass(frozen=True)
class Keyformer(Evicting):
    """Options of keyformer."""

    name = "keyformer"
    source = "Keyformer, arXiv 2403.09054"
    needs = "all of the context's queries; a second softmax and an oblivious argmin per KV head and step"
    evicts = True
    packs = False  # it goes on with what the context's queries would have paid
    example = "keyformer:cap=256,length=64"

    cap: Budget = setting(0.6, "tokens that live, per KV head", "1 to the context, or a ratio up to 1.0")
    recent: float = setting(0.3, "share of them that lives because it is recent", "0 up to 1")
    heat: float = setting(2.0, "the temperature after `length` generated tokens; it begins at one", "1 to 16")
    length: int = setting(128, "generated tokens over which the temperature rises", "1 or more")
    seed: int = setting(0, "of the noise; public", "0 to 2^31 - 1")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if not 0 <= self.recent < 1:
            raise self.fail("recent", "0 up to 1")
        if not 1 <= self.heat <= 16:
            raise self.fail("heat", "1 to 16")
        if self.length < 1:
            raise self.fail("length", "1 or more")
        if not 0 <= self.seed < 2**31:
            raise self.fail("seed", "0 to 2^31 - 1")
        living = self.count("cap", context, "the context")
        return self.living_plan(context, shape, living, int(self.recent * living))

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Keyformer:
        return replace(self, cap=tokens)

    def window(self, context: int) -> int:
        return context

    def noise(self, layer: int, heads: int, first: int, last: int) -> torch.Tensor:
        """Draw Gumbel noise for tokens `first` to `last`: (heads, n). Each token's is its own."""
        blocks = []
        for block in range(first // BLOCK, -(-last // BLOCK)):
            generator = torch.Generator().manual_seed((self.seed * 1009 + layer) * 65537 + block)
            blocks.append(torch.rand(BLOCK, heads, generator=generator))
        begin = first // BLOCK * BLOCK
        drawn = torch.cat(blocks)[first - begin : last - begin].clamp(1e-6, 1 - 1e-6)
        return -torch.log(-torch.log(drawn)).T

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        mine = plan.layers[layer]
        assert isinstance(mine, LivingPlan)
        paid = self.paid(prefill, layer).clone()
        paid[:, plan.context - mine.recent :] = torch.inf
        return torch.sort(paid, descending=True, stable=True).indices[:, : mine.kept].sort(-1).values

    def paid(self, prefill: Prefill, layer: int) -> torch.Tensor:
        """Sum what the context's queries would pay each token, over them and a group's heads: (KV, T)."""
        note = ("keyformer", self.seed, layer)
        if note not in prefill.notes:
            q, k = prefill.q_window[layer], prefill.k[layer]
            kv, n = k.shape[:2]
            noise = self.noise(layer, kv, 0, n).to(k)[:, None, None]
            q = q.reshape(kv, -1, *q.shape[1:])  # (KV, g, T, d)
            total = torch.zeros(kv, n, device=k.device)
            for first in range(0, n, ROWS):
                rows = torch.arange(first, min(first + ROWS, n), device=k.device)
                scores = q[:, :, first : first + ROWS] @ k[:, None].transpose(-1, -2) + noise
                later = torch.arange(n, device=k.device) > rows[:, None]
                total += scores.masked_fill(later, -torch.inf).softmax(-1).sum((1, 2))
            prefill.notes[note] = total
        found: torch.Tensor = prefill.notes[note]
        return found

    def initial_importance(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Value:
        size, paid = (shape.kv_heads, plan.layers[index].kept), None
        if known is not None:
            assert known.prefill is not None, "no document is packed for keyformer"
            paid = self.paid(known.prefill, index).gather(1, known.rows)
        return ops.secret(paid, size, Rank.SERVER)

    def judged(
        self, view: LayerView, q: Value, hidden: Callable[[Value], Value]
    ) -> Program[tuple[Value, Value] | None]:
        """Judge by scores with noise, over the temperature."""
        ops, n = view.ops, view.tokens
        since = int(view.positions[-1]) + 1 - view.plan.context
        cold = 1 / (1 + (self.heat - 1) * min(1.0, since / self.length))
        cool = yield from at("judge", ops.rescale(ops.scale(q, cold)))
        scores = yield from at("judge", ops.scores(cool, view.layer.k))
        noise = self._noise_of(view) * cold
        shown = ops.as_scores(ops.secret(noise[:, None], (noise.shape[0], 1, n), Rank.SERVER))
        scores = hidden(scores + shown.expand(*scores.shape))
        e, total = yield from at("judge", ops.softmax(scores, view.visible(n)))
        return e, (yield from at("judge", ops.reciprocal(total)))

    def _noise_of(self, view: LayerView) -> torch.Tensor:
        """Return the noise (KV, n) of a layer's tokens: of those kept, by their place in the cache."""
        kv, last = view.shape.kv_heads, int(view.positions[-1]) + 1
        kept = view.plan.layers[view.index].kept
        begin = self.noise(view.index, kv, 0, kept)
        return torch.cat([begin, self.noise(view.index, kv, view.plan.context, last)], -1)

    def importance(self, view: LayerView, attention: Value, before: Value | None) -> tuple[Value, int]:
        """Sum over all queries so far and the heads of a group: at most one each."""
        paid, m = attention.sum(1), view.m
        assert before is not None, "keyformer carries importance from the context on"
        old = paid[..., :-m] + before
        most = view.shape.group * (int(view.positions[-1]) + 1)
        return view.ops.cat([old, paid[..., -m:]], -1), 1 << most.bit_length()
