"""tokenselect: the heads of a layer vote for tokens, which all of them attend to (TokenSelect).

A head's vote for a token is its softmax weight; the tokens with the largest sums over the heads are
attended to beside the first and the last ones.

Differs from the paper: scores are divided by sqrt d before they vote, which the published code forgets. The
paper keeps a choice while a query is near to the one that made it (cosine of 0.9), which reveals a bit in
each step; here `refresh` steps share a choice, by counting. The vote takes as many exponentials as
attending to everything does, so that nothing is saved on shares; `vote=linear` adds scores in place of
weights and takes none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.policy.choosing import Choosing
from mpcache.policy.plan import Budget, Plan, setting

VOTES = ("softmax", "linear")


@dataclass(frozen=True)
class TokenSelect(Choosing):
    """Options of tokenselect."""

    name = "tokenselect"
    source = "TokenSelect, arXiv 2411.02886"
    needs = "the whole cache; softmax over all of it, to vote; an oblivious top-k of single tokens per layer"
    example = "tokenselect:k=64,vote=linear"
    scope = "layer"

    k: Budget = setting(
        0.2,
        "tokens that are chosen, the same for all heads of a layer",
        "1 to the context, or a ratio up to 1.0",
    )
    sink: int = setting(4, "first tokens, which always attend", "0 or more")
    recent: int = setting(16, "last tokens, which always attend", "0 or more")
    vote: str = setting("softmax", "what is summed: softmax's weights, or scores", "softmax, linear")
    refresh: int = setting(1, "steps that use one choice", "1 or more")

    @property
    def by_attention(self) -> bool:  # type: ignore[override]
        return self.vote == "softmax"

    @property
    def steps(self) -> int:
        return self.refresh

    def limit(self, shape: ModelShape) -> int:
        return 1 << shape.heads.bit_length() if self.by_attention else 512

    def heads_summed(self, shape: ModelShape) -> int:
        return 1 if self.by_attention else shape.heads

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.vote not in VOTES:
            raise self.fail("vote", ", ".join(VOTES))
        for name, least in (("sink", 0), ("recent", 0), ("refresh", 1)):
            if getattr(self, name) < least:
                raise self.fail(name, f"{least} or more")
        keep = self.count("k", context, "the context")
        return self.item_plan(context, range(shape.layers), 1, self.sink, self.recent, keep, dense=False)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> TokenSelect:
        """Let first and last tokens take a quarter of the budget each, at most."""
        sink, recent = min(self.sink, tokens // 4), min(self.recent, tokens // 4)
        return replace(self, sink=sink, recent=recent, k=tokens - sink - recent)
