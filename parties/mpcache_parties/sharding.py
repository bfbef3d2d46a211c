"""Spread a party's large matrices over the actors of a Ray cluster (`--ray`): products go there and back.

Server and dealer cut a matrix by columns, each actor has some of them. The client's V is a key stream along
rows, so it is cut by rows: each actor makes some, and their products are added up. Either is the same to the
bit as the whole matrix, modulo 2^64. One process per party talks to the others, as without actors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from mpcache.cluster import Actors, Cluster, ClusterError
from mpcache.cost.sizing import FLOAT, PROCESS
from mpcache.model import Model, ModelShape, Weights
from mpcache.model.loading import stored_weights
from mpcache.rank import Rank
from mpcache.report.units import size
from mpcache.runtime.ring import Matrix, RemoteMatrix
from mpcache.runtime.standing import OperandPlace
from mpcache.session import WeightsElsewhere, arranged_layer
from mpcache_parties.say import Say
from mpcache_parties.shard import DealtPiece, Piece, SeedPiece, Shard, WeightPiece, cut

INTEGER = 3  # bytes of a weight's integer, as measured of SmolLM2; 2 to 4
_KEYS = count()


class ShardedMatrix(RemoteMatrix):
    """A matrix whose parts lie with a party's actors. by_rows: else by columns."""

    def __init__(
        self, shape: tuple[int, ...], shards: Shards, pieces: Sequence[Piece], by_rows: bool = False
    ) -> None:
        super().__init__(shape)
        self._shards, self._pieces, self._by_rows, self.key = shards, pieces, by_rows, next(_KEYS)
        if not by_rows:  # V takes no memory
            weakref.finalize(self, shards.drop, self.key).atexit = False

    def times(self, left: torch.Tensor) -> torch.Tensor:
        x = left.numpy()
        if self._by_rows:
            cuts = cut(self.shape[0], len(self._pieces))
            found = self._ask("times", [(np.ascontiguousarray(x[:, a:b]),) for a, b in cuts])
            return torch.from_numpy(np.sum(found, 0))  # wraps, as the ring does
        return torch.from_numpy(np.concatenate(self._ask("times", [(x,)] * len(self._pieces)), 1))

    def rows(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(self._ask("rows", [(rows,)] * len(self._pieces)), 1))

    def largest(self) -> int:
        found: list[int] = self._ask("largest", [()] * len(self._pieces))
        return max(found)

    def put(self, matrix: Matrix) -> None:
        """Give each actor its columns."""
        both = [(matrix.low, matrix.high)] * len(self._pieces)
        columns = [slice(*each) for each in cut(self.shape[1], len(self._pieces))]
        parts = [
            [None if x is None else np.ascontiguousarray(x[:, mine].numpy()) for x in pair]
            for pair, mine in zip(both, columns, strict=True)
        ]
        self._shards.ask("put", [(self.key, *part) for part in parts])

    def _ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._shards.ask(
            method, [(self.key, piece, *more) for piece, more in zip(self._pieces, each, strict=True)]
        )


class Shards:
    """The actors of one party. They start when the first matrix is spread over them."""

    def __init__(self, cluster: Cluster, actors: int, me: Rank, say: Say) -> None:
        self._cluster, self.count, self._me, self._say = cluster, actors, me, say
        self._actors: Actors | None = None

    @classmethod
    def open(cls, address: str, actors: int | None, me: Rank, say: Say) -> Shards:
        """Join a cluster; actors: how many, else one for each machine. Raises BadInput."""
        cluster = Cluster.join(address, workers=1)
        return cls(cluster, actors or len(cluster.nodes), me, say)

    def close(self) -> None:
        """End the actors."""
        self._actors = None
        self._cluster.leave()

    def weights(self, model: Model, bits: int) -> WeightsElsewhere:
        """Return a model's weights, which the actors read. Raises BadInput where they have no room."""
        self._start(server_memory(model.shape, self.count))
        return _ShardedWeights(self, model, bits)

    def seeded(self, seed: bytes, number: int, place: OperandPlace) -> ShardedMatrix:
        """Return V of a matrix, which the actors make."""
        self._start(PROCESS)
        pieces = [SeedPiece(seed, number, place, *rows) for rows in cut(place.shape[0], self.count)]
        return ShardedMatrix(place.shape, self, pieces, by_rows=True)

    def room_for(self, nbytes: int) -> None:
        """Start the dealer's actors for so many bytes in all. Raises BadInput where they have no room."""
        self._start(PROCESS + nbytes // self.count)

    def dealt(self, place: OperandPlace, matrix: Matrix) -> ShardedMatrix:
        """Spread B of a matrix over the actors; they have it when this returns."""
        found = ShardedMatrix(place.shape, self, [DealtPiece()] * self.count)
        found.put(matrix)
        return found

    def say_settled(self) -> None:
        """Say what the actors hold."""
        if self._actors is not None:
            held = [now for now, _ in self.ask("settle", [()] * self.count)]
            spread = " ".join(size(each) for each in held)
            self._say(f"{self._me.label}: {len(held)} actors on {self._cluster.address} hold {spread}")

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of each actor. Raises ClusterError."""
        if self._actors is None:
            raise ClusterError("the party's actors have ended")
        return self._actors.ask(method, each)

    def drop(self, key: int) -> None:
        """Let the actors forget a matrix."""
        if self._actors is not None:
            self._actors.tell("drop", key)

    def _start(self, memory: int) -> None:
        if self._actors is None:
            self._cluster.check_memory(memory, self.count, f"the {self._me.label}'s actors")
            self._actors = self._cluster.actors(Shard, [()] * self.count, memory)


class _ShardedWeights(WeightsElsewhere):
    """A model's matrices at the actors; vectors are read here."""

    def __init__(self, shards: Shards, model: Model, bits: int) -> None:
        self._shards, self._model, self._bits = shards, model, bits
        self._sizes = Weights.meta(model.shape)

    def layer(self, number: int) -> Callable[[str], Any]:
        like, stored = arranged_layer(self._sizes, number), stored_weights(self._model.path)

        def mine(name: str) -> Any:
            shape = like(name).shape
            if len(shape) == 2:
                return self._matrix(number, name, tuple(shape))
            return arranged_layer(stored, number)(name)

        return mine

    def vocabulary(self, name: str) -> Any:
        like = getattr(self._sizes, name)
        if name in ("embed", "lm_head"):
            return self._matrix(None, name, tuple(like.shape))
        return getattr(stored_weights(self._model.path), name)

    def _matrix(self, layer: int | None, name: str, shape: tuple[int, ...]) -> ShardedMatrix:
        pieces = [
            WeightPiece(self._model.path, layer, name, self._bits, *columns)
            for columns in cut(shape[1], self._shards.count)
        ]
        return ShardedMatrix(shape, self._shards, pieces)


def server_memory(shape: ModelShape, actors: int) -> int:
    """Return the bytes of one of the server's actors: its integers, and what is read at once as floats."""
    sizes = dict(Weights.meta(shape).items())
    numbers = {name: tensor.numel() for name, tensor in sizes.items()}
    layer = sum(n for name, n in numbers.items() if name.startswith("layer0/"))
    read = 2 * FLOAT * max(layer, numbers["embed"])  # as it is stored, and as it is arranged
    return PROCESS + INTEGER * sum(numbers.values()) // actors + read
