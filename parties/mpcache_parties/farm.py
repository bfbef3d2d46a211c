"""Let workers of a Ray cluster deal batches of tapes, each a whole one; the dealer hands them on in turn.

    driver -> worker     public facts, a batch's name, its two seeds, and the key of its files
    worker -> disk       of each phase a sealed file: what the dealer sends, in its order
    driver -> parties    the same, read back; the file is gone then

The key lives in the driver's and the workers' memory alone: a file that outlives them opens for nobody. A
worker that dies takes its batch with it: what had been handed on of it is no whole batch, so nobody uses it.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpcache.cluster import Cluster, ClusterError, Failure
from mpcache.config import PublicConfig
from mpcache.cost.sizing import PROCESS
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.runtime.party import COMPUTING, DealerParty
from mpcache.runtime.rng import fresh_seed
from mpcache_parties.facts import Facts
from mpcache_parties.state import sealed, snapshot

ReadByShapes = Callable[[Facts, PublicConfig, Any, Callable[[str], None]], None]
WORKER = PROCESS + 500_000_000  # bytes: and a phase that is being dealt


@dataclass(frozen=True)
class BatchOrder:
    """A batch that a worker is to deal into `folder`."""

    facts: Facts
    public: PublicConfig
    read: ReadByShapes
    name: str
    seeds: Mapping[Rank, bytes]
    folder: Path
    key: bytes

    def file(self, phase: str) -> Path:
        """Return where a phase goes."""
        return self.folder / f"{self.name}-{phase}.dealt"

    def header(self, phase: str) -> dict[str, Any]:
        """Return what is in the clear there."""
        return {"kind": "dealt", "batch": self.name, "phase": phase}


class _Collected:
    """Stands for a link: keeps what is sent."""

    def __init__(self, rank: Rank, messages: list[dict[str, Any]]) -> None:
        self._rank, self._messages = rank, messages

    def send(self, step: str, tensors: Sequence[torch.Tensor]) -> None:
        """Keep a message."""
        self._messages.append({"to": self._rank, "step": step, "tensors": list(tensors)})


def deal_batch(order: BatchOrder) -> Iterator[str]:
    """Deal a batch at a worker, a file for each phase; yields the phases once all are there."""
    torch.set_num_threads(1)
    messages: list[dict[str, Any]] = []
    links: Any = {rank: _Collected(rank, messages) for rank in COMPUTING}
    done: list[str] = []

    def write(phase: str) -> None:
        body = snapshot.serialize({"messages": messages})
        sealed.seal(order.file(phase), order.key, order.header(phase), body)
        messages.clear()
        done.append(phase)

    order.read(order.facts, order.public, DealerParty(links, order.name, dict(order.seeds), Ledger()), write)
    yield from done


class Farm:
    """Workers that deal batches, some ahead of the one that is handed on."""

    def __init__(self, cluster: Cluster, folder: Path | None) -> None:
        """Use a cluster; folder: that all its machines see, None: one of this machine."""
        self._cluster = cluster
        self._mine = None if folder is not None else Path(tempfile.mkdtemp(prefix="mpcache-dealt-"))
        self._folder = folder if folder is not None else self._mine
        assert self._folder is not None
        sealed.make_folder(self._folder)
        self._key = secrets.token_bytes(sealed.KEY_BYTES)

    def batches(
        self, count: int, facts: Facts, public: PublicConfig, read: ReadByShapes
    ) -> Iterator[tuple[BatchOrder, Iterator[tuple[str, list[dict[str, Any]]]]]]:
        """Yield each batch, with its phases and their messages. Raises ClusterError: a worker died."""
        self._cluster.check_memory(WORKER, 1, "a dealer's workers")
        assert self._folder is not None
        orders = [
            BatchOrder(facts, public, read, secrets.token_hex(16), {r: fresh_seed() for r in COMPUTING},
                       self._folder, self._key)
            for _ in range(count)
        ]  # fmt: skip
        ready: list[list[str]] = [[] for _ in orders]
        dealt = self._cluster.stream(deal_batch, [(order,) for order in orders], WORKER, again=0)
        whole: set[int] = set()
        for n, order in enumerate(orders):
            while n not in whole:
                number, phase = next(dealt)
                if isinstance(phase, Failure):
                    raise ClusterError(f"batch {number + 1} of {count} is lost: {phase.why}")
                if phase is None:
                    whole.add(number)
                else:
                    ready[number].append(phase)
            yield order, self._phases(order, ready[n])

    def _phases(self, order: BatchOrder, phases: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for phase in phases:
            file = order.file(phase)
            content = snapshot.read_snapshot(file, self._key, order.header(phase))
            file.unlink(missing_ok=True)
            yield phase, content["messages"]

    def close(self) -> None:
        """End the workers, and remove what they have left."""
        self._cluster.leave()
        if self._mine is not None:
            shutil.rmtree(self._mine, ignore_errors=True)
        elif self._folder is not None:
            for file in self._folder.glob("*.dealt"):
                with suppress(OSError):
                    file.unlink()
