"""Link two parties over gRPC streams: one at a time, and another one when it breaks.

Per link one thread reads, so that the peer's end is noticed while this party computes, and gRPC's own
thread sends: an exchange overlaps both directions. A connection that is cut ends its stream at once,
a peer that stalls stops answering HTTP/2 pings. Then the side that dialled dials again, both say how
many frames they have got, and each goes on with the next one: nothing is lost, repeated or reordered.
What does not come back within `timeouts.reconnect_s`, or whose host says sooner that its process is gone
(`mpcache_parties.network.liveness`), fails all links of this party, so that no one waits for a party that
waits for the lost one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Condition, Event, Thread, Timer
from typing import Any

import grpc

from mpcache.config import Timeouts
from mpcache.errors import Desync, LinkError, Mismatch, PeerFailed, PeerLost
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.flow_control import BATCH_BYTES
from mpcache.transport.frames import FrameLink
from mpcache.transport.message import batch_of, frames_in
from mpcache_parties.network.liveness import ASK_EVERY_S, Refusals, listens
from mpcache_parties.network.metadata import RANK_KEY, RECEIVED_KEY, Metadata, count_of
from mpcache_parties.say import Say

logging.getLogger("grpc").addHandler(logging.NullHandler())
logging.getLogger("grpc").propagate = False

ABORT_LINGER_S = 1.0  # for the reason to reach the peer
DEALER_LINGER_S = 5.0  # for a dealer that computes to leave the tape that it is in
AGAIN_AFTER_S = 0.1  # between two attempts to reconnect
# That a dealer's frame waits for others: a little, and longer where the dealer is far ahead of who needs it.
LINGER_S, AHEAD_LINGER_S = 0.003, 0.03

Queue = SimpleQueue[bytes | None]  # what gRPC's sending thread takes from; None ends the stream
Dial = Callable[[Iterator[bytes], Metadata], Any]  # opens a stream: frames to send -> gRPC's call


class GrpcLink(FrameLink):
    """One end of a link. `fail_all` tells the party's other links what happened to this one."""

    def __init__(
        self,
        me: Rank,
        peer: Rank,
        ledger: Ledger,
        timeouts: Timeouts,
        fail_all: Callable[[LinkError], None],
        say: Say,
    ) -> None:
        super().__init__(me, peer, ledger, timeouts.recv_s)
        self.connected = Event()  # has been, once
        self._ended = Event()  # no stream will come any more
        self._fail_all, self._say = fail_all, say
        self._reconnect_s = timeouts.reconnect_s
        self._state = Condition()  # guards the next four, and what arrives
        self._stream = 0  # streams that this end has taken so far
        self._over = False
        self._queue: Queue | None = None  # of the present stream
        self._cancel: Callable[[], object] = lambda: None
        self._last_word: bytes | None = None  # an Abort
        self._handed = 0  # frames that were handed to any stream
        self._beacon: str | None = None  # of a peer that dials: where it has been seen to live
        self.ahead: Callable[[], bool] = lambda: False  # whether a dealer is far ahead of its peers

    # Sending.

    def _carry(self, data: bytes) -> None:
        queue = self._queue
        if queue is not None:
            queue.put(data)

    def _post(self, data: bytes) -> None:
        with self._out:
            self.sent.add(data)
            queue = self._queue
            if queue is not None:
                self._handed += 1
                queue.put(data)

    def _switch(self, queue: Queue, received: int) -> None:
        """Send on a new stream from now on, first what the peer lacks. Raises Desync."""
        with self._out:
            try:
                frames = self.sent.after(received)
            except ValueError as wrong:
                raise Desync(f"Desync: {self.peer.label} cannot go on: {wrong}") from None
            if self._last_word is not None:
                queue.put(self._last_word)
            else:
                queue.put(self._ack())  # the last one may have been lost
                for frame in frames:
                    queue.put(frame)
                again = frames[: max(0, self._handed - received)]
                self.ledger.resent_bytes += sum(map(len, again))
                self._handed = received + len(frames)
            self._queue = queue

    # The side that dials.

    def dial(self, open_stream: Dial, address: str) -> None:
        """Keep a stream to the peer from now on; it may come up later."""
        name = f"to-{self.peer.label}"
        Thread(target=self._dialling, args=(open_stream, address), name=name, daemon=True).start()

    def _dialling(self, open_stream: Dial, address: str) -> None:
        limit: float | None = None  # while reconnecting
        refusals = Refusals(address)
        metadata: Metadata = ()
        while not self._over:
            queue: Queue = SimpleQueue()
            call = open_stream(iter(queue.get, None), metadata)
            with self._state:
                self._stream += 1
                stream, self._cancel = self._stream, call.cancel
                if self._over:
                    call.cancel()
            watch = Timer(max(0.0, limit - time.monotonic()), call.cancel) if limit is not None else None
            try:
                if watch is not None:
                    watch.start()
                received = self._greet(call, queue, address)
                self._switch(queue, received)
                if watch is not None:
                    watch.cancel()
                    self._say(f"{self.me.label}: connected to {self.peer.label} again")
                limit = None
                self.connected.set()
                # A peer that closed, too, may have ended its stream in the middle of a message.
                if self._drain(call, stream, queue, listening=False) or self._closed:
                    self._end(self._failure)
                    return
            except LinkError as error:
                self._end(error)
                return
            except Exception as broken:
                fatal = self._failure or self._fatal(broken)
                if fatal is not None:
                    self._end(fatal)
                    return
            finally:
                if watch is not None:
                    watch.cancel()
                queue.put(None)
            if self.connected.is_set():
                if self._last_word is not None:
                    break
                if limit is None:
                    limit, refusals = self._broken(), Refusals(address)
                elif refusals.gone():
                    self._end(self._lost(address))
                    return
                if time.monotonic() >= limit:
                    self._end(self._lost())
                    return
            metadata = ((RECEIVED_KEY, str(self._came)),)
            time.sleep(AGAIN_AFTER_S)
        self._end(None)

    def _greet(self, call: Any, queue: Queue, address: str) -> int:
        """Wait for the peer's metadata; return how many frames it has got. Raises what the call raises."""
        metadata: Mapping[str, str] = dict(call.initial_metadata() or ())
        rank = metadata.get(RANK_KEY)
        if rank is None:  # refused or lost: let the stream say why
            next(call)
        if rank != str(int(self.peer)):
            found = f"rank {rank} listens at {address}, where {self.me.label} expects {self.peer.label}"
            self._fail_all(Mismatch(f"Mismatch: {found}; check `addresses` in the config"))
            self._queue = queue  # for the reason, which `close` sends
            self.connected.set()
            for _ in call:
                pass
            raise self._failure or self._lost()
        return count_of(metadata.get(RECEIVED_KEY))

    def _fatal(self, broken: Exception) -> LinkError | None:
        """Return what a stream ended with; None if it is worth another attempt."""
        code = broken.code() if isinstance(broken, grpc.RpcError) and hasattr(broken, "code") else None
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return PeerFailed(f"{self.peer.label} refused: {broken.details()}")  # type: ignore[attr-defined]
        if code is grpc.StatusCode.UNIMPLEMENTED:
            where = f"the address of {self.peer.label}"
            return Mismatch(f"Mismatch: what listens at {where} is not an mpcache party; check `addresses`")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Desync(f"Desync: a frame between {self.me.label} and {self.peer.label} is too large")
        return None

    # The side that listens.

    def accept(
        self, frames: Iterator[bytes], context: grpc.ServicerContext, received: int, beacon: str | None
    ) -> Iterator[bytes]:
        """Take a stream from the peer, which has got `received` frames; return what to send. Raises Desync.

        beacon: HOST:PORT where it says that it lives.
        """
        queue: Queue = SimpleQueue()
        with self._state:
            self._stream += 1
            stream, came = self._stream, self._came
            self._cancel()  # the stream before this one, if it is not known to be broken
            self._cancel = context.cancel
            self._state.notify_all()
            if self._queue is not None:
                self._queue.put(None)
        context.send_initial_metadata(((RANK_KEY, str(int(self.me))), (RECEIVED_KEY, str(came))))
        self._switch(queue, received)
        if stream > 1:
            self._say(f"{self.me.label}: {self.peer.label} is connected again")
        Thread(
            target=self._serving, args=(frames, stream, queue), name=f"from-{self.peer.label}", daemon=True
        ).start()
        self.connected.set()
        self._beacon = None
        if beacon is not None:
            Thread(target=self._see, args=(beacon,), daemon=True).start()
        return in_batches(queue, self.ahead) if self.me is Rank.DEALER else iter(queue.get, None)

    def _see(self, beacon: str) -> None:
        """Remember a beacon that can be reached now: any other would tell nothing later."""
        if listens(beacon):
            self._beacon = beacon

    def _serving(self, frames: Iterator[bytes], stream: int, queue: Queue) -> None:
        error: LinkError | None = None
        try:
            ended = self._drain(frames, stream, queue, listening=True) or self._closed
        except Exception:  # gRPC's server side raises bare exceptions
            ended = self._last_word is not None or self.peer_left
        queue.put(None)
        if not ended:
            error = self._await(stream)
        if stream == self._stream:
            self._end(self._failure or error)

    def _await(self, stream: int) -> PeerLost:
        """Wait for a stream in place of this one; return what there is to say if none has come."""
        limit, refusals = self._broken(stream), Refusals(self._beacon)
        while (left := limit - time.monotonic()) > 0:
            with self._state:
                if self._state.wait_for(lambda: self._stream != stream or self._over, min(left, ASK_EVERY_S)):
                    break
            if refusals.gone():
                return self._lost(refusals.address)
        return self._lost()

    # Both.

    def _drain(self, frames: Iterator[bytes], stream: int, queue: Queue, listening: bool) -> bool:
        """Take in what comes until the session ends here; False if the stream does without a word."""
        for data in frames:
            with self._state:
                if stream != self._stream:  # a newer stream has gone on from where this one was
                    return True
                if self.all_arrived(data):
                    continue
            if self.peer_left:
                _discard(queue)  # it takes nothing any more
                if self._closed or not listening or self._failure is not None:
                    queue.put(None)  # else when this party closes: one that dialled hears that it has
            elif not self._closed and self._failure is not None:
                self._fail_all(self._failure)  # refused; `close` will tell the peer why
            for data in frames:  # until the peer, too, has got everything
                del data  # before the next one is read
            return True
        return False

    def all_arrived(self, data: bytes) -> bool:
        """Take in the frames of a message as `arrived` does; of all peers a dealer alone sends several."""
        if self.peer is not Rank.DEALER:
            return self.arrived(data)
        try:
            return all(map(self.arrived, frames_in(data)))
        except ValueError:
            self.fail(Desync(f"{self.peer.label} sent a malformed batch of frames; is it the same version?"))
            return False

    def _broken(self, stream: int = 0) -> float:
        """Say that a stream broke, unless the session ends anyway.

        Returns until when the peer may come back, as a monotonic time.
        """
        if not self._closed and not self._over and stream in (0, self._stream):
            wait = f"waiting up to {self._reconnect_s:g} s for it to come back"
            self._say(f"{self.me.label}: lost the connection to {self.peer.label}; {wait}")
        return time.monotonic() + self._reconnect_s

    def _lost(self, refused: str | None = None) -> PeerLost:
        """Return the error for a peer that is gone. refused: where nobody listens any more."""
        what = "its process or the connection ended"
        if refused is not None:
            what = f"its process is gone: nobody listens at {refused}"
        return PeerLost(f"lost {self.peer.label}: {what}; see its own output")

    def _end(self, error: LinkError | None) -> None:
        if error is not None and not self._closed:
            self._fail_all(error)
        with self._state:
            self._over = True
            self._state.notify_all()
            queue = self._queue
        if queue is not None:
            queue.put(None)  # both directions end together
        self._ended.set()

    # Closing.

    def close(self, reason: str = "") -> None:
        """End the link, and wait for the peer to take everything: a short time when there is a reason."""
        if not self._closed:
            self.say_end(reason)
            self.finish(time.monotonic() + (ABORT_LINGER_S if reason else self.timeout_s))

    def say_end(self, reason: str) -> None:
        """Do the first half of `close`: what was queued need not arrive before a reason."""
        if self._closed:
            return
        if reason and (queue := self._queue) is not None:
            _discard(queue)
        super().close(reason)
        if self.peer_left and (queue := self._queue) is not None:
            queue.put(None)

    def _abort(self, data: bytes) -> None:
        with self._out:
            self._last_word = data
            self._carry(data)

    def finish(self, deadline: float) -> None:
        """Do the second half of `close`: wait for the peer to end its side, until a monotonic time.

        A dealer is waited for shortly: it may be in the middle of a tape that nobody reads any more.
        """
        if self.peer is Rank.DEALER:
            deadline = min(deadline, time.monotonic() + DEALER_LINGER_S)
        if self.connected.is_set():
            self._ended.wait(max(0.0, deadline - time.monotonic()))
        with self._state:
            self._over = True
            self._state.notify_all()
            queue, cancel = self._queue, self._cancel
        if queue is not None:
            queue.put(None)
        if not self._ended.is_set():
            cancel()


def in_batches(queue: Queue, ahead: Callable[[], bool] = lambda: False) -> Iterator[bytes]:
    """Yield a queue's frames until None, those that are there at about the same time in one message.

    Each message wakes a handful of threads at both ends, and a dealer has some 30 draws a layer.
    ahead: whether nobody waits for them yet.
    """
    held = queue.get()  # b"": no frame
    while held is not None:
        frames, size, held, lingered = [held], len(held), b"", False
        while size < BATCH_BYTES:
            try:
                held = queue.get_nowait()
            except Empty:
                if lingered or size > BATCH_BYTES // 4:
                    break
                time.sleep(AHEAD_LINGER_S if ahead() else LINGER_S)
                lingered = True
                continue
            if held is None or size + len(held) > BATCH_BYTES:
                break
            frames.append(held)
            size += len(held)
            held = b""
        yield batch_of(frames)
        held = queue.get() if held == b"" else held


def _discard(queue: Queue) -> None:
    """Take out what has not been sent."""
    with suppress(Empty):
        while True:
            queue.get_nowait()
