"""One private session, phase by phase, for any reading: setup, context, question, decode.

The same `Session` runs plain (`PlainOps`), at the computing parties, at the dealer and in the cost
reading; what differs is `ops` (the meaning of the operations), `party` (who answers), and which
secrets are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from kernels import Backend
from mpcache.cache import Cache, LayerCache
from mpcache.decode import Layer, Operands, step
from mpcache.model import ModelShape, Weights
from mpcache.ops import Ops
from mpcache.policy import Bound
from mpcache.prefill import Prefill
from mpcache.rank import Rank
from mpcache.secure.program import Program, at, run, together

_MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


def load(ops: Ops, shape: ModelShape, weights: Weights | None) -> Program[Operands]:
    """Weights become operands. `weights` is None at all but their owner."""
    blank = Weights.meta(shape)

    def own(tensor: torch.Tensor | None, like: torch.Tensor | None) -> Any:
        return None if like is None else ops.secret(tensor, like.shape, Rank.SERVER)

    def operand(tensor: torch.Tensor | None, like: torch.Tensor) -> Program[Any]:
        return ops.keep(own(tensor, like))

    layers = []
    for i, like in enumerate(blank.layers):
        mine = None if weights is None else weights.layers[i]
        names = [f.name for f in fields(like) if getattr(like, f.name) is not None]
        matrices = [n for n in names if n in _MATRICES]
        kept = yield from at(
            f"layer{i}", together(*(operand(getattr(mine, n, None), getattr(like, n)) for n in matrices))
        )
        parts: dict[str, Any] = dict.fromkeys((f.name for f in fields(like)), None)
        parts.update({n: own(getattr(mine, n, None), getattr(like, n)) for n in names if n not in matrices})
        parts.update(zip(matrices, kept, strict=True))
        layers.append(Layer(**parts))
    embed, lm_head = yield from at(
        "vocabulary",
        together(
            operand(getattr(weights, "embed", None), blank.embed),
            operand(getattr(weights, "lm_head", None), blank.lm_head),
        ),
    )
    positions = own(getattr(weights, "positions", None), blank.positions)
    lm_bias = own(getattr(weights, "lm_bias", None), blank.lm_bias)
    return Operands(shape, embed, positions, tuple(layers), lm_head, lm_bias)


def fill(
    ops: Ops, shape: ModelShape, policy: Bound, prefill: Prefill | None, kernels: Backend | None
) -> Program[Cache]:
    """The evicted context becomes the cache. `prefill` is None at all but the document's owner."""
    plan, kv, d = policy.plan, shape.kv_heads, shape.head_dim
    layers = []
    for i in range(shape.layers):
        k = v = reps = None
        if prefill is not None and kernels is not None:
            rows = policy.policy.evict(prefill, i, plan, kernels)
            k, v = prefill.k[i][:, rows], prefill.v[i][:, rows]
            reps = policy.policy.represent(k, plan, kernels)
        parts = [(k, plan.kept), (v, plan.kept), (reps, plan.representatives)]
        kept = yield from at(
            f"layer{i}",
            together(*(ops.keep(ops.secret(t, (kv, n, d), Rank.SERVER)) for t, n in parts if n)),
        )
        layers.append(LayerCache(kept[0], kept[1], kept[2] if plan.representatives else None, plan.kept))
    return Cache(layers, plan.context)


class Session:
    """Phases of one session for one reading. `party` answers; None for the plain reading."""

    def __init__(self, ops: Ops, party: Any, shape: ModelShape, policy: Bound) -> None:
        self.ops, self.party, self.shape, self.policy = ops, party, shape, policy
        self.operands: Operands
        self.cache: Cache
        self._chunks = 0

    def _run(self, phase: str, program: Program[Any]) -> Any:
        if self.party is None:
            return run(program, _Nobody())
        self.party.begin(phase)
        return run(at(phase, program), self.party)

    def setup(self, weights: Weights | None) -> None:
        self.operands = self._run("setup", load(self.ops, self.shape, weights))

    def context(self, prefill: Prefill | None, kernels: Backend | None) -> None:
        self.cache = self._run("context", fill(self.ops, self.shape, self.policy, prefill, kernels))

    def chunk(self, tokens: Sequence[int] | None, m: int) -> torch.Tensor | None:
        """Take m tokens in; the next token's logits (vocab,) where they are to be learned."""
        hot = None
        if tokens is not None:
            hot = torch.nn.functional.one_hot(torch.tensor(tokens), self.shape.vocab)
        one_hots = self.ops.secret(hot, (m, self.shape.vocab), Rank.CLIENT, bits=0)
        phase = "question" if self._chunks == 0 else f"decode{self._chunks}"
        self._chunks += 1
        logits: torch.Tensor | None = self._run(
            phase, step(self.ops, self.operands, self.cache, self.policy, one_hots)
        )
        return logits


class _Nobody:
    """The plain reading asks nothing."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a plain program asked for {name}")
