"""Runs one protocol on given secrets at both parties and returns what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mpcache.ops import AnyEngine
from mpcache.rank import Rank
from mpcache.runtime.party import Party
from mpcache.runtime.program import Program, at, run
from mpcache.runtime.rng import KeyStream, fresh_seed
from tests.support.play import Played, play

Protocol = Callable[..., Program[Any]]


def secure(protocol: Protocol, *secrets: torch.Tensor, kind: str = "fast", bits: int | None = None) -> Played:
    """`protocol(ops, *shares)`, on shares that are uniform, each alone."""
    masks = [KeyStream(fresh_seed(), "test").tensor(x.shape) for x in secrets]

    def program(ops: AnyEngine, party: Party, rank: Rank) -> Any:
        party.begin("test")
        shares = []
        for i, (x, r) in enumerate(zip(secrets, masks, strict=True)):
            share = ops.secret(x, x.shape, rank, bits)  # whole, or a shape at the dealer
            data = share.data if share.data.is_meta else (r, share.data - r)[(rank + i) % 2]
            shares.append(replace(share, data=data, owner=None))
        return run(at("test", protocol(ops, *shares)), party)

    return play(program, kind)
