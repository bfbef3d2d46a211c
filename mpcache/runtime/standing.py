"""Masks that outlive a session: of operands that the server knows, weights and its document.

W = V + B. V is a key stream under a seed that the server gives to its clients, and B is what the dealer
holds; the server has both. Each of the three answers a program's question for an operand in its own way
(`StandingMasks.take`), in the order of the program. docs/protocols.md, section 4, says why V and B may
stay.

V is bound to what it hides: the seed is an HMAC, under the server's master key, of all operands' integers
with their names, shapes and rings (`OwnersMasks.finish`). Two encodings under one V would tell the dealer
their difference, so there is no counter and no name in its place.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import Shape
from mpcache.runtime.ring import Matrix, RemoteMatrix, blocks_of, narrow, pack, rows_of, unpack, wide
from mpcache.runtime.rng import KeyStream, derive_key
from mpcache.runtime.shares import (
    Awaited,
    KnownOperand,
    MaskedOperand,
    Share,
    is_known_matrix,
    known_rows,
    zeros,
)
from mpcache.runtime.side import bytes_for

_IN_CACHE = 1 << 16  # integers of V that are made at once
Dealt = torch.Tensor | Matrix | RemoteMatrix  # B at the dealer
FORMAT = 3  # of what a seed is made from, and of B's bytes; another one is another seed


class OperandPlace(NamedTuple):
    """Where an operand stands in its phase: all that is public about it. ring, bits: as `MaskedOperand`'s."""

    step: str
    shape: Shape
    ring: int
    bits: int

    @property
    def packed(self) -> Shape:
        """The shape of its bytes modulo 2^ring."""
        return (*self.shape, bytes_for(self.ring))

    @property
    def specs(self) -> list[tuple[torch.dtype, Shape]]:
        """B's tensors as the dealer gets them: a matrix as a `Matrix` holds it, where that is no larger."""
        dtypes = {4: (torch.int32,), 6: (torch.int32, torch.int16), 8: (torch.int64,)}
        whole = dtypes.get(bytes_for(self.ring))
        if whole is None or len(self.shape) != 2:
            return [(torch.uint8, self.packed)]
        return [(dtype, self.shape) for dtype in whole]

    @property
    def nbytes(self) -> int:
        return math.prod(self.packed)

    @property
    def text(self) -> str:
        """The place in one line: what seeds and files are bound to."""
        return f"{self.step} {'x'.join(map(str, self.shape))} ring {self.ring} bits {self.bits}\n"


def places_digest(places: Sequence[OperandPlace]) -> str:
    """Return a digest of the public places of all operands, in order: a set-up fits one layout alone."""
    return hashlib.sha256("".join(place.text for place in places).encode()).hexdigest()


class StandingMasks(ABC):
    """One party's answers for the operands of one phase, in the program's order."""

    def __init__(self) -> None:
        self.places: list[OperandPlace] = []

    def take(self, x: Share, ring: int, step: str) -> KnownOperand | MaskedOperand:
        """Return x, which the server knows, as an operand, at no message; a matrix as a known one."""
        place = OperandPlace(step, tuple(x.shape), ring, x.bits)
        self.places.append(place)
        return self._matrix(x, place) if is_known_matrix(x) else self._operand(x, place)

    @abstractmethod
    def _operand(self, x: Share, place: OperandPlace) -> MaskedOperand: ...

    @abstractmethod
    def _matrix(self, x: Share, place: OperandPlace) -> KnownOperand: ...

    def _known(
        self, held: Any, x: Share, place: OperandPlace, dealt: Matrix | RemoteMatrix | None = None
    ) -> KnownOperand:
        number = len(self.places) - 1
        return KnownOperand(
            held, Rank.SERVER, x.bits, place.ring, dealt, name=f"{place.step}/{number}", number=number
        )


