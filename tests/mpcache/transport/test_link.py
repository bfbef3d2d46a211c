"""Every Link keeps the same promises: one suite over the local and the gRPC one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mpcache.errors import Desync, LinkError, PeerFailed, PeerLost, PeerTimeout
from mpcache.rank import Rank
from mpcache.transport.flow_control import CHUNK_BYTES, largest_frame
from mpcache.transport.frames import FrameLink
from mpcache.transport.message import frames_of, laid_out
from mpcache.transport.network import Profile, Shaper
from mpcache_protos import party_pb2 as pb
from tests.support.links import linked

Pair = tuple[FrameLink, FrameLink]


@pytest.fixture(params=["local", "grpc"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> Iterator[Pair]:
    """The server's end and the client's."""
    with linked(kind, Rank.SERVER, Rank.CLIENT) as ends:
        yield ends


def specs_of(tensors: list[torch.Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]


def eventually_raises(kind: type[LinkError], call: Callable[[], object], match: str) -> None:
    """Until then the call may still succeed: a peer's end takes a moment to arrive."""
    with pytest.raises(kind, match=match):
        for _ in range(500):
            call()
            time.sleep(0.01)


DTYPES = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.float32,
    torch.float64,
    torch.bool,
]


def test_every_dtype_and_shape_comes_back_equal(pair: Pair) -> None:
    server, client = pair
    some = torch.arange(-6, 6).reshape(3, 4)
    shapes = [some, some[1, 1], some[:0], some.T, some[None, :, ::2], some[0].expand(5, 4)]
    tensors = [tensor.to(dtype) for dtype in DTYPES for tensor in shapes]
    server.send("all", tensors)
    for sent, got in zip(tensors, client.recv("all", specs_of(tensors)), strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert torch.equal(got, sent)


def test_extreme_values_keep_their_bits(pair: Pair) -> None:
    server, client = pair
    ints = torch.tensor([2**63 - 1, -(2**63), -1, 0])
    floats = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-45])
    server.send("bits", [ints, floats])
    got_ints, got_floats = client.recv("bits", specs_of([ints, floats]))
    assert torch.equal(got_ints, ints)
    assert torch.equal(got_floats.view(torch.int32), floats.view(torch.int32))


def test_a_message_without_tensors(pair: Pair) -> None:
    server, client = pair
    server.send("nothing", [])
    assert client.recv("nothing", []) == []


def test_what_was_sent_is_not_what_the_sender_changes_later(pair: Pair) -> None:
    server, client = pair
    tensor = torch.zeros(4)
    server.send("copy", [tensor])
    tensor += 1
    assert torch.equal(client.recv("copy", [(torch.float32, (4,))])[0], torch.zeros(4))


