"""Messages as frames (protos/party.proto): cutting, checking, putting together, counting.

`FrameLink` is a Link over anything that carries frames of bytes to the peer in order. Whoever
receives bytes hands them to `arrived`, on any thread; the party's own thread takes them out, checks
each against what the program expects now, and only then gives it memory.
"""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue

import numpy as np
import torch
from google.protobuf.message import DecodeError

from mpcache.errors import Desync, LinkError, PeerFailed, PeerLost, PeerTimeout
from mpcache.ledger import Ledger
from mpcache.link import Fact, Facts, Hello, Link, Spec
from mpcache.rank import Rank
from protos import party_pb2 as pb

CHUNK_BYTES = 1 << 20  # of tensor data in one frame
FRAME_BYTES = 2 << 20  # what a receiver takes: a chunk and its headers, with room
FACTS_BYTES = 64 << 10
REASON_CHARACTERS = 2000
_HEADER_BYTES = 64  # about what a chunk adds to its data

_DTYPES: dict[torch.dtype, tuple[int, type[np.generic]]] = {
    torch.int64: (pb.INT64, np.int64),
    torch.int32: (pb.INT32, np.int32),
    torch.int16: (pb.INT16, np.int16),
    torch.int8: (pb.INT8, np.int8),
    torch.uint8: (pb.UINT8, np.uint8),
    torch.float32: (pb.FLOAT32, np.float32),
    torch.float64: (pb.FLOAT64, np.float64),
    torch.bool: (pb.BOOL, np.bool_),
}

if sys.byteorder != "little":  # tensors travel as they lie in memory
    raise ImportError("mpcache runs on little-endian machines only")


