"""hip: tokens found by halving, a chunk standing for its middle token at each level (HiP Attention).

The context is cut into k chunks, and each is scored by the key of its middle token. The best k are kept and
halved, and so on, until chunks are blocks of a few tokens. The scores of all tokens are there already, so
that a level is one oblivious top-k of at most 2 k scores: 2 k^2 comparisons, where ranking all n tokens at
once takes n^2 / 2.

Differs from the paper: each head's single query chooses, not a block of 64 queries together. What does not
fill a chunk of the first level always attends. A choice is renewed after `refresh` steps, by counting. At a
budget of tokens no layer attends to everything: the first ones choose as the others do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.ops import Value
from mpcache.policy.choosing import Choosing, ItemPlan
from mpcache.policy.clusters import Choice, Pick, item_size, join_picks
from mpcache.policy.layer_view import LayerView
from mpcache.policy.plan import Budget, Plan, setting
from mpcache.runtime.program import Program, at

BLOCK = 2  # tokens per chunk at the last level, up to 767 tokens


@dataclass(frozen=True)
class HiP(Choosing):
    """Options of hip."""

    name = "hip"
    source = "HiP Attention, arXiv 2406.09827; InfiniteHiP, arXiv 2502.08910"
    needs = "the whole cache; a few small oblivious top-k, one after another, per head, layer and step"
    example = "hip:k=64,block=4"

    k: Budget = setting(0.2, "tokens that are chosen", "1 to the context, or a ratio up to 1.0")
    block: int = setting(
        0, "tokens per chunk at the last level; 0: 2, or as many as leave about 256", "0 or more"
    )
    first: int = setting(
        0,
        "blocks per chunk at the first level; 0: as leaves k to 2 k chunks",
        "0, or a power of two",
    )
    sink: int = setting(4, "first tokens, which always attend", "0 or more")
    recent: int = setting(16, "last tokens, which always attend", "0 or more")
    full: int = setting(3, "layers, from 0, that attend to everything", "0 or more")
    refresh: int = setting(1, "steps that use one choice", "1 or more")

    @property
    def steps(self) -> int:
        return self.refresh

    def items_of(self, tokens: int, size: int, keep: int) -> int:
        """Return how many blocks fill the chunks of the first level: `keep` of them, or up to twice that."""
        blocks = max(0, tokens) // size
        return blocks // self.halves(blocks, keep) * self.halves(blocks, keep)

    def halves(self, blocks: int, keep: int) -> int:
        """Return how many blocks make a chunk of the first level: a power of two."""
        return self.first or 1 << max(0, (blocks // keep).bit_length() - 1)

    def plan(self, context: int, shape: ModelShape) -> Plan:
        for name, least in (("block", 0), ("sink", 0), ("recent", 0), ("refresh", 1)):
            if getattr(self, name) < least:
                raise self.fail(name, f"{least} or more")
        if self.first < 0 or self.first & (self.first - 1):
            raise self.fail("first", "0, or a power of two")
        if self.full < 0:
            raise self.fail("full", "0 or more")
        block = item_size(self.block, BLOCK, context)
        keep = max(1, self.count("k", context, "the context") // block)
        leaders = [i if i >= self.full else None for i in range(shape.layers)]
        return self.item_plan(context, leaders, block, self.sink, self.recent, keep, dense=False)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> HiP:
        """Choose as many blocks as there is room for, and fill up with recent tokens.

        So many are recent that no token is left between them and the chunks of the first level.
        """
        if tokens >= context:
            return replace(self, k=context, full=0)
        block = item_size(self.block, BLOCK, context)
        sink, recent = min(self.sink, tokens // 4), min(self.recent, tokens // 4)
        left_out = -(-(context - tokens) // block)  # blocks
        most = (tokens - sink - recent) // block
        if most < 1:
            raise self.too_few(tokens, 2 * block, "a block, first tokens and recent ones")
        # Of about as many blocks the number that halves most often: fewest comparisons.
        found: list[tuple[int, int]] = []
        for keep in range(max(1, most // 2), most + 1):
            blocks = keep + left_out
            found.append((min(blocks & -blocks, replace(self, first=0).halves(blocks, keep)), keep))
        first, keep = max(found)
        recent = context - sink - (keep + left_out) * block
        return replace(self, full=0, sink=sink, recent=recent, k=keep * block, first=first)

    def pick(self, view: LayerView, plan: ItemPlan, looked: Value) -> Program[Choice]:
        ops, (*rows, items, size) = view.ops, looked.shape
        chunk, picks = self.halves(items, plan.keep), []
        while True:
            n = looked.shape[-2] * looked.shape[-1] // (chunk * size)
            looked = looked.reshape(*rows, n, chunk * size)
            if n > plan.keep:
                middle = looked[..., chunk * size // 2]
                selection, (looked,) = yield from at(f"select/{chunk}", ops.topk(middle, plan.keep, [looked]))
                picks.append(Pick(selection, plan.keep, n))
            if chunk == 1:
                break
            chunk //= 2
        return (yield from at("select/prepare", join_picks(picks, items)))
