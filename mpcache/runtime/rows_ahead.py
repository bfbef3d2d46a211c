"""Multiply the masks of several tokens of an answer by a standing matrix in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from mpcache.phases import ChunkPlace
from mpcache.runtime.program import Request
from mpcache.runtime.ring import matmul
from mpcache.runtime.rng import KeyStream
from mpcache.runtime.shares import KnownOperand

TOKENS = 8  # that share a pass


class _Pass(NamedTuple):
    """What one pass made. tokens: which; rows: (r, k), masks from the row `first` on; products: (r, n)."""

    tokens: tuple[int, int]
    first: int
    rows: torch.Tensor
    products: torch.Tensor


class RowsAhead:
    """One party's masks of the rows that standing matrices are multiplied with, and their products.

    A client makes V anew in each pass and a dealer reads B from memory, which takes longer than to multiply
    one row. A token's masks do not depend on it, so a pass multiplies those of TOKENS tokens. They come not
    from a phase's tape but from a stream of the client's seed for one matrix and these tokens, a row for
    each: a phase begins once (`Tapes.begin`), so a row is used once. Passes of different matrices begin at
    different tokens.
    """

    def __init__(self, seed: bytes) -> None:
        """Make rows of the client's seed."""
        self._seed = seed
        self._place: ChunkPlace | None = None
        self._met = set[str]()
        self._passes = dict[str, _Pass]()
        self._ready = list[tuple[torch.Tensor, torch.Tensor]]()

    def begin(self, phase: str) -> None:
        """Go on to a phase; only a token of an answer has rows ahead, which its question may have made."""
        self._place = ChunkPlace.of(phase)
        self._met.clear()
        self._ready.clear()

    def mask(self, request: Request, matrix: Any) -> torch.Tensor | None:
        """Return the client's mask of a product with a standing matrix; None where it is of the tape.

        It is the last random part of the request. matrix: the party's own part of the matrix, V or B. A
        matrix that comes a second time in a phase has no second row.
        """
        w, place = request.matrix, self._place
        if w is None or not w.name or place is None or not place.step or w.name in self._met:
            return None
        shape = request.random[-1].shape
        if math.prod(shape[:-1]) != 1:
            return None
        self._met.add(w.name)
        group, row = divmod(place.step + w.number, TOKENS)
        made = self._passes.get(w.name)
        if made is None or made.tokens != (place.turn, group):
            rows = self._rows(w, (place.turn, group), row)
            made = self._passes[w.name] = _Pass((place.turn, group), row, rows, matmul(rows, matrix))
        mask = made.rows[row - made.first].reshape(shape)
        self._ready.append((mask, made.products[row - made.first].reshape(*shape[:-1], -1)))
        return mask

    def product(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Take the product of a mask that `mask` returned; None of any other."""
        for i, (made, product) in enumerate(self._ready):
            if made is mask:
                del self._ready[i]
                return product
        return None

    def times(self, mask: torch.Tensor, w: KnownOperand) -> torch.Tensor:
        """Multiply a client's mask by V; a question's in one pass with the first rows of its answer."""
        product, place = self.product(mask), self._place
        if product is not None:
            return product
        if place is None or place.step or not w.name or w.name in self._met:
            return matmul(mask, w.held)
        self._met.add(w.name)
        group, row = divmod(1 + w.number, TOKENS)
        rows = self._rows(w, (place.turn, group), row)
        left = mask.reshape(-1, mask.shape[-1])
        both = matmul(torch.cat([left, rows]), w.held)
        self._passes[w.name] = _Pass((place.turn, group), row, rows, both[left.shape[0] :])
        return both[: left.shape[0]].reshape(*mask.shape[:-1], -1)

    def _rows(self, w: KnownOperand, tokens: tuple[int, int], first: int) -> torch.Tensor:
        turn, group = tokens
        stream, k = KeyStream(self._seed, f"rows/{turn}/{group}/{w.name}"), w.shape[0]
        stream.skip(8 * first * k)
        return stream.tensor((TOKENS - first, k))