# Small messages decide a round's latency. Nearly every torch operation lets another thread have the
# interpreter for a moment, and waits to get it back, so here tensors are handled through numpy.


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The elements of a contiguous array as uint8 (nbytes,), without a copy."""
    return array.reshape(-1).view(np.uint8)


def _spec_text(dtype: int, shape: Sequence[int]) -> str:
    name = pb.Dtype.Name(dtype) if dtype in pb.Dtype.values() else f"dtype {dtype}"
    return f"{name.lower()} {tuple(shape)}"


def cut(sequence: int, step: str, tensors: Sequence[torch.Tensor]) -> Iterable[bytes]:
    """One message as serialised frames, each with at most about CHUNK_BYTES of data."""
    if sum(tensor.nbytes + _HEADER_BYTES for tensor in tensors) > CHUNK_BYTES:
        return _cut_large(sequence, step, tensors)
    chunks = [
        pb.Chunk(
            index=index,
            dtype=_DTYPES[tensor.dtype][0],
            shape=tensor.shape,
            data=tensor.numpy(force=True).tobytes(),
        )
        for index, tensor in enumerate(tensors)
    ]
    message = pb.Tensors(sequence=sequence, step=step, count=len(chunks), chunks=chunks)
    return (pb.Frame(tensors=message).SerializeToString(),)


def _cut_large(sequence: int, step: str, tensors: Sequence[torch.Tensor]) -> Iterator[bytes]:
    message, room = pb.Tensors(sequence=sequence, step=step, count=len(tensors)), CHUNK_BYTES
    for index, tensor in enumerate(tensors):
        code, data = _DTYPES[tensor.dtype][0], _bytes_of(np.ascontiguousarray(tensor.numpy(force=True)))
        offset = 0
        while offset < max(1, len(data)):  # an empty tensor has one chunk, too
            piece = data[offset : offset + room].tobytes()
            message.chunks.add(index=index, dtype=code, shape=tensor.shape, offset=offset, data=piece)
            offset += max(1, len(piece))
            room -= len(piece) + _HEADER_BYTES
            if room <= 0:
                yield pb.Frame(tensors=message).SerializeToString()
                message, room = pb.Tensors(sequence=sequence, step=step, count=len(tensors)), CHUNK_BYTES
    if message.chunks:
        yield pb.Frame(tensors=message).SerializeToString()


class FrameLink(Link):
    """A Link over an ordered carrier of frames; a subclass says how they leave (`_post`)."""

    def __init__(self, me: Rank, peer: Rank, ledger: Ledger, timeout_s: float) -> None:
        self.me, self.peer, self.ledger = me, peer, ledger
        self.offline = Rank.DEALER in (me, peer)
        self.timeout_s = timeout_s  # longest silence while waiting for a frame
        self._inbox: SimpleQueue[tuple[pb.Frame, int] | None] = SimpleQueue()  # None: a failure, or Bye
        self._failure: LinkError | None = None
        self._closed = False
        self._sent = 0  # messages so far in each direction
        self._received = 0

    @abstractmethod
    def _post(self, data: bytes) -> None:
        """Queue one frame towards the peer. Never blocks."""

    # What arrives, on the carrier's thread.

    def arrived(self, data: bytes) -> bool:
        """Take one frame in; False when it was the peer's last."""
        try:
            frame = pb.Frame.FromString(data)
        except DecodeError:
            self.fail(Desync(f"{self.peer.label} sent bytes that are not a frame; is it the same version?"))
            return False
        kind = frame.WhichOneof("kind")
        if kind == "abort":
            reason = frame.abort.reason[:REASON_CHARACTERS]
            self.fail(PeerFailed(f"{self.peer.label} ended the session: {reason}"))
            return False
        self._inbox.put(None if kind == "bye" else (frame, len(data)))
        return bool(kind != "bye")

    def fail(self, error: LinkError) -> None:
        """From now on every call raises this error; also wakes a waiting `recv`. First error wins."""
        if self._failure is None:
            self._failure = error
        self._inbox.put(None)

    # What the party's own thread does.

    def send(self, step: str, tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None) -> None:
        self._check_alive(step)
        for data in cut(self._sent, step, tensors):
            self.ledger.wire_bytes += len(data)
            self._post(data)
        self._sent += 1
        self._book("sent", step, [t.nbytes for t in tensors], labels)

    def recv(
        self, step: str, specs: Sequence[Spec], labels: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        arrays: list[np.ndarray] = []
        room, offset = np.empty(0, np.uint8), 0  # the last array's bytes, and how many have come
        while True:
            message = self._next("tensors", step).tensors
            self._check_order(step, message.step, message.sequence)
            if message.count != len(specs):
                raise self._desync(f"{message.count} tensors at {step}", f"{len(specs)} tensors there")
            if specs and not message.chunks:
                raise self._desync(f"an empty frame at {step}", "data there")
            for chunk in message.chunks:
                if offset == len(room):  # the tensor before is complete: the next one's first chunk
                    if len(arrays) == len(specs):
                        raise self._desync(f"more data at {step}", f"no more than {len(specs)} tensors there")
                    (code, kind), shape = _DTYPES[specs[len(arrays)][0]], specs[len(arrays)][1]
                    if chunk.dtype != code or tuple(chunk.shape) != tuple(shape):
                        raise self._desync(
                            f"{_spec_text(chunk.dtype, chunk.shape)} as tensor {len(arrays)} of {step}",
                            f"{_spec_text(code, shape)} there",
                        )
                    arrays.append(np.empty(shape, kind))
                    room, offset = _bytes_of(arrays[-1]), 0
                data = chunk.data
                if (
                    chunk.index != len(arrays) - 1
                    or chunk.offset != offset
                    or len(data) > len(room) - offset
                    or (not data and len(room))
                ):
                    raise self._desync(
                        f"{len(data)} bytes at byte {chunk.offset} of tensor {chunk.index} of {step}",
                        f"byte {offset} of {len(room)} of tensor {len(arrays) - 1} there",
                    )
                room.data[offset : offset + len(data)] = data
                offset += len(data)
            if len(arrays) == len(specs) and offset == len(room):
                break
        self._received += 1
        if not self.offline:
            self.ledger.book(step, rounds=1)
        self._book("received", step, [array.nbytes for array in arrays], labels)
        return [torch.from_numpy(array) for array in arrays]

    def send_facts(self, step: str, facts: Facts) -> None:
        self._check_alive(step)
        text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
        size = len(text.encode())
        if size > FACTS_BYTES:
            raise ValueError(f"facts at {step} take {size} bytes; at most {FACTS_BYTES} are sent")
        self._send_frame(pb.Frame(facts=pb.Facts(sequence=self._sent, step=step, json=text)))
        self._sent += 1
        self._book("sent", step, [size], None)

    def recv_facts(self, step: str) -> dict[str, Fact]:
        message = self._next("facts", step).facts
        self._check_order(step, message.step, message.sequence)
        size = len(message.json.encode())
        if size > FACTS_BYTES:
            raise self._desync(f"{size} bytes of facts at {step}", f"at most {FACTS_BYTES}")
        try:
            facts = json.loads(message.json)
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise self._desync(f"facts at {step} that are not a JSON object", "one there")
        self._received += 1
        self._book("received", step, [size], None)
        return facts

    def close(self, reason: str = "") -> None:
        if self._closed:
            return
        self._closed = True
        if self._failure is None:
            self._failure = LinkError("this link was closed here")
        end = pb.Frame(bye=pb.Bye())
        if reason:
            end = pb.Frame(abort=pb.Abort(reason=reason[:REASON_CHARACTERS]))
        self._post(end.SerializeToString())

    def send_hello(self, hello: Hello) -> None:
        self._check_alive("hello")
        self._send_frame(
            pb.Frame(
                hello=pb.Hello(
                    version=hello.version, rank=hello.rank, nonce=hello.nonce, public=dict(hello.public)
                )
            )
        )

    def recv_hello(self) -> Hello:
        message = self._next("hello", "hello").hello
        if message.rank not in tuple(Rank):
            raise self._desync(f"rank {message.rank}", "0, 1 or 2")
        return Hello(message.version, Rank(message.rank), message.nonce, dict(message.public))

    # Helpers.

    def _send_frame(self, frame: pb.Frame) -> None:
        data = frame.SerializeToString()
        self.ledger.wire_bytes += len(data)
        self._post(data)

    def _next(self, kind: str, step: str) -> pb.Frame:
        """The peer's next frame, which must be of this kind."""
        self._check_alive(step)
        try:
            item = self._inbox.get(timeout=self.timeout_s)
        except Empty:
            raise PeerTimeout(
                f"{self.me.label} at {step}: no word from {self.peer.label} for {self.timeout_s:g} s; "
                "it is stuck, or slow: then raise timeouts.recv_s"
            ) from None
        self._check_alive(step)
        if item is None:
            self._inbox.put(None)  # for the next call, too
            raise PeerLost(f"{self.me.label} at {step}: {self.peer.label} has ended its session")
        frame, size = item
        self.ledger.wire_bytes += size
        found = frame.WhichOneof("kind")
        if found != kind:
            where = frame.tensors.step or frame.facts.step or "its start"
            raise self._desync(f"{found or 'an unknown message'} at {where}", f"{kind} at {step}")
        return frame

    def _check_alive(self, step: str) -> None:
        if self._failure is not None:
            raise type(self._failure)(f"{self.me.label} at {step}: {self._failure}")

    def _check_order(self, step: str, their_step: str, sequence: int) -> None:
        if their_step != step:
            (first, where), (second, there) = sorted([(self.me, step), (self.peer, their_step)])
            raise Desync(f"Desync: {first.label} is at {where}, {second.label} at {there}")
        if sequence != self._received:
            raise self._desync(f"message {sequence} at {step}", f"message {self._received} there")

    def _desync(self, theirs: str, ours: str) -> Desync:
        return Desync(f"Desync: {self.peer.label} sends {theirs}, {self.me.label} expects {ours}")

    def _book(self, way: str, step: str, sizes: Sequence[int], labels: Sequence[str] | None) -> None:
        if labels is not None and len(labels) != len(sizes):
            raise ValueError(f"{len(labels)} labels for {len(sizes)} tensors at {step}")
        amount = f"offline_{way}" if self.offline else way
        for label, size in zip(labels or [step] * len(sizes), sizes, strict=True):
            self.ledger.book(label, **{amount: size})
