"""Let workers of a Ray cluster deal batches of tapes, whole or by layers; the dealer hands them on in turn.

    driver -> worker     public facts, a batch's name, its two seeds, its portion, and the key of its files
    worker -> spool      of each phase a sealed file: what the dealer sends of the portion, in its order
    driver -> parties    the same, read back and put in the order of one dealer; the files are gone then

The key lives in the driver's and the workers' memory alone: a file that outlives them opens for nobody. A
worker that dies takes its batch with it: what had been handed on of it is no whole batch, so nobody uses it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import count
from operator import itemgetter
from typing import Any

import torch

from mpcache.cluster import Cluster, ClusterError, ClusterInput, Failure
from mpcache.config import PublicConfig
from mpcache.cost.tally import Cost
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.runtime.party import COMPUTING, PortionDealer
from mpcache.runtime.rng import fresh_seed
from mpcache_parties.facts import Facts
from mpcache_parties.portions import ALL_LAYERS, Portion, portions_of, worker_bytes
from mpcache_parties.state import sealed
from mpcache_parties.state.spool import Spool

ReadByShapes = Callable[[Facts, PublicConfig, Any], Iterator[str]]
Message = dict[str, Any]  # to, step, tensors; draw: its place in the phase


@dataclass(frozen=True)
class BatchOrder:
    """A batch, or a portion of it, that a worker is to deal into `spool`."""

    facts: Facts
    public: PublicConfig
    read: ReadByShapes
    name: str
    seeds: Mapping[Rank, bytes]
    spool: Spool
    key: bytes
    portion: Portion = ALL_LAYERS

    def put(self, phase: str, messages: Sequence[Message]) -> None:
        """Seal what is dealt of a phase."""
        self.spool.put_tree(self._file(phase), self.key, self._header(phase), {"messages": messages})

    def take(self, phase: str) -> list[Message]:
        """Read it back; the file is gone then."""
        found: list[Message] = self.spool.take_tree(self._file(phase), self.key, self._header(phase))[
            "messages"
        ]
        return found

    def _file(self, phase: str) -> str:
        return f"{self.name}-{phase}-{self.portion.number}.dealt"

    def _header(self, phase: str) -> dict[str, Any]:
        """Return what is in the clear there."""
        return {"kind": "dealt", "batch": self.name, "phase": phase, "portion": self.portion.number}


class _Collected:
    """Stands for a link: keeps what is sent."""

    def __init__(self, rank: Rank, keep: Callable[[Message], None]) -> None:
        self._rank, self._keep = rank, keep

    def send(self, step: str, tensors: Sequence[torch.Tensor]) -> None:
        """Keep a message."""
        self._keep({"to": self._rank, "step": step, "tensors": list(tensors)})


def deal_portion(order: BatchOrder) -> Iterator[str]:
    """Deal an order at a worker, a file for each phase; yields each phase once it is there."""
    torch.set_num_threads(1)
    messages: list[Message] = []
    links: Any = {rank: _Collected(rank, lambda m: messages.append(m | {"draw": dealer.drawn}))
                  for rank in COMPUTING}  # fmt: skip
    portion = order.portion
    dealer = PortionDealer(links, order.name, dict(order.seeds), Ledger(), portion.deals, portion.needs)
    for phase in order.read(order.facts, order.public, dealer):
        order.put(phase, messages)
        messages.clear()
        yield phase


class Farm:
    """Workers that deal batches, some ahead of the one that is handed on.

    Where there are more workers than batches, a batch is dealt by several, each of which deals some layers.
    """

    @classmethod
    def open(cls, address: str, place: str | None) -> Farm:
        """Join the cluster at an address; place: of the spool, None: a folder of this machine.

        Raises BadInput, StateError: no cluster there, or no spool that its workers could use.
        """
        spool = Spool.at(place)
        try:
            cluster = Cluster.join(address)
            if place is None and (machines := len(cluster.nodes)) > 1:
                cluster.leave()
                raise ClusterInput(
                    f"--ray {address}: its {machines} machines deal into one place; give "
                    "--offline-store, a folder that all of them see or a URL"
                )
        except BaseException:
            spool.close()
            raise
        return cls(cluster, spool)

    def __init__(self, cluster: Cluster, spool: Spool) -> None:
        """Use a cluster, and a spool that all its machines see."""
        self._cluster, self._spool = cluster, spool
        self._key = secrets.token_bytes(sealed.KEY_BYTES)
        self._names = list[str]()

    def batches(
        self, batches: int, facts: Facts, public: PublicConfig, read: ReadByShapes, cost: Cost
    ) -> Iterator[tuple[BatchOrder, Iterator[tuple[str, list[Message]]]]]:
        """Yield each batch, with its phases and their messages; these are to be heard to the end.

        cost: what such a batch costs. Raises BadInput: too little memory; ClusterError: a worker died.
        """
        portions = portions_of(cost, self._cluster.workers // batches)
        memory = worker_bytes(cost, portions)
        self._cluster.check_memory(memory, 1, "a dealer's workers")
        self._names = [secrets.token_hex(16) for _ in range(batches)]
        orders = []
        for name in self._names:
            seeds = {rank: fresh_seed() for rank in COMPUTING}
            orders += [
                BatchOrder(facts, public, read, name, seeds, self._spool, self._key, portion)
                for portion in portions
            ]
        dealing = _Dealing(self._cluster, orders, memory, len(portions))
        for n in range(batches):
            first = n * len(portions)
            yield orders[first], dealing.phases(range(first, first + len(portions)))
            self._names.remove(orders[first].name)  # nothing of it is left

    def close(self) -> None:
        """End the workers, and remove what they have left."""
        self._cluster.leave()
        for name in self._names:
            self._spool.clear(name)
        self._spool.close()


class _Dealing:
    """Orders that are being dealt, and how far each is."""

    def __init__(self, cluster: Cluster, orders: Sequence[BatchOrder], memory: int, portions: int) -> None:
        self._orders, self._portions = orders, portions
        self._ready: list[list[str]] = [[] for _ in orders]
        self._whole = set[int]()
        self._dealt = cluster.stream(deal_portion, [(order,) for order in orders], memory, again=0)

    def phases(self, numbers: Sequence[int]) -> Iterator[tuple[str, list[Message]]]:
        """Yield the phases of a batch, whose orders these are, in order. Raises ClusterError."""
        for i in count():
            while any(len(self._ready[n]) <= i and n not in self._whole for n in numbers):
                self._hear()
            if any(len(self._ready[n]) <= i for n in numbers):
                return
            phase = self._ready[numbers[0]][i]
            parts = [self._orders[n].take(phase) for n in numbers]
            yield phase, list(merge(*parts, key=itemgetter("draw")))

    def _hear(self) -> None:
        """Take what the next worker that has something says."""
        number, phase = next(self._dealt)
        if isinstance(phase, Failure):
            batch, batches = number // self._portions + 1, len(self._orders) // self._portions
            raise ClusterError(f"batch {batch} of {batches} is lost: {phase.why}")
        if phase is None:
            self._whole.add(number)
        else:
            self._ready[number].append(phase)
