"""nosa: blocks that a query finds, and blocks that a trained head keeps whatever is asked (NOSA).

The first and the last tokens always attend. Some blocks are chosen by the query, by its scores with their
mean keys. Others attend always: those of the highest importance, which a small trained head computes from a
token's values alone, c = a softplus(w v). That importance is added to the token's logits, too.

The head is read from mpcache-nosa.safetensors beside the model: `a` (layers, kv_heads) and `w` (layers,
kv_heads, head_dim). Without it (`head=untrained`, the default) a stand-in ranks blocks by the length of
their values and adds nothing to the logits: it is not NOSA, which needs a model that was trained with it.

Differs from the paper: means of whole blocks, not the largest of overlapping ones, so that ranking takes no
comparison. Which blocks attend always is decided once, for the document; blocks of questions and answers
are found by queries, and their tokens get no importance, because it would take a softplus on shares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from mpcache.errors import PolicyError
from mpcache.model import Model, ModelShape
from mpcache.model.prefill import Prefill
from mpcache.policy.fronted import Fronted
from mpcache.policy.layer_view import Kept
from mpcache.policy.plan import Budget, Plan, setting, tokens_of
from mpcache.policy.refit import LARGEST_BIAS
from mpcache_kernels import Backend

FILE = "mpcache-nosa.safetensors"  # beside a model
HEADS = ("untrained", "file")
BLOCKS_ALLOWED = "1 to the context's blocks, or a ratio up to 1.0"


@dataclass(frozen=True)
class NOSA(Fronted):
    """Options of nosa."""

    name = "nosa"
    source = "NOSA, arXiv 2510.13602"
    needs = "the whole cache; mean keys; an oblivious top-k of blocks per KV head and step; a trained head"
    example = "nosa:head=file,pages=0.1"

    score: str = "mean"
    gqa: str = "sum"
    page: int = setting(8, "tokens per block", "1 or more")
    pages: Budget = setting(0.1, "blocks that a query chooses", BLOCKS_ALLOWED)
    always: Budget = setting(
        0.1,
        "blocks that attend always, by their importance",
        BLOCKS_ALLOWED,
    )
    recent: int = setting(1, "last blocks, which always attend", "0 or more")
    head: str = setting(
        "untrained", "what gives importance: a stand-in or the trained head", "untrained, file"
    )

    def plan(self, context: int, shape: ModelShape) -> Plan:
        self.check_options()
        if self.head not in HEADS:
            raise self.fail("head", ", ".join(HEADS))
        if self.page < 1:
            raise self.fail("page", "1 or more tokens")
        if self.recent < 0:
            raise self.fail("recent", "0 or more")
        recent = self.recent * self.page
        (total,) = self.clusters_of(context, 0, recent, (self.page,))
        always = min(self.count("always", total, "the context's blocks"), total - 1) if total else 0
        keep = min(self.count("pages", total, "the context's blocks"), total - always) if total else 1
        layers = [
            self.layer_plan(i, leader, context, always * self.page, recent, (self.page,), [keep])
            for i, leader in enumerate(self.leaders(shape.layers))
        ]
        return Plan(context, tuple(layers))

    @property
    def largest_bias(self) -> float:
        return LARGEST_BIAS if self.head == "file" else 0.0

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> NOSA:
        """Let at most half of the budget's blocks attend always."""
        rest = context % self.page
        least = min(context, rest + 2 * self.page)
        if tokens < least:
            raise self.too_few(tokens, least, "a block that attends always, a chosen one and what fills none")
        blocks = (tokens - rest) // self.page
        recent = min(self.recent, blocks // 4)
        always = max(1, min(tokens_of(self.always, context // self.page - recent), (blocks - recent) // 2))
        return replace(self, recent=recent, always=always, pages=max(1, blocks - recent - always))

    def front(self, prefill: Prefill, layer: int, size: int, clusters: int) -> torch.Tensor:
        """Rank the first block before all others, and these by the sum of their tokens' importance."""
        found = self.importance(prefill, layer)[:, : clusters * size].reshape(-1, clusters, size).sum(-1)
        found[:, 0] = torch.inf
        return found

    def importance(self, prefill: Prefill, layer: int) -> torch.Tensor:
        """Return each token's importance (KV, T). Raises PolicyError."""
        v = prefill.v[layer]
        if self.head == "untrained":
            return v.square().sum(-1).sqrt()
        a, w = trained_head(prefill.model)
        expected = (len(prefill.v), len(v), v.shape[-1])
        if (a.shape, w.shape) != (expected[:2], expected):
            raise PolicyError(
                f"policy nosa: {FILE} has a {tuple(a.shape)} and w {tuple(w.shape)}; the model needs "
                f"{expected[:2]} and {expected}"
            )
        a, w = a[layer].to(v), w[layer].to(v)
        found: torch.Tensor = a[:, None] * F.softplus((v * w[:, None]).sum(-1))
        return found.clamp(-LARGEST_BIAS, LARGEST_BIAS)

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        (kept,) = super().retain(prefill, layer, plan, kernels)
        if not self.largest_bias:
            return [kept]
        return [replace(kept, bias=self.importance(prefill, layer).gather(1, kept.rows))]


def trained_head(model: Model | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a (layers, kv_heads) and w (layers, kv_heads, head_dim) beside a model. Raises PolicyError."""
    path = None if model is None or model.path is None else Path(model.path)
    file = None if path is None else (path if path.is_dir() else path.parent) / FILE
    if file is None or not file.is_file():
        raise PolicyError(f"policy nosa: head=file needs {file or FILE}, which is not there")
    try:
        tensors = load_file(file)
        return tensors["a"].float(), tensors["w"].float()
    except (SafetensorError, OSError, KeyError) as error:
        raise PolicyError(f"policy nosa: {file} is no trained head: {error}") from None