def test_large_tensors_both_ways_at_once(pair: Pair) -> None:
    mine = [torch.arange(5_000_000), torch.ones(3, dtype=torch.int16), torch.arange(CHUNK_BYTES // 4 + 1.0)]
    theirs = [tensor.flip(0) for tensor in mine]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(pair[1].exchange, "big", theirs)
        got = pair[0].exchange("big", mine)
        assert all(map(torch.equal, got, theirs))
        assert all(map(torch.equal, other.result(), mine))


def test_frames_are_small_enough_for_the_receiver() -> None:
    tensors = [torch.zeros(1) for _ in range(20_000)] + [torch.zeros(CHUNK_BYTES)]
    sizes = [len(data) for data in frames_of(0, "layer11/select/children/rank", *laid_out(tensors))]
    assert max(sizes) < largest_frame(Rank.SERVER)
    assert len(sizes) == 5
    with pytest.raises(ValueError, match="too many for one message"):
        next(iter(frames_of(0, "s", *laid_out(tensors * 10))))


def test_one_way_messages_keep_their_order(pair: Pair) -> None:
    server, client = pair
    for number in range(50):
        server.send(f"step{number}", [torch.tensor(number)])
    for number in range(50):
        assert client.recv(f"step{number}", [(torch.int64, ())])[0].item() == number


def test_wrong_step_names_both_sides(pair: Pair) -> None:
    server, client = pair
    server.send("layer3/select", [torch.zeros(2)])
    with pytest.raises(Desync, match="^Desync: server is at layer3/select, client at layer3/attend$"):
        client.recv("layer3/attend", [(torch.float32, (2,))])
    client.send("layer4/norm", [torch.zeros(2)])
    with pytest.raises(Desync, match="^Desync: server is at layer4/mlp, client at layer4/norm$"):
        server.recv("layer4/mlp", [(torch.float32, (2,))])


@pytest.mark.parametrize(
    ("sent", "specs", "words"),
    [
        (
            torch.zeros(2, 3),
            [(torch.float32, (3, 2))],
            r"sends float32\(2, 3\) at s, .* expects float32\(3, 2\)",
        ),
        (
            torch.zeros(2),
            [(torch.int32, (2,))],
            r"server sends float32\(2,\) at s, client expects int32\(2,\)",
        ),
        (torch.zeros(2), [(torch.float32, (2,))] * 2, r"expects float32\(2,\) float32\(2,\) there"),
        (torch.zeros(2), [], r"server sends float32\(2,\) at s, client expects no tensor there"),
        (torch.zeros(1 << 20), [(torch.float32, (1,))], r"float32\(1048576,\) .*expects float32\(1,\)"),
    ],
)
def test_wrong_shape_dtype_or_count(
    pair: Pair, sent: torch.Tensor, specs: list[tuple[torch.dtype, tuple[int, ...]]], words: str
) -> None:
    server, client = pair
    server.send("s", [sent])
    with pytest.raises(Desync, match=words):
        client.recv("s", specs)


def test_out_of_order_and_repeated_messages(pair: Pair) -> None:
    server, client = pair
    first, second = (next(iter(frames_of(number, "s", *laid_out([torch.zeros(1)])))) for number in (0, 1))
    server._post(second)
    with pytest.raises(Desync, match="server sends message 1 at s, client expects message 0"):
        client.recv("s", [(torch.float32, (1,))])
    server._post(first)
    server._post(first)
    client.recv("s", [(torch.float32, (1,))])
    with pytest.raises(Desync, match="server sends message 0 at s, client expects message 1"):
        client.recv("s", [(torch.float32, (1,))])


@pytest.mark.parametrize(
    "frames",
    [
        [{}],
        [{"data": bytes(9)}],
        [{"data": bytes(4)}, {"data": bytes(5), "offset": 4}],
        [{"data": bytes(4)}, {"data": bytes(4), "offset": 3}],
        [{"data": bytes(4)}, {"data": bytes(4), "offset": 4, "layout": "float32(2,)"}],
        [{"data": bytes(4)}, {"offset": 4}],
        [{"data": bytes(4), "offset": 4}],
        [{"data": bytes(8), "layout": ""}],
        [{"data": bytes(8), "layout": "float32(1152921504606846976,)"}],
        [{"data": bytes(4)}, {"data": bytes(4), "offset": 4, "sequence": 1}],
        [{"data": bytes(4)}, {"data": bytes(4), "offset": 4, "step": "t"}],
    ],
)
def test_hostile_frames_are_refused(pair: Pair, frames: list[dict[str, Any]]) -> None:
    server, client = pair
    for number, changes in enumerate(frames):
        usual = {"step": "s"} if number else {"step": "s", "layout": "float32(2,)"}
        server._post(pb.Frame(tensors=pb.Tensors(**{**usual, **changes})).SerializeToString())
    with pytest.raises(Desync, match="^Desync: server "):
        client.recv("s", [(torch.float32, (2,))])


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff", b"", pb.Frame(facts=pb.Facts(step="s")).SerializeToString()]
)
def test_bytes_that_are_no_frame_or_not_the_awaited_kind(pair: Pair, data: bytes) -> None:
    pair[0]._post(data)
    with pytest.raises(Desync):
        pair[1].recv("s", [(torch.float32, (2,))])


def test_ledger_counts_the_same_at_both_ends(pair: Pair) -> None:
    server, client = pair
    a, b = torch.zeros(10, dtype=torch.int64), torch.zeros(3, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(client.exchange, "open", [a, b], ["open/a", "open/b"])
        server.exchange("open", [a, b], ["open/a", "open/b"])
        other.result()
    server.send("one-way", [a])
    client.recv("one-way", [(torch.int64, (10,))])
    for mine, theirs in ((server, client), (client, server)):
        for step in ("open", "open/a", "open/b", "one-way"):
            assert mine.ledger.total(step).sent == theirs.ledger.total(step).received
    assert client.ledger.steps["open/a"].sent == 80
    assert client.ledger.steps["open/b"].received == 3
    assert client.ledger.steps["open"].rounds == server.ledger.steps["open"].rounds == 1
    # What goes one way only is booked as a round by `swap`, not by `send` and `recv`.
    assert (client.ledger.total().rounds, server.ledger.total().rounds) == (1, 1)
    assert client.ledger.total().offline_received == 0
    assert server.ledger.wire_bytes == client.ledger.wire_bytes > 83 * 2 + 80


def test_traffic_with_the_dealer_is_offline(kind: str) -> None:
    with linked(kind, Rank.DEALER, Rank.SERVER) as (dealer, server):
        dealer.send("tape", [torch.zeros(4)])
        server.recv("tape", [(torch.float32, (4,))])
        assert dealer.ledger.total().offline_sent == server.ledger.total().offline_received == 16
        for end in (dealer, server):
            assert (end.ledger.total().rounds, end.ledger.total().sent, end.ledger.total().received) == (
                0,
                0,
                0,
            )


def test_facts(pair: Pair) -> None:
    server, client = pair
    facts = {"layers": 8, "rope_theta": 1e4, "tied": True, "name": "größe", "kept": [1, 2, 3], "none": None}
    server.send_facts("setup/facts", facts)
    server.send("setup", [torch.zeros(1)])
    assert client.recv_facts("setup/facts") == facts
    client.recv("setup", [(torch.float32, (1,))])
    size = len(json.dumps(facts, separators=(",", ":"), sort_keys=True))
    assert server.ledger.steps["setup/facts"].sent == client.ledger.steps["setup/facts"].received == size
    assert client.ledger.steps["setup/facts"].rounds == 0


def test_facts_are_small_and_objects(pair: Pair) -> None:
    server, client = pair
    with pytest.raises(ValueError, match="at most 65536"):
        server.send_facts("s", {"text": "x" * 70_000})
    for text in ("[]", "nonsense", "[" * 50_000, '"' + "x" * 70_000 + '"'):
        server._post(pb.Frame(facts=pb.Facts(step="s", json=text)).SerializeToString())
        with pytest.raises(Desync, match="facts at s"):
            client.recv_facts("s")


def test_a_reason_reaches_the_peer(pair: Pair) -> None:
    server, client = pair
    server.close("the disk is full")
    eventually_raises(
        PeerFailed, lambda: client.send("s", [torch.zeros(1)]), "server ended .*: the disk is full"
    )
    with pytest.raises(PeerFailed, match="client at layer0/qkv: .*the disk is full"):
        client.recv("layer0/qkv", [(torch.float32, (1,))])


def test_a_reason_wakes_a_waiting_peer(pair: Pair) -> None:
    server, client = pair
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.recv, "s", [(torch.float32, (1,))])
        time.sleep(0.1)
        server.close("out of memory")
        with pytest.raises(PeerFailed, match="out of memory"):
            waiting.result(timeout=5)


def test_a_normal_end_comes_after_what_was_sent(pair: Pair) -> None:
    server, client = pair
    server.send("last", [torch.arange(1_000_000)])
    server.close()
    server.close()
    time.sleep(0.1)
    assert client.recv("last", [(torch.int64, (1_000_000,))])[0][-1] == 999_999
    for _ in range(2):
        with pytest.raises(PeerLost, match="server has ended its session"):
            client.recv("more", [(torch.int64, (1,))])
    with pytest.raises(LinkError, match="closed here"):
        server.send("more", [torch.zeros(1)])


def test_a_silent_peer_is_a_timeout(kind: str) -> None:
    with linked(kind, Rank.SERVER, Rank.CLIENT, recv_s=0.2) as (server, client):
        with pytest.raises(PeerTimeout, match="client at layer1/norm: no word from server for 0.2 s"):
            client.recv("layer1/norm", [(torch.int64, (1,))])
        server.send("layer1/norm", [torch.zeros(1)])


def test_facts_that_have_come_are_taken_without_a_wait(pair: Pair) -> None:
    server, client = pair
    begin = time.monotonic()
    assert client.poll_facts("one") is None
    assert time.monotonic() - begin < 5
    server.send_facts("one", {"more": True})
    server.send_facts("two", {"more": False})
    while (facts := client.poll_facts("one")) is None:
        time.sleep(0.01)
    assert facts == {"more": True}
    assert client.recv_facts("two") == {"more": False}
    server.send("three", [torch.zeros(1)])
    with pytest.raises(Desync, match="server sends tensors at three, client expects facts at four"):
        while client.poll_facts("four") is None:
            time.sleep(0.01)
    server.close()
    with pytest.raises(PeerLost, match="server has ended its session"):
        while client.poll_facts("four") is None:
            time.sleep(0.01)


def test_facts_are_not_polled_before_a_shaped_network_brings_them(pair: Pair) -> None:
    server, client = pair
    client.shaper = Shaper(Profile("", rtt_ms=1e7, mbps=1000))
    server.send_facts("s", {"more": True})
    time.sleep(0.2)
    assert client.poll_facts("s") is None
    assert client.poll_facts("s") is None
    assert client.ledger.total("s").received == 0


def test_a_sender_does_not_wait_for_room_at_a_peer_that_has_left(kind: str) -> None:
    with linked(kind, Rank.DEALER, Rank.SERVER, recv_s=60) as (dealer, server), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dealer.send, "question/tape", [torch.zeros(12_000_000)])
        time.sleep(0.3)
        assert not waiting.done()
        server.close()
        with pytest.raises(PeerLost, match="dealer at question/tape: server has ended its session"):
            waiting.result(timeout=10)


