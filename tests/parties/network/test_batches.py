"""Frames that go together: they come apart again; a dealer joins what is there, and nobody else may."""

from __future__ import annotations

import time
from collections.abc import Iterable
from queue import SimpleQueue

import pytest
import torch

from mpcache.errors import LinkError
from mpcache.rank import Rank
from mpcache.transport.flow_control import BATCH_BYTES
from mpcache.transport.message import batch_of, frames_in
from mpcache_parties.network.grpc_link import AHEAD_LINGER_S, LINGER_S, GrpcLink, in_batches
from mpcache_protos import party_pb2 as pb
from tests.support.links import linked
from tests.support.peer_frames import ack, facts, tensors

FRAMES = [ack(3), facts("facts/x"), tensors("setup", 0, 200), tensors("setup", 1, 70_000)]


def queued(frames: Iterable[bytes | None]) -> SimpleQueue[bytes | None]:
    queue: SimpleQueue[bytes | None] = SimpleQueue()
    for frame in frames:
        queue.put(frame)
    return queue


@pytest.mark.parametrize("n", range(1, 1 + len(FRAMES)))
def test_a_batch_is_a_frame_of_frames(n: int) -> None:
    batch = batch_of(FRAMES[:n])
    assert list(frames_in(batch)) == FRAMES[:n]
    read = pb.Frame.FromString(batch)
    assert read.SerializeToString() == batch
    assert n == 1 or [frame.SerializeToString() for frame in read.batch.frames] == FRAMES[:n]


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch[:-1],
        lambda batch: batch + b"\x00",
        lambda batch: batch + FRAMES[0],
        lambda batch: batch[:4] + b"\x12" + batch[5:],
        lambda batch: batch[:1] + b"\xff" * 6 + batch[3:],
    ],
)
def test_what_is_no_whole_batch_is_refused(change: object) -> None:
    batch = change(batch_of(FRAMES))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"batch|frame|field"):
        list(frames_in(batch))


def test_what_is_there_goes_together_up_to_a_size_and_in_order() -> None:
    frames = [bytes([n % 256]) * (BATCH_BYTES // 50 * (1 + n % 3)) for n in range(100)]
    sent = list(in_batches(queued([*frames, None])))
    assert [frame for batch in sent for frame in _apart(batch)] == frames
    assert max(map(len, sent)) < BATCH_BYTES + 100 * 6
    assert len(sent) <= 6  # of 4 MiB


def _apart(batch: bytes) -> list[bytes]:
    return list(frames_in(batch)) if batch[:1] == b"\x3a" else [batch]


def test_a_large_frame_does_not_wait_and_a_small_one_not_long() -> None:
    queue = queued([bytes(BATCH_BYTES), b"\x01" * 9])
    batches = in_batches(queue)
    begin = time.perf_counter()
    assert len(next(batches)) == BATCH_BYTES
    assert next(batches) == b"\x01" * 9  # though the queue has not ended
    assert time.perf_counter() - begin > LINGER_S
    queue.put(None)
    assert list(batches) == []


@pytest.mark.parametrize(("ahead", "seconds"), [(False, LINGER_S), (True, AHEAD_LINGER_S)])
def test_what_nobody_waits_for_yet_waits_longer_for_others(
    ahead: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, waited = queued([b"first"]), list[float]()

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        for frame in (b"second", None):
            queue.put(frame)

    monkeypatch.setattr(time, "sleep", sleep)
    assert [list(frames_in(batch)) for batch in in_batches(queue, lambda: ahead)] == [[b"first", b"second"]]
    assert waited == [seconds]


def test_a_dealers_draws_arrive_in_order_in_fewer_messages() -> None:
    with linked("grpc", Rank.DEALER, Rank.SERVER) as (dealer, server):
        assert isinstance(server, GrpcLink)
        messages, take = list[bytes](), server.all_arrived

        def counted(data: bytes) -> bool:
            messages.append(data)
            return take(data)

        server.all_arrived = counted  # type: ignore[method-assign]
        for n in range(50):
            dealer.send("setup", [torch.tensor([n])])
        for n in range(50):
            assert server.recv("setup", [(torch.int64, (1,))])[0].item() == n
    assert len(messages) < 25


def test_a_batch_of_another_peer_is_refused() -> None:
    with linked("grpc", Rank.CLIENT, Rank.SERVER) as (client, server):
        client._carry(batch_of(FRAMES[:2]))
        with pytest.raises(LinkError, match="batch"):
            server.recv("setup", [(torch.int64, (1,))])


def test_a_malformed_batch_of_the_dealer_ends_the_link() -> None:
    with linked("grpc", Rank.DEALER, Rank.SERVER) as (dealer, server):
        dealer._carry(batch_of(FRAMES[:3])[:-1])
        with pytest.raises(LinkError, match="malformed batch|not a frame"):
            server.recv("setup", [(torch.int64, (1,))])
