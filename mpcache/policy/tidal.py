"""tidal: a few layers choose tokens for the layers behind them (TidalDecode, arXiv 2410.05076).

Layers 0 and 1 attend to everything. So do the layers that choose, layer 2 and one correction layer on the
way, each head by its own scores; the other layers attend to the tokens which the last such layer before
them chose, each head to its own. Every step chooses anew.

Differs from the paper in one way: a step's own tokens always attend and are not counted among the k. At a
budget of tokens no layer may attend to everything (`dense=false`): a layer that chooses attends to its
choice, and layers 0 and 1 choose for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.policy.choosing import Choosing, followers
from mpcache.policy.layer_lists import LAYERS_ALLOWED, listed_layers
from mpcache.policy.plan import Budget, Plan, setting

CORRECTION = 13 / 32  # of the depth, as published for 32 layers


@dataclass(frozen=True)
class Tidal(Choosing):
    """Options of tidal."""

    name = "tidal"
    source = "TidalDecode, arXiv 2410.05076"
    needs = "the whole cache; two oblivious top-k of single tokens per head and step"
    example = "tidal:k=64,choose=2-4"

    k: Budget = setting(0.2, "tokens that a head attends to", "1 to the context, or a ratio up to 1.0")
    full: int = setting(2, "layers, from 0, that attend to everything", "0 or more")
    choose: str = setting(
        "auto", "layers that choose; auto: the first behind the full ones and one at 13/32 of the depth",
        LAYERS_ALLOWED,
    )  # fmt: skip
    recent: int = setting(0, "last tokens that always attend, beside a step's own", "0 or more")
    dense: bool = setting(True, "layers that choose attend to everything, as published", "true, false")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.full < 0:
            raise self.fail("full", "0 or more")
        if self.recent < 0:
            raise self.fail("recent", "0 or more")
        auto = {self.full, round(CORRECTION * shape.layers)}
        choosers = listed_layers(self, "choose", auto, self.full, shape.layers)
        keep = self.count("k", context, "the context")
        leaders = followers(shape.layers, choosers, self.full, self.dense)
        return self.item_plan(context, leaders, 1, 0, self.recent, keep, self.dense)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Tidal:
        if tokens <= self.recent:
            raise self.too_few(tokens, self.recent + 1, "the recent ones and a chosen one")
        return replace(self, k=tokens - self.recent, dense=False)