class OwnersMasks(StandingMasks):
    """At the server: collects the integers as the program gives them, and splits them once all are known.

    A matrix stays W itself, and its B is computed where it is needed. Until `finish` any other operand's
    mask holds W, too, and its opened part nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operands: list[KnownOperand | MaskedOperand] = []
        self.seed = b""
        self.digest = ""  # of all of B, packed

    def _operand(self, x: Share, place: OperandPlace) -> MaskedOperand:
        whole = x.data.contiguous()  # taken over: nobody else computes with what goes in here
        blank, known = torch.empty_like(whole), known_rows(x)
        self._operands.append(found := MaskedOperand(whole, blank, x.bits, ring=place.ring, known=known))
        return found

    def _matrix(self, x: Share, place: OperandPlace) -> KnownOperand:
        held = x.data if isinstance(x.data, Matrix | RemoteMatrix) else narrow(x.data)
        self._operands.append(found := self._known(held, x, place))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all of B."""
        return sum(place.nbytes for place in self.places)

    def finish(self, master: bytes, watch: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Derive the seed from master key and integers, and split every W into V and B.

        watch: told how many bytes are done, and of how many; there are two passes.
        """
        mac, done, total = hmac.new(master, digestmod=hashlib.sha256), 0, 2 * self.nbytes
        mac.update(f"mpcache masks, format {FORMAT}\n".encode())
        for place, operand in zip(self.places, self._operands, strict=True):
            mac.update(place.text.encode())
            for block in blocks_of(operand.mask if isinstance(operand, MaskedOperand) else operand.held):
                mac.update(_bytes_of(block))
            watch(done := done + place.nbytes, total)
        self.seed = mac.digest()
        digest = hashlib.sha256()
        for number, (place, operand) in enumerate(zip(self.places, self._operands, strict=True)):
            if isinstance(operand, MaskedOperand):
                operand.public.copy_(expand(self.seed, number, place.shape))
                operand.mask.sub_(operand.public)
            for part in self._sent(number):
                digest.update(_bytes_of(part))
            watch(done := done + place.nbytes, total)
        self.digest = digest.hexdigest()

    def sent(self) -> Iterator[tuple[OperandPlace, list[torch.Tensor]]]:
        """Yield B as the dealer gets it (`OperandPlace.specs`), made when it is asked for."""
        for number, place in enumerate(self.places):
            yield place, self._sent(number)

    def _sent(self, number: int) -> list[torch.Tensor]:
        place, operand = self.places[number], self._operands[number]
        if isinstance(operand, MaskedOperand):
            return [pack_modulo(operand.mask, place.ring)]
        parts = [torch.empty(shape, dtype=dtype) for dtype, shape in place.specs]
        for rows, mask in SeededMatrix(self.seed, number, place).blocks():
            block = wide(operand.held[rows]) - wide(mask)
            if parts[0].dtype is torch.uint8:
                parts[0][rows] = pack_modulo(block, place.ring)
                continue
            for i, part in enumerate(parts):
                part[rows].copy_(block >> 32 * i)
        return parts

    def splits(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Return whether all of these lie in the memory of masks, so that `finish` splits them, too."""
        split = (operand for operand in self._operands if isinstance(operand, MaskedOperand))
        mine = {operand.mask.untyped_storage().data_ptr() for operand in split}
        return all(tensor.untyped_storage().data_ptr() in mine for tensor in tensors)


class ClientsMasks(StandingMasks):
    """At the client: V from the seed, expanded when a product first needs it; a matrix, in each product.

    Its share of B is zero.
    """

    def __init__(self, seed: bytes, matrix: Callable[[bytes, int, OperandPlace], Any] | None = None) -> None:
        """Expand V of a matrix by `matrix`, where it is given."""
        super().__init__()
        self._seed, self._v_of = seed, matrix or SeededMatrix

    def _operand(self, x: Share, place: OperandPlace) -> MaskedOperand:
        number = len(self.places) - 1
        opened = Awaited(lambda: expand(self._seed, number, place.shape))
        return MaskedOperand(zeros(place.shape), opened, x.bits, ring=place.ring, known=known_rows(x))

    def _matrix(self, x: Share, place: OperandPlace) -> KnownOperand:
        held = self._v_of(self._seed, len(self.places) - 1, place)
        return self._known(held, x, place)


class DealersMasks(StandingMasks):
    """At the dealer: B, in the program's order. take_next: gives the next one, as `dealt_of` holds it."""

    def __init__(self, take_next: Callable[[OperandPlace], Dealt]) -> None:
        super().__init__()
        self._take_next = take_next

    def _operand(self, x: Share, place: OperandPlace) -> MaskedOperand:
        blank: torch.Tensor = MetaTensor(place.shape)  # type: ignore[assignment]
        dealt = self._take_next(place)
        assert isinstance(dealt, torch.Tensor)
        return MaskedOperand(blank, blank, x.bits, dealt, place.ring, known_rows(x))

    def _matrix(self, x: Share, place: OperandPlace) -> KnownOperand:
        dealt = self._take_next(place)
        assert isinstance(dealt, Matrix | RemoteMatrix)
        return self._known(Matrix(MetaTensor(place.shape)), x, place, dealt)


# --------------------------------------------------------------------------------------- V, seed, B


def seed_digest(seed: bytes) -> str:
    """Return what a client tells the server of its seed, and nobody else."""
    return derive_key(seed, "masks/digest").hex()


def expand(seed: bytes, number: int, shape: Shape) -> torch.Tensor:
    """Expand V of operand `number`: int64, uniform; the same at the server and at all of its clients."""
    return KeyStream(seed, f"masks/{number}").tensor(shape)


class SeededMatrix:
    """V of a matrix (k, n), uniform modulo 2^ring; it takes no memory.

    The key stream of a few rows, made in the CPU's cache for each product, is there about as fast as the rows
    would come from memory. Up to a ring of 48 a stream of 4 bytes for each number goes below one of 2 bytes;
    else it is one of 8 bytes.
    """

    def __init__(self, seed: bytes, number: int, place: OperandPlace, rows: slice | None = None) -> None:
        """Stand for V, or for some of its rows."""
        self._seed, self._number, self._place = seed, number, place
        self._first: int = 0 if rows is None else rows.start
        self.shape: tuple[int, ...] = place.shape
        if rows is not None:
            self.shape = (rows.stop - rows.start, place.shape[1])

    def blocks(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield V's rows, a few at a time, in memory that the next ones take."""
        dtypes = (torch.int32, torch.int16) if self._place.ring <= 48 else (torch.int64,)
        names = [f"masks/{self._number}/{name}" for name in ("low", "high")[: len(dtypes)]]
        before = self._first * self.shape[1]
        streams = [
            KeyStream(self._seed, name, before * dtype.itemsize)
            for name, dtype in zip(names, dtypes, strict=True)
        ]
        most = next(rows_of(self.shape, _IN_CACHE), slice(0, 0)).stop
        parts = [torch.empty((most, self.shape[1]), dtype=dtype) for dtype in dtypes]
        held, rooms = Matrix(*parts), [_bytes_of(part) for part in parts]
        for rows in rows_of(self.shape, _IN_CACHE):
            count = rows.stop - rows.start
            for room, stream in zip(rooms, streams, strict=True):
                stream.fill(room[: len(room) // most * count])
            yield rows, held if count == most else held[:count]


def pack_modulo(x: torch.Tensor, ring: int) -> torch.Tensor:
    """Take the bytes of integers modulo 2^ring: (*, n) int64 -> (*, n, width) uint8."""
    return pack(x, bytes_for(ring))


def dealt_of(place: OperandPlace, parts: Sequence[torch.Tensor]) -> Dealt:
    """Take B as it was sent (`OperandPlace.specs`): a matrix lies in the memory that it came in."""
    if place.specs[0][0] is not torch.uint8:
        return Matrix(*parts)
    whole = unpack(parts[0])
    return narrow(whole, place.ring) if len(place.shape) == 2 else whole


def sent_of(place: OperandPlace, dealt: Dealt) -> list[torch.Tensor]:
    """Return what `dealt_of` took: B as it is sent, and kept on a disk."""
    if place.specs[0][0] is torch.uint8:
        return [pack_modulo(wide(dealt), place.ring)]
    assert isinstance(dealt, Matrix)
    return [dealt.low] if dealt.high is None else [dealt.low, dealt.high]


def digest_of(sent: Iterable[Sequence[torch.Tensor]]) -> str:
    """Return what the dealer tells the server of the B that it holds, and nobody else."""
    digest = hashlib.sha256()
    for parts in sent:
        for part in parts:
            digest.update(_bytes_of(part))
    return digest.hexdigest()


def _bytes_of(x: torch.Tensor) -> memoryview:
    return x.reshape(-1).view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------- what asks


def standing_masks(x: Share, ring: int) -> Callable[[object, str], KnownOperand | MaskedOperand | None]:
    """Return what a program calls for an operand: this party's answer, or None if it masks anew."""

    def ask(party: object, step: str) -> KnownOperand | MaskedOperand | None:
        masks: StandingMasks | None = getattr(party, "standing", None)
        return None if masks is None or x.owner is not Rank.SERVER else masks.take(x, ring, step)

    return ask
