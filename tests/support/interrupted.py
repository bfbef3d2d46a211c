"""Sessions that are cut off, and what each party's masks and openings were before and after."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from mpcache.rank import Rank
from mpcache.runtime import party as party_module
from mpcache.runtime import rng, rows_ahead
from mpcache.runtime.party import ComputingParty
from tests.support.links import Killed


@dataclass
class Cut:
    """The victim dies at its nth message of a phase, or of a step that facts are said at."""

    victim: Rank
    phase: str
    message: int = 1


@dataclass
class Heard:
    """Which rank a thread plays, the key streams that it makes, and what it opens, run by run."""

    ranks: dict[int, Rank] = field(default_factory=dict)
    keys: list[tuple[Rank, bytes]] = field(default_factory=list)
    opened: list[dict[tuple[Rank, str], list[torch.Tensor]]] = field(default_factory=list)


def die_at(links: dict[Rank, Any], cut: Cut) -> None:
    left = iter(range(cut.message, 0, -1))
    for link in links.values():

        def send(step: str, *rest: Any, go_on: Any = link.send) -> None:
            if cut.phase in (step, step.partition("/")[0]) and next(left, 0) <= 1:
                raise Killed
            go_on(step, *rest)

        link.send = send

        def swap(step: str, outgoing: Any, leaving: Any, *rest: Any, go_on: Any = link.swap) -> Any:
            if leaving.text and cut.phase in (step, step.partition("/")[0]) and next(left, 0) <= 1:
                raise Killed
            return go_on(step, outgoing, leaving, *rest)

        link.swap = swap

        def send_facts(step: str, *rest: Any, go_on: Any = link.send_facts) -> None:
            if step == cut.phase and next(left, 0) <= 1:
                raise Killed
            go_on(step, *rest)

        link.send_facts = send_facts


def hear(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """Every key stream that is made, and every share that is opened, with its maker."""
    notes = Heard()

    class RecordedCall(rng.KeyStream):
        def __init__(self, seed: bytes, label: str) -> None:
            notes.keys.append((notes.ranks[threading.get_ident()], rng.derive_key(seed, label)))
            super().__init__(seed, label)

    monkeypatch.setattr(party_module, "KeyStream", RecordedCall)
    monkeypatch.setattr(rng, "KeyStream", RecordedCall)
    monkeypatch.setattr(rows_ahead, "KeyStream", RecordedCall)
    opening = ComputingParty.open

    def open_(self: ComputingParty, items: Any, step: str) -> list[Any]:
        notes.opened[-1][self.rank, step] += [i.share.clone() for i in items if i.sender in (None, self.rank)]
        return opening(self, items, step)

    monkeypatch.setattr(ComputingParty, "open", open_)
    return notes


def repeated_keys(heard: Heard) -> int:
    return len(heard.keys) - len(set(heard.keys))


def differences(heard: Heard, phase: str) -> Iterator[np.ndarray]:
    """What one party opened in the interrupted step, minus what it opened there when the step was redone:
    the masks' difference, and the secrets' if there is any."""
    before, after = heard.opened
    for key, first in before.items():
        if key[1].startswith(f"{phase}/"):
            for a, b in zip(first, after[key], strict=False):
                yield (a - b).contiguous().view(torch.uint8).reshape(-1, 8)[:, :4].numpy().ravel()
