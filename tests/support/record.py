"""Writes down all that each party sees: every frame that arrives, and every value that it opens.

A share that arrives is uniform even where its mask is missing at the other end: what a party knows is
the sum with its own share. So a view is what came in and what became of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from mpcache.rank import Rank
from mpcache.runtime.party import ComputingParty
from mpcache.runtime.program import Opening
from mpcache.transport.frames import FrameLink
from mpcache_protos import party_pb2 as pb

DEALT = 512  # bytes of a dealer's message that a classifier gets

Slot = tuple[Any, ...]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class TensorTrace:
    """One opened tensor: its step and reason, and its values (elements, width) as bytes."""

    step: str
    why: str
    width: int
    values: Bytes
    received: Bytes | None  # the other's share of it, where there is one


@dataclass
class LayerView:
    """One party's session. slots: of each peer's messages, in order: what, where, how large.
    facts: what was said in the clear.  tensors: message contents, with their steps and layouts."""

    slots: dict[Rank, list[Slot]] = field(default_factory=lambda: {rank: [] for rank in Rank})
    facts: list[tuple[Rank, str, str]] = field(default_factory=list)
    tensors: dict[Rank, list[tuple[str, str, bytes]]] = field(
        default_factory=lambda: {rank: [] for rank in Rank}
    )
    opened: list[TensorTrace] = field(default_factory=list)
    order: list[Slot] = field(default_factory=list)  # of the openings: steps, reasons, shapes
    frames: dict[Rank, list[bytes]] = field(default_factory=lambda: {rank: [] for rank in Rank})

    def frame(self, peer: Rank, data: bytes) -> None:
        frame = pb.Frame.FromString(data)
        kind = frame.WhichOneof("kind")
        if kind == "ack":
            return  # says how far the other's program is, and comes when there is much to confirm
        self.frames[peer].append(data)
        message = getattr(frame, kind)
        slot: tuple[object, ...]
        match kind:
            case "tensors":
                slot = (message.step, message.sequence, message.layout, message.offset, len(message.data))
                self.tensors[peer].append((message.step, message.layout, message.data))
            case "facts":
                slot = (message.step, message.sequence, len(message.json))
                self.facts.append((peer, message.step, message.json))
            case _:
                slot = ()
        self.slots[peer].append((kind, *slot))

    def said(self) -> list[tuple[Rank, str, str]]:
        """The facts by peer, each one's in order: which peer is first to say its own is no one's doing.
        Without the session's name, which is drawn anew for each, and pseudorandom names and digests of
        set-ups, which differ for each server."""
        named = re.compile(r'"(session|identifier|family|digest)":"[0-9a-f]{32,64}"')
        return [
            (peer, step, named.sub(r'"\1":""', text))
            for peer, step, text in sorted(self.facts, key=lambda fact: fact[0])
        ]

    def opening(self, me: Rank, items: Sequence[Opening], values: Sequence[Any], step: str) -> None:
        for item, value in zip(items, values, strict=True):
            here = item.step or step
            self.order.append((here, item.why, item.to, item.sender, item.width, tuple(item.share.shape)))
            if value is None or item.sender is me:
                continue
            received = None
            if item.sender is None:
                received = _bytes(value ^ item.share if item.xor else value - item.share, item.width)
            self.opened.append(TensorTrace(here, item.why, item.width, _bytes(value, item.width), received))

    def words(self, phases: Sequence[str]) -> Bytes:
        """Contents of these phases, in order, as one row of bytes for a classifier. Of a message of the
        dealer, who knows nothing, the beginning. What the client is meant to learn is left out: it is
        in `logits` alone."""
        row = [
            np.frombuffer(data[: DEALT if rank is Rank.DEALER else None], np.uint8)
            for rank in Rank
            for step, _, data in self.tensors[rank]
            if step.partition("/")[0] in phases and not step.endswith("/logits")
        ]
        row += [
            seen.values.ravel()
            for seen in self.opened
            if seen.step.partition("/")[0] in phases and not seen.step.endswith("/logits")
        ]
        return np.concatenate([np.zeros(0, np.uint8), *row])


def _bytes(x: torch.Tensor, width: int) -> Bytes:
    """The low `width` bytes of each int64, (elements, width)."""
    return x.reshape(-1).contiguous().view(torch.uint8).reshape(-1, 8)[:, :width].numpy().copy()


@contextmanager
def recording() -> Iterator[dict[Rank, LayerView]]:
    """Views of the one session that runs meanwhile in this process, whatever links it uses."""
    views = {rank: LayerView() for rank in Rank}
    arrived, opened = FrameLink.arrived, ComputingParty.open

    def arriving(link: FrameLink, data: bytes) -> bool:
        views[link.me].frame(link.peer, data)
        return arrived(link, data)

    def opening(party: ComputingParty, items: Sequence[Opening], step: str) -> list[Any]:
        values = opened(party, items, step)
        views[party.rank].opening(party.rank, items, values, step)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameLink, "arrived", arriving)
        patch.setattr(ComputingParty, "open", opening)
        yield views