@pytest.mark.parametrize("first", [Rank.DEALER, Rank.SERVER])
def test_a_link_closes_in_the_middle_of_a_message(kind: str, first: Rank) -> None:
    """Where the room is used up, too; nobody waits, and neither end calls it an error."""

    class Enough(Exception):
        """Ends a message between two frames."""

    with linked(kind, Rank.DEALER, Rank.SERVER, recv_s=60) as (dealer, server), ThreadPoolExecutor(2) as pool:
        full = []

        def look() -> None:
            if not dealer.sent.fits(CHUNK_BYTES):
                full.append(True)
                raise Enough

        dealer.before_frame = look
        with pytest.raises(Enough):
            dealer.send("question/tape", [torch.zeros(12_000_000)])
        dealer.sent.room = server.room = dealer.sent._cost  # not a byte more
        assert full
        begin = time.monotonic()
        ends = [dealer, server] if first is Rank.DEALER else [server, dealer]
        closing = []
        for end in ends:
            closing.append(pool.submit(end.close))
            time.sleep(0.3)
            if first is Rank.SERVER:  # the dealer may compute yet: it is not waited for
                closing[0].result(timeout=20)
            if end is dealer and first is Rank.DEALER:  # the server is not done yet, and has nothing to fear
                server.send_facts("more/decode1", {})
        for one in closing:
            one.result(timeout=20)
        assert time.monotonic() - begin < 30


def test_labels_must_match_the_tensors(pair: Pair) -> None:
    with pytest.raises(ValueError, match="1 labels for 2 tensors"):
        pair[0].send("s", [torch.zeros(1), torch.zeros(1)], ["only one"])
