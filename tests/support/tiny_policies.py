"""A small random model, and one session read plain, by three parties, or by shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch

from mpcache.engines.fast import FastOps
from mpcache.engines.plain import PlainOps
from mpcache.ledger import Ledger
from mpcache.model import Model, ModelShape, Weights
from mpcache.model.prefill import Prefill, prefill
from mpcache.ops import AnyEngine
from mpcache.policy import Policy, parse_policy
from mpcache.rank import Rank
from mpcache.runtime.party import Party, ShapeParty
from mpcache.runtime.program import Program
from mpcache.session import Session
from mpcache_kernels import backend
from tests.support.play import play

VOCAB = 16
KERNELS = backend("cpu")


def shape(layers: int = 2, heads: int = 4, kv_heads: int = 2, **changes: Any) -> ModelShape:
    options: dict[str, Any] = dict(
        layers=layers, width=8, heads=heads, kv_heads=kv_heads, head_dim=4, ffn=8, vocab=VOCAB,
        max_positions=512, norm="rms", norm_eps=1e-5, activation="silu", gated=True, positions="rope",
    )  # fmt: skip
    return ModelShape(**(options | changes))


@cache
def model(s: ModelShape, seed: int = 0) -> Model:
    """Weights of size one: scores that tell tokens apart."""
    generator = torch.Generator().manual_seed(seed)

    def fill(like: Any) -> Any:
        if isinstance(like, torch.Tensor):
            scale = like.shape[0] ** -0.5 if like.dim() == 2 and like.shape[0] != s.vocab else 1.0
            return torch.randn(like.shape, generator=generator) * scale
        if dataclasses.is_dataclass(like) and not isinstance(like, type):
            return type(like)(**{f.name: fill(getattr(like, f.name)) for f in dataclasses.fields(like)})
        if isinstance(like, tuple):
            return tuple(map(fill, like))
        return like

    return cast(Model, SimpleNamespace(shape=s, weights=fill(Weights.meta(s))))


def tokens(n: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (n,), generator=generator).tolist()


def chunks(*sizes: int, seed: int = 2) -> list[list[int]]:
    return [tokens(m, seed + i) for i, m in enumerate(sizes)]


def prefilled(policy: Policy, s: ModelShape, context: Sequence[int], seed: int = 0) -> Prefill:
    return prefill(model(s, seed), context, window=policy.window(len(context)))


class Counting(PlainOps):
    """Counts the cached tokens that rows attend to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def weighted_sum(self, weights: torch.Tensor, values: torch.Tensor) -> Program[torch.Tensor]:
        numbers = (weights > 0).sum(-1)
        self.seen.append((int(numbers.min()), int(numbers.max())))
        return super().weighted_sum(weights, values)


def plain(
    spec: str,
    s: ModelShape,
    context: Sequence[int],
    chunks: Sequence[Sequence[int]],
    seed: int = 0,
    ops: AnyEngine | None = None,
) -> tuple[list[torch.Tensor], Session]:
    """Logits after each chunk, and the session."""
    policy = parse_policy(spec)
    session = Session(ops or PlainOps(), None, s, policy.bind(len(context), s))
    session.setup(model(s, seed).weights)
    session.context(prefilled(policy, s, context, seed), KERNELS)
    with torch.no_grad():
        logits = [session.chunk(chunk, len(chunk)) for chunk in chunks]
    return [x for x in logits if x is not None], session


def secure(
    spec: str,
    s: ModelShape,
    context: Sequence[int],
    chunks: Sequence[Sequence[int]],
    protocol: str = "fast",
    seed: int = 0,
) -> tuple[list[torch.Tensor], dict[Rank, Ledger]]:
    """Logits at the client after each chunk, and the ledgers."""

    def program(ops: AnyEngine, party: Party, rank: Rank) -> list[Any]:
        policy = parse_policy(spec)
        session = Session(ops, party, s, policy.bind(len(context), s))
        mine = rank is Rank.SERVER
        session.setup(model(s, seed).weights if mine else None)
        session.context(prefilled(policy, s, context, seed) if mine else None, KERNELS if mine else None)
        return [session.chunk(chunk if rank is Rank.CLIENT else None, len(chunk)) for chunk in chunks]

    played = play(program, protocol)
    return played.client, played.ledgers


def cost(
    spec: str, s: ModelShape, context: int, chunks: Sequence[int], party: ShapeParty | None = None
) -> Ledger:
    """The ledger of the server by shapes alone."""
    party = party or ShapeParty(Rank.SERVER)
    session = Session(FastOps(Rank.SERVER, device="meta"), party, s, parse_policy(spec).bind(context, s))
    session.setup(None)
    session.context(None, None)
    for m in chunks:
        session.chunk(None, m)
    return party.ledger
