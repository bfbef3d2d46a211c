"""Runs one protocol on given secrets at both parties and returns what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mpcache.ops import Ops
from mpcache.rank import Rank
from mpcache.secure.party import Party
from mpcache.secure.program import Program, at, run
from tests.secure.play import Played, play

Protocol = Callable[..., Program[Any]]


def secure(protocol: Protocol, *secrets: torch.Tensor, kind: str = "fast", bits: int | None = None) -> Played:
    """`protocol(ops, *shares)`; secrets alternate between the server's and the client's."""

    def program(ops: Ops, party: Party, rank: Rank) -> Any:
        party.begin("test")
        shares = []
        for i, x in enumerate(secrets):
            owner = Rank(i % 2)
            share = ops.secret(x if rank is owner else None, x.shape, owner, bits)
            shares.append(replace(share, owner=None))
        return run(at("test", protocol(ops, *shares)), party)

    return play(program, kind)
