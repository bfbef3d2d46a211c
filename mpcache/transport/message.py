"""Split one message into frames and put it together (protos/mpcache_protos/party.proto)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod

import numpy as np
import torch

from mpcache.tensor_bytes import tensor_at
from mpcache.transport.flow_control import CHUNK_BYTES, LAYOUT_BYTES
from mpcache.transport.link import DTYPES, Buffer, Layout, Spec
from mpcache.transport.session_order import FrameKind
from mpcache_protos import party_pb2 as pb

_ALIGNMENT = 8  # bytes: received tensors lie in the message's own memory

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KINDS = {field.number: FrameKind(field.name) for field in pb.Frame.DESCRIPTOR.fields}
KIND_NAMED = {kind.value: kind for kind in _KINDS.values()} | {None: FrameKind.UNKNOWN}  # by `WhichOneof`
# What a field of bytes begins with: its number, times 8, and 2.
_BATCH_TAG, _FRAME_TAG = b"\x3a", b"\x0a"  # a frame's batch, a batch's frames
_TENSORS_TAG, _DATA_TAG = b"\x12", b"\x2a"  # a frame's tensors, their data

if sys.byteorder != "little":  # tensors travel as they lie in memory
    raise ImportError("mpcache runs on little-endian machines only")


@lru_cache(maxsize=4096)  # a decode step asks for the same ones again for every token
def layout_of(specs: tuple[Spec, ...]) -> Layout:
    """Return how tensors of these dtypes and shapes lie in a message: each at a multiple of 8 bytes."""
    text = " ".join(_NAMES[dtype] + str(tuple(shape)) for dtype, shape in specs)
    sizes = tuple(prod(shape) * dtype.itemsize for dtype, shape in specs)
    starts, end = [], 0
    for size in sizes:
        start = end + -end % _ALIGNMENT
        starts.append(start)
        end = start + size
    return Layout(text, tuple(starts), sizes, end)


def laid_out(tensors: Sequence[torch.Tensor]) -> tuple[list[Buffer], Layout]:
    """Return what lies in the tensors, and between them, and how."""
    layout = layout_of(tuple((tensor.dtype, tensor.shape) for tensor in tensors))
    buffers, end = list[Buffer](), 0
    for tensor, start, size in zip(tensors, layout.starts, layout.sizes, strict=True):
        if start > end:
            buffers.append(bytes(start - end))
        buffers.append(np.ascontiguousarray(tensor.numpy(force=True)).reshape(-1).view(np.uint8).data)
        end = start + size
    return buffers, layout


def frames_of(sequence: int, step: str, buffers: Sequence[Buffer], layout: Layout) -> Iterator[bytes]:
    """Yield one message as serialised frames, each with at most CHUNK_BYTES of data. Copies the buffers.

    Raises ValueError on more tensors than one message has room to describe.
    """
    if len(layout.text) > LAYOUT_BYTES:
        raise ValueError(f"{len(layout.sizes)} tensors at {step} are too many for one message")
    if layout.total <= CHUNK_BYTES:  # nearly all
        yield _frame_of(sequence, step, layout.text, 0, buffers)
        return
    offset = 0
    for piece in _pieces(buffers):
        yield _frame_of(sequence, step, "" if offset else layout.text, offset, [piece])
        offset += len(piece)


def _frame_of(sequence: int, step: str, layout: str, offset: int, buffers: Sequence[Buffer]) -> bytes:
    """Serialise a frame as protobuf does, its data copied once, where protobuf copies it four times."""
    message = pb.Tensors(sequence=sequence, step=step, layout=layout, offset=offset)
    pieces: list[Buffer] = [message.SerializeToString()]
    if size := sum(map(len, buffers)):  # the last field, and none if it is empty
        pieces += [_DATA_TAG, _varint(size), *buffers]
    return b"".join([_TENSORS_TAG, _varint(sum(map(len, pieces))), *pieces])


def _pieces(buffers: Sequence[Buffer]) -> Iterator[bytes]:
    """Yield what is in the buffers, one after another, CHUNK_BYTES at once; one piece at least."""
    piece, room = list[Buffer](), CHUNK_BYTES
    for buffer in buffers:
        while len(buffer) > room:
            yield b"".join([*piece, buffer[:room]])
            buffer, piece, room = buffer[room:], [], CHUNK_BYTES
        piece.append(buffer)
        room -= len(buffer)
    yield b"".join(piece)


def kind_of(data: bytes) -> FrameKind:
    """Return what a frame is, or would be, by its first byte."""
    return _KINDS.get(data[0] >> 3, FrameKind.UNKNOWN) if data else FrameKind.UNKNOWN


def is_one_field(data: bytes) -> bool:
    """Return whether the frame's first field, of a length that it states, is all there is.

    Else a few bytes could stand for a message each, and take fifty times their own memory when parsed.
    """
    try:
        return _field_at(data, 0)[1] == len(data)
    except ValueError:
        return False


def _field_at(data: bytes, at: int) -> tuple[int, int]:
    """Return where the field of bytes at this place begins behind its head, and ends. Raises ValueError."""
    size = 0
    for i, byte in enumerate(data[at + 1 : at + 6]):
        size |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            start = at + i + 2
            if start + size > len(data):
                break
            return start, start + size
    raise ValueError("a field that does not end")


def batch_of(frames: Sequence[bytes]) -> bytes:
    """Put serialised frames into one, a `Batch`; a single one stays as it is."""
    if len(frames) == 1:
        return frames[0]
    pieces = [piece for frame in frames for piece in (_FRAME_TAG, _varint(len(frame)), frame)]
    return b"".join([_BATCH_TAG, _varint(sum(map(len, pieces))), *pieces])


def frames_in(data: bytes) -> Iterator[bytes]:
    """Yield the frames of a `Batch`, else the frame that this is. Raises ValueError where it is malformed."""
    if kind_of(data) is not FrameKind.BATCH:
        yield data
        return
    if not is_one_field(data):
        raise ValueError("more than a batch")
    at = _field_at(data, 0)[0]
    while at < len(data):
        if data[at : at + 1] != _FRAME_TAG:
            raise ValueError("no frame")
        start, at = _field_at(data, at)
        yield data[start:at]


def _varint(n: int) -> bytes:
    """Write a length as protobuf does."""
    low = n & 0x7F
    return bytes([low]) if n == low else bytes([low | 0x80]) + _varint(n >> 7)


def tensors_in(data: bytes | bytearray, specs: Sequence[Spec]) -> list[torch.Tensor]:
    """Return what a message's data holds as tensors that may be written to."""
    own = bytearray(data) if isinstance(data, bytes) else data
    starts = layout_of(tuple(specs)).starts
    return [tensor_at(own, dtype, shape, start) for (dtype, shape), start in zip(specs, starts, strict=True)]


class IncomingMessage:
    """A message that is being taken in, frame by frame."""

    def __init__(self, step: str, layout: Layout) -> None:
        self.step, self.layout = step, layout
        self.offset = 0  # bytes that are there
        self.begun = False
        self.data: bytes | bytearray = b""  # as it came, where one frame brought all

    @property
    def complete(self) -> bool:
        return self.begun and self.offset == self.layout.total

    def add(self, data: bytes) -> None:
        """Add the next bytes, which have been checked. The first ones give the message its memory."""
        if len(data) == self.layout.total:
            self.data = data
        else:
            if not self.begun:
                self.data = bytearray(self.layout.total)
            self.data[self.offset : self.offset + len(data)] = data  # type: ignore[index]
        self.begun = True
        self.offset += len(data)
