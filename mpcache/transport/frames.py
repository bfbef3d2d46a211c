"""Carry messages as frames (`mpcache.transport.message`): order, checks, counting.

`FrameLink` is a Link over anything that carries frames of bytes to the peer in order. A carrier hands
received bytes to `arrived`, on any thread, which refuses by size and kind, before it parses, what may not
come now (`mpcache.transport.session_order`) and what there is no room for (`mpcache.transport.flow_control`).
The party's own thread takes the frames out, checks each against what the program expects, and only then
gives it memory.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

import torch
from google.protobuf.message import DecodeError

from mpcache.errors import Desync, LinkError, PeerFailed, PeerLost, PeerTimeout
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.flow_control import (
    FACTS_BYTES,
    SMALL_BYTES,
    Sent,
    frame_cost,
    largest_frame,
    queue_room,
)
from mpcache.transport.link import Buffer, Hello, Layout, Link, Spec
from mpcache.transport.message import (
    KIND_NAMED,
    IncomingMessage,
    frames_of,
    is_one_field,
    kind_of,
    laid_out,
    layout_of,
    tensors_in,
)
from mpcache.transport.network import Shaper
from mpcache.transport.session_order import AGREED, FrameKind, Order
from mpcache_protos import party_pb2 as pb

REASON_CHARACTERS = 2000
LOOK_EVERY_S = 0.2  # while a shaped message is waited for
_LOOK = "look"  # wakes a sender that waits for room

# A frame with what it is, its size, and when it may be taken; None: a failure, or Bye.
Arrived = tuple[pb.Frame, FrameKind, int, float] | str | None


class FrameLink(Link):
    """A Link over an ordered carrier of frames; a subclass says how they leave (`_carry`)."""

    def __init__(self, me: Rank, peer: Rank, ledger: Ledger, timeout_s: float) -> None:
        self.me, self.peer, self.ledger = me, peer, ledger
        self.offline = Rank.DEALER in (me, peer)
        self.timeout_s = timeout_s  # longest silence while waiting for a frame
        self._inbox: SimpleQueue[Arrived] = SimpleQueue()
        self._early: deque[Arrived] = deque()  # taken from there, and not due yet
        self.before_frame = lambda: None
        self.shaper: Shaper | None = None  # what comes in is as slow as this network
        # Both become wider with `facts/agreed`.
        self.sent = Sent(queue_room(me, peer, agreed=False))
        self.room = queue_room(peer, me, agreed=False)  # bytes of frames that may wait here
        self.order = Order()
        self._out = Lock()  # frames leave in the order in which they are kept
        self._wants_room = False
        self._failure: LinkError | None = None
        self._closed = False
        self.peer_left = False  # it said Bye or Abort
        self._sent = 0  # messages so far in each direction
        self._received = 0
        # Frames so far: `_came` and `_came_cost` on the carrier's thread, the others on the party's.
        self._came = self._came_cost = 0
        self._took = self._took_cost = self._confirmed_cost = 0

    def widen(self) -> None:
        """Give both ways the room that they have after `facts/agreed`."""
        self.room = queue_room(self.peer, self.me, agreed=True)
        self.sent.room = queue_room(self.me, self.peer, agreed=True)

    @abstractmethod
    def _carry(self, data: bytes) -> None:
        """Hand one frame to the carrier. Never blocks."""

    def _post(self, data: bytes) -> None:
        """Keep a frame until the peer has it, and hand it to the carrier. Never blocks."""
        with self._out:
            self.sent.add(data)
            self._carry(data)

    def _abort(self, data: bytes) -> None:
        """Hand over the last frame; what was sent before need not arrive."""
        self._carry(data)

    # What arrives, on the carrier's thread.

    def arrived(self, data: bytes) -> bool:
        """Take one frame in; False when it was the peer's last, or is refused: then the link has failed."""
        if (complaint := self._too_large(data)) is not None:
            return self._refuse(complaint)
        try:
            frame = pb.Frame.FromString(data)
            # What was overwritten while it was read takes memory, too, up to 16 times its own.
            if len(data) <= SMALL_BYTES and frame.ByteSize() != len(data):
                raise DecodeError
        except DecodeError:
            self.fail(Desync(f"{self.peer.label} sent bytes that are not a frame; is it the same version?"))
            return False
        kind = KIND_NAMED[frame.WhichOneof("kind")]
        if kind is FrameKind.ACK:
            return self._confirmed(frame.ack.frames)
        if kind is FrameKind.ABORT:
            self.peer_left = True
            reason = frame.abort.reason[:REASON_CHARACTERS]
            self.fail(PeerFailed(f"{self.peer.label} ended the session: {reason}"))
            return False
        step = frame.tensors.step if kind is FrameKind.TENSORS else frame.facts.step
        complaint = self.order.complaint(kind, step[:200])
        self._came += 1
        self._came_cost += frame_cost(len(data))
        # A Bye needs no room: nothing comes after it, and its sender may stop where the room is used up.
        over = kind is not FrameKind.BYE and self._came_cost - self._took_cost > self.room
        if complaint is None and over:
            complaint = f"more than the {self.room} bytes that may wait here"
        if complaint is not None:
            return self._refuse(complaint)
        if kind is FrameKind.BYE:
            self.peer_left = True
            self._inbox.put(None)
            return False
        due = 0.0 if self.shaper is None else self.shaper.due(len(data))
        self._inbox.put((frame, kind, len(data), due))
        return True

    def _too_large(self, data: bytes) -> str | None:
        """Return what is wrong with a frame's size, before a parser gives it memory."""
        if len(data) <= SMALL_BYTES:
            return None
        kind = kind_of(data)
        legal = kind is FrameKind.TENSORS and len(data) <= largest_frame(self.me, self.peer)
        return None if legal and is_one_field(data) else f"a frame of {len(data)} bytes of {kind}"

    def _refuse(self, complaint: str) -> bool:
        self.fail(Desync(f"Desync: {self.peer.label} sends {complaint}, which is not legal"))
        return False

    def _confirmed(self, frames: int) -> bool:
        before = self.sent.taken
        if not self.sent.took(frames):
            self.fail(Desync(f"Desync: {self.peer.label} confirms frame {frames}, which was not sent"))
            return False
        if self._wants_room and frames > before:  # so that repeating itself fills nothing
            self._inbox.put(_LOOK)
        return True

    def fail(self, error: LinkError) -> None:
        """From now on every call raises this error; also wakes a waiting `recv`. First error wins."""
        if self._failure is None:
            self._failure = error
        self._inbox.put(None)

    # What the party's own thread does.

    def send(self, step: str, tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None) -> None:
        self._send(step, *laid_out(tensors), labels, None)

    def recv(
        self, step: str, specs: Sequence[Spec], labels: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        return tensors_in(self._recv(IncomingMessage(step, layout_of(tuple(specs))), labels), specs)

    def exchange(
        self, step: str, tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        buffers, layout = laid_out(tensors)
        data = self.swap(step, buffers, layout, layout, labels, labels)
        return tensors_in(data, [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])

    def swap(
        self, step: str, outgoing: Sequence[Buffer], leaving: Layout, coming: Layout,
        labels_out: Sequence[str] | None = None, labels_in: Sequence[str] | None = None,
    ) -> bytes | bytearray:  # fmt: skip
        self.ledger.book(step, rounds=1)
        message = IncomingMessage(step, coming) if coming.text else None
        if leaving.text:
            self._send(step, outgoing, leaving, labels_out, message)
        return self._recv(message, labels_in) if message is not None else b""

    def _send(
        self, step: str, buffers: Sequence[Buffer], layout: Layout, labels: Sequence[str] | None,
        coming: IncomingMessage | None,
    ) -> None:  # fmt: skip
        self.check_alive(step)
        for data in frames_of(self._sent, step, buffers, layout):
            self.before_frame()
            if not self.sent.fits(len(data)):
                self._make_room(step, len(data), coming)
            self.ledger.wire_bytes += len(data)
            self._post(data)
        self._sent += 1
        self._book("sent", step, layout.sizes, labels)

    def _recv(self, coming: IncomingMessage, labels: Sequence[str] | None) -> bytes | bytearray:
        while not coming.complete:
            self._take(coming, self._next(FrameKind.TENSORS, coming.step))
        self._received += 1
        self._book("received", coming.step, coming.layout.sizes, labels)
        return coming.data

    def _make_room(self, step: str, size: int, coming: IncomingMessage | None) -> None:
        """Wait until the peer has taken enough.

        If the peer sends, too (`coming`), take that in meanwhile: two that only send would wait for each
        other. Raises PeerLost if the peer has ended its session: it takes nothing any more.
        """
        self._wants_room = True
        while not self.sent.fits(size):
            if coming is not None and not coming.complete:
                frame = self._next(FrameKind.TENSORS, step, or_look=True)
                if frame is not None:
                    self._take(coming, frame)
                continue
            limit = time.monotonic() + self.timeout_s
            while not self.sent.wait(size, LOOK_EVERY_S):
                self.check_alive(step)
                self.before_frame()
                if self.peer_left:
                    raise self._left(step)
                if time.monotonic() >= limit:
                    raise PeerTimeout(
                        f"{self.me.label} at {step}: {self.peer.label} has taken nothing for "
                        f"{self.timeout_s:g} s; it is stuck, or slow: then raise timeouts.recv_s"
                    )
        self._wants_room = False

    def send_facts(self, step: str, facts: Mapping[str, object]) -> None:
        self.check_alive(step)
        text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
        size = len(text.encode())
        if size > FACTS_BYTES:
            raise ValueError(f"facts at {step} take {size} bytes; at most {FACTS_BYTES} are sent")
        if step == AGREED:  # who reads this may be as far ahead as the plan allows
            self.room = queue_room(self.peer, self.me, agreed=True)
        self._send_frame(pb.Frame(facts=pb.Facts(sequence=self._sent, step=step, json=text)))
        self._sent += 1
        self._book("sent", step, [size], None)

    def recv_facts(self, step: str, patience: float | None = None) -> dict[str, Any]:
        return self._facts_of(self._next(FrameKind.FACTS, step, patience=patience).facts, step)

    def skip_to_facts(self, step: str) -> dict[str, Any]:
        while (frame := self._next(FrameKind.FACTS, step, skip=True)).WhichOneof("kind") != FrameKind.FACTS:
            pass
        self._received = max(self._received, frame.facts.sequence)  # of what was dropped, any number
        return self._facts_of(frame.facts, step)

    def _facts_of(self, message: Any, step: str) -> dict[str, Any]:
        """Return what a message holds that should be these facts. Raises Desync."""
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
        if step == AGREED:
            self.sent.room = queue_room(self.me, self.peer, agreed=True)
        self._received += 1
        self._book("received", step, [size], None)
        return facts

    def poll_facts(self, step: str) -> dict[str, Any] | None:
        return self.recv_facts(step) if self._has_come(step) else None

    def _has_come(self, step: str) -> bool:
        """Return whether a frame is there, and due; it stays the next. Raises what the link failed with."""
        item: Arrived = _LOOK
        while item is _LOOK:
            self.check_alive(step)
            try:
                item = self._from_inbox(0.0)
            except Empty:
                return False
        self._early.appendleft(item)
        return not (isinstance(item, tuple) and item[3] > time.monotonic())

    def close(self, reason: str = "") -> None:
        if self._closed:
            return
        self._closed = True
        if self._failure is None:
            self._failure = LinkError("this link was closed here")
        if reason:
            abort = pb.Frame(abort=pb.Abort(reason=reason[:REASON_CHARACTERS]))
            self._abort(abort.SerializeToString())
        else:
            self._post(pb.Frame(bye=pb.Bye()).SerializeToString())

    def send_hello(self, hello: Hello) -> None:
        self.check_alive("hello")
        said = pb.Hello(version=hello.version, rank=hello.rank, nonce=hello.nonce, public=dict(hello.public))
        self._send_frame(pb.Frame(hello=said))

    def poll_hello(self) -> Hello | None:
        return self.recv_hello() if self._has_come("hello") else None

    def recv_hello(self) -> Hello:
        message = self._next(FrameKind.HELLO, "hello").hello
        if message.rank not in tuple(Rank):
            raise self._desync(f"rank {message.rank}", "0, 1 or 2")
        return Hello(message.version, Rank(message.rank), message.nonce, dict(message.public))

    # Helpers.

    def _send_frame(self, frame: pb.Frame) -> None:
        data = frame.SerializeToString()
        self.ledger.wire_bytes += len(data)
        self._post(data)

    def _next(
        self, kind: FrameKind, step: str, or_look: bool = False, skip: bool = False,
        patience: float | None = None,
    ) -> Any:  # fmt: skip
        """Return the peer's next frame, of this kind or, with `skip`, of tensors.

        With `or_look` it is None if there may be room to send. patience: as in `recv_facts`.
        """
        self.check_alive(step)
        wait_s = self.timeout_s if patience is None else patience
        item: Arrived = _LOOK
        while item is _LOOK:
            try:
                item = self._from_inbox(wait_s)
            except Empty:
                raise self._silent(step, wait_s, patience is None) from None
            self.check_alive(step)
            if or_look and item is _LOOK:
                return None
        if item is None:
            self._inbox.put(None)  # for the next call, too
            raise self._left(step)
        assert not isinstance(item, str)
        frame, found, size, due = item
        self._until(due, step)
        self.ledger.wire_bytes += size
        self._took_one(size)
        if found is not kind and not (skip and found is FrameKind.TENSORS):
            where = frame.tensors.step or frame.facts.step or "its start"
            raise self._desync(f"{found} at {where}", f"{kind} at {step}")
        return frame

    def _silent(self, step: str, seconds: float, working: bool) -> PeerTimeout:
        """Return the error for a peer that says nothing. working: it should have, else it was waited for."""
        who = f"{self.me.label} at {step}: no word from {self.peer.label} for {seconds:g} s"
        if not working:
            return PeerTimeout(f"{who}, which is as long as timeouts.idle_s lets a session wait")
        return PeerTimeout(f"{who}; it is stuck, or slow: then raise timeouts.recv_s")

    def _from_inbox(self, wait_s: float) -> Arrived:
        """Return what came first. Raises Empty if nothing comes within `wait_s`."""
        return self._early.popleft() if self._early else self._inbox.get(timeout=wait_s)

    def _took_one(self, size: int) -> None:
        """Count a frame that has left the queue; now and then the peer is told."""
        self._took += 1
        self._took_cost += frame_cost(size)
        if self._took_cost - self._confirmed_cost >= self.room // 4:
            self._confirmed_cost = self._took_cost
            self._carry(self._ack())

    def _ack(self) -> bytes:
        data: bytes = pb.Frame(ack=pb.Ack(frames=self._took)).SerializeToString()
        return data

    def _until(self, due: float, step: str) -> None:
        """Wait for a time of the shaper's clock, with an eye on the link."""
        while due and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_EVERY_S))
            self.check_alive(step)

    def _take(self, coming: IncomingMessage, frame: pb.Frame) -> None:
        """Check one frame against the message that is expected, and take what it holds."""
        message, step, offset = frame.tensors, coming.step, coming.offset
        self._check_order(step, message.step, message.sequence)
        expected = "" if coming.begun else coming.layout.text
        if message.layout != expected:
            theirs, ours = (text[:500] or "no tensor" for text in (message.layout, expected))
            raise self._desync(f"{theirs} at {step}", f"{ours} there")
        data: bytes = message.data
        left = coming.layout.total - offset
        if message.offset != offset or len(data) > left or len(data) < min(left, 1):
            raise self._desync(
                f"{len(data)} bytes from byte {message.offset} of {step}",
                f"up to {left} from byte {offset} there",
            )
        coming.add(data)

    def check_alive(self, step: str) -> None:
        if self._failure is not None:
            raise type(self._failure)(f"{self.me.label} at {step}: {self._failure}")

    def _left(self, step: str) -> PeerLost:
        return PeerLost(f"{self.me.label} at {step}: {self.peer.label} has ended its session")

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
        self.ledger.book_each(amount, labels or (step,), sizes if labels else (sum(sizes),))
