"""What one actor of a party holds on its machine: a part of each large matrix, made or loaded there.

A piece says where a part comes from, and travels with each call: an actor that was lost and made anew loads
its parts again when it is next asked for them. The dealer's parts come from the server and cannot be made
anew: who loses one ends with one line.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpcache.cluster import ClusterError
from mpcache.model.loading import stored_weights
from mpcache.runtime.ring import Blocks, Matrix, largest_in, matmul, narrow_rows, wide
from mpcache.runtime.shares import encode
from mpcache.runtime.standing import OperandPlace, SeededMatrix
from mpcache.session import arranged_layer


@dataclass(frozen=True)
class WeightPiece:
    """Columns of a weight at the server, as integers of `bits` fraction bits.

    model: a folder or file, at the same place on each machine.  layer: None: of the vocabulary.
    """

    model: Path
    layer: int | None
    name: str
    bits: int
    start: int
    stop: int

    def load(self) -> Matrix:
        """Read the weight, and keep these columns. Raises ModelError."""
        whole = _weight(self.model, self.layer, self.name)
        columns = whole[:, self.start : self.stop]
        return narrow_rows(tuple(columns.shape), lambda rows: encode(columns[rows], self.bits))


@dataclass(frozen=True)
class SeedPiece:
    """Rows of V at the client: they are made anew in each product, and take no memory."""

    seed: bytes
    number: int
    place: OperandPlace
    start: int
    stop: int

    def load(self) -> SeededMatrix:
        """Stand for the rows."""
        return SeededMatrix(self.seed, self.number, self.place, slice(self.start, self.stop))


@dataclass(frozen=True)
class DealtPiece:
    """Columns of B at the dealer: from the server's upload."""

    def load(self) -> Matrix:
        """Raise ClusterError: it was there once."""
        raise ClusterError(
            "it was lost, and with it a part of the masked weights that the server had uploaded; start the "
            "dealer anew"
        )


Piece = WeightPiece | SeedPiece | DealtPiece


@lru_cache(maxsize=1)
def _layer(model: Path, layer: int) -> Any:
    """Read one layer; the next one takes its place."""
    return arranged_layer(stored_weights(model), layer)


def _weight(model: Path, layer: int | None, name: str) -> torch.Tensor:
    if layer is None:
        _layer.cache_clear()
        found: torch.Tensor = getattr(stored_weights(model), name)
    else:
        found = _layer(model, layer)(name)
    return found


class Shard:
    """The actor: its parts by the numbers that the driver gave them."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._held: dict[int, Blocks] = {}

    def _part(self, key: int, piece: Piece) -> Any:
        if key not in self._held:
            self._held[key] = piece.load()
        return self._held[key]

    def times(self, key: int, piece: Piece, left: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Multiply by the part, modulo 2^64."""
        x = torch.from_numpy(np.array(left))  # what comes is read-only
        return matmul(x, self._part(key, piece)).numpy()

    def rows(self, key: int, piece: Piece, rows: slice) -> np.ndarray[Any, Any]:
        """Return rows of the part as int64."""
        return wide(self._part(key, piece)[rows]).numpy()

    def largest(self, key: int, piece: Piece) -> int:
        """Return the largest absolute value of the part."""
        return largest_in(self._part(key, piece))

    def put(self, key: int, low: np.ndarray[Any, Any], high: np.ndarray[Any, Any] | None) -> None:
        """Keep a part that was sent."""
        parts = [None if x is None else torch.from_numpy(np.array(x)) for x in (low, high)]
        self._held[key] = Matrix(*parts)

    def drop(self, key: int) -> None:
        """Forget a part that nobody needs any more."""
        self._held.pop(key, None)

    def settle(self) -> tuple[int, int]:
        """Drop what is only needed to load; return the bytes that this process has now, and had at most."""
        _layer.cache_clear()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cut(n: int, parts: int) -> Sequence[tuple[int, int]]:
    """Cut n columns, or rows, into parts as even as they can be: first and last, the last exclusive."""
    edges = [n * i // parts for i in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))
