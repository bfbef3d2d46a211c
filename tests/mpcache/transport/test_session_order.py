"""What a hostile or confused peer can send, and when: refused with its reason, over both links."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mpcache.config import PublicConfig
from mpcache.errors import Desync, LinkError, PeerFailed
from mpcache.rank import Rank
from mpcache.transport.flow_control import FRAME_COST, MIB, SMALL_BYTES, Sent, largest_frame, queue_room
from mpcache.transport.frames import FrameLink
from mpcache.transport.link import Hello
from mpcache.transport.message import frames_of, is_one_field, laid_out
from mpcache.transport.session_order import FrameKind, Order, Place, State, place_of
from mpcache_parties.handshake import PROTOCOL_VERSION, agree
from mpcache_protos import party_pb2 as pb
from tests.support.links import linked
from tests.support.peer_frames import HELLO, ack, facts, tensors

Pair = tuple[FrameLink, FrameLink]
WORD = [(torch.int64, (1,))]


@pytest.fixture(params=["local", "grpc"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The server's end and the client's, which is hostile here."""
    with linked(str(request.param), Rank.SERVER, Rank.CLIENT, recv_s=5) as ends:
        yield ends


# ------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("step", "place"),
    [
        ("seeds/tape", Place(0, State.SETUP)),
        ("facts/model", Place(0, State.SETUP)),
        ("setup/layer0", Place(0, State.SETUP)),
        ("context/layer3", Place(0, State.CONTEXT)),
        ("question/layer0/qkv", Place(1, State.QUESTION)),
        ("more/decode7", Place(1, State.DECODE, 7)),
        ("decode7/layer0/qkv", Place(1, State.DECODE, 7)),
        ("turn/2", Place(2, State.QUESTION)),
        ("turn2-question/layer0/qkv", Place(2, State.QUESTION)),
        ("turn2-decode3/layer0/qkv", Place(2, State.DECODE, 3)),
        ("more/turn2-decode3", Place(2, State.DECODE, 3)),
        ("turn1-question/x", None),
        ("turn/0", None),
        ("turn/x", None),
        ("decode", None),
        ("decode0/x", None),
        ("decode1x/y", None),
        ("decode٣/x", None),
        ("more", None),
        ("", None),
    ],
)
def test_where_a_step_belongs(step: str, place: object) -> None:
    assert place_of(step) == place


def test_a_whole_session_is_legal() -> None:
    order = Order()
    messages = ["seeds/pair", "facts/question", "setup/layer0", "context/layer0", "question/layer0/qkv",
                "more/decode1", "decode1/layer0/qkv", "more/decode2", "decode2/vocabulary", "dealt/1",
                "turn/2", "turn2-question/layer0", "more/turn2-decode1", "turn2-decode1/layer0",
                "turn/3"]  # fmt: skip
    assert order.complaint(FrameKind.HELLO, "") is None
    assert [order.complaint(FrameKind.TENSORS, step) for step in messages] == [None] * len(messages)
    assert order.place == Place(3, State.QUESTION)
    assert order.complaint(FrameKind.BYE, "") is None
    assert order.place.state is State.CLOSE


ILLEGAL = [
    ([("hello", ""), ("hello", "")], "hello in state HELLO"),
    ([("hello", ""), ("tensors", "setup/a"), ("hello", "")], "hello in state SETUP"),
    ([("tensors", "context/a"), ("tensors", "setup/a")], "tensors at setup/a in state CONTEXT"),
    ([("tensors", "question/a"), ("facts", "facts/model")], "facts at facts/model in state QUESTION"),
    ([("tensors", "decode2/a"), ("tensors", "decode1/a")], "tensors at decode1/a in state DECODE 2"),
    ([("facts", "more/decode3"), ("facts", "more/decode2")], "facts at more/decode2 in state DECODE 3"),
    ([("tensors", "decode1/a"), ("tensors", "question/a")], "tensors at question/a in state DECODE 1"),
    ([("facts", "turn/2"), ("tensors", "decode9/a")], "tensors at decode9/a in state QUESTION of turn 2"),
    ([("tensors", "turn3-decode1/a"), ("facts", "turn/2")], "facts at turn/2 in state DECODE 1 of turn 3"),
    ([("bye", ""), ("tensors", "decode1/a")], "tensors at decode1/a in state CLOSE"),
    ([("bye", ""), ("bye", "")], None),
    ([("an unknown message", "")], "an unknown message in state HELLO"),
]


@pytest.mark.parametrize(("frames", "words"), ILLEGAL)
def test_what_may_not_come_now(frames: list[tuple[str, str]], words: str | None) -> None:
    order = Order()
    *before, last = frames
    assert [order.complaint(FrameKind(kind), step) for kind, step in before] == [None] * len(before)
    assert order.complaint(FrameKind(last[0]), last[1]) == words


# --------------------------------------------------------------------------- a hostile peer's frames

HOSTILE = {
    "bytes that are no frame": ([b"\xff\xff\xff"], "bytes that are not a frame"),
    "an empty frame": ([b""], "an unknown message in state HELLO"),
    "a message before hello": ([tensors("seeds/pair")], "tensors at seeds/pair, .* expects hello"),
    "another hello": ([HELLO, HELLO], "hello in state HELLO"),
    "hello again in SETUP": ([HELLO, tensors("seeds/pair"), HELLO], "hello in state SETUP"),
    "a step of an earlier state": (
        [HELLO, tensors("context/a"), tensors("setup/a", 1)],
        "tensors at setup/a in state CONTEXT",
    ),
    "an earlier token": (
        [HELLO, tensors("decode2/a"), tensors("decode1/a", 1)],
        "tensors at decode1/a in state DECODE 2",
    ),
    "another step": ([HELLO, tensors("seeds/other")], "server is at seeds/pair, client at seeds/other"),
    "a later state": ([HELLO, tensors("decode1/a")], "server is at seeds/pair, client at decode1/a"),
    "facts for tensors": ([HELLO, facts("seeds/pair")], "sends facts at seeds/pair, server expects tensors"),
    "another dtype": ([HELLO, tensors("seeds/pair", layout="int32(2,)")], "sends int32"),
    "another shape": ([HELLO, tensors("seeds/pair", layout="int64(1, 1)")], "sends int64"),
    "too few bytes, then others": (
        [HELLO, tensors("seeds/pair", size=4), tensors("seeds/pair", size=4)],
        "sends int64.* expects no tensor there",
    ),
    "too many bytes": ([HELLO, tensors("seeds/pair", size=9)], "9 bytes from byte 0"),
    "a later message first": ([HELLO, tensors("seeds/pair", 1)], "message 1 at seeds/pair, .* message 0"),
    "a message again": ([HELLO, tensors("seeds/pair"), tensors("seeds/pair")], "message 0 .* message 1"),
    "a frame that is too large": (
        [HELLO, facts("facts/model", '"' + "x" * (1 << 20) + '"')],
        "a frame of 1048.* bytes of facts, which",
    ),
    "hello that is too large": (
        [pb.Frame(hello=pb.Hello(nonce="0" * (1 << 20))).SerializeToString()],
        "a frame of 1048.* bytes of hello, which",
    ),
    "many messages in one frame": (
        [HELLO, b"\x12\x00" * 2 * SMALL_BYTES],
        "a frame of 2.* bytes of tensors, which",
    ),
    "a frame that says a thing twice": (
        [HELLO, facts("facts/model", "{}") + facts("facts/model", "{}")],
        "bytes that are not a frame",
    ),
    "more than there is room for": (
        [HELLO, *(tensors("seeds/pair", n, size=MIB) for n in range(3))],
        "more than the 2097152 bytes that may wait here",
    ),
    "many small frames": (
        [HELLO, *[facts("facts/x", "{}", n) for n in range(2 * MIB // FRAME_COST)]],
        "more than the 2097152 bytes that may wait here",
    ),
    "a confirmation of what was not sent": ([HELLO, ack(1000)], "confirms frame 1000, which was not sent"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_peer_is_refused_with_a_reason(pair: Pair, case: str) -> None:
    server, client = pair
    frames, words = HOSTILE[case]
    server.room = 2 * MIB
    client.sent.room = 1 << 40  # it does not keep to the room
    for frame in frames:
        client._post(frame)

    def program() -> None:
        agree({Rank.CLIENT: server}, Rank.SERVER, PublicConfig().flat())
        for _ in range(3):
            server.recv("seeds/pair", WORD)

    with pytest.raises(Desync, match=words) as caught:
        if "wait here" in words or "in state CONTEXT" in words or "in state DECODE" in words:
            # refused as they arrive, before the program comes to what was sent ahead of them
            with pytest.raises(LinkError):
                while True:
                    server.send("seeds/pair", [torch.zeros(1)])
        program()
    assert "\n" not in str(caught.value)
    server.close(str(caught.value))
    with pytest.raises(PeerFailed, match="server ended the session: "):
        for _ in range(200):
            client.recv("seeds/pair", WORD) if client._failure else client.send("x", [torch.zeros(1)])


# -------------------------------------------------------------------------------------- how much


@pytest.mark.parametrize("agreed", [False, True])
def test_the_rooms(agreed: bool) -> None:
    for me in Rank:
        for peer in set(Rank) - {me}:
            # The larger one of two frames goes through while the smaller one waits to be confirmed.
            assert queue_room(peer, me, agreed) >= max(1.5 * largest_frame(me, peer), 8 * SMALL_BYTES)
            assert queue_room(peer, me, True) >= queue_room(peer, me, False)
    assert queue_room(Rank.DEALER, Rank.SERVER, agreed) == (32 if agreed else 4) * MIB


def test_a_frame_of_one_field() -> None:
    whole = tensors("a", size=3 * SMALL_BYTES)
    assert is_one_field(whole)
    assert not is_one_field(whole[:-1]) and not is_one_field(whole + b"\x00")
    assert not is_one_field(b"\x12" + b"\xff" * 100)
    assert not is_one_field(b"\x12") and not is_one_field(b"")


def test_what_was_sent_and_not_taken() -> None:
    sent = Sent(room=2 * FRAME_COST + 10)
    assert sent.fits(FRAME_COST + 10) and not sent.fits(FRAME_COST + 11)
    for frame in (b"aaaa", b"bbb"):
        sent.add(frame)
    assert sent.after(0) == [b"aaaa", b"bbb"] and sent.after(1) == [b"bbb"] and sent.after(2) == []
    assert not sent.fits(4)
    assert sent.took(1) and sent.fits(0) and sent.after(1) == [b"bbb"]
    for impossible in (0, 3):
        assert not sent.took(impossible)
        with pytest.raises(ValueError, match="frames received, 2 were sent"):
            sent.after(impossible)


def test_a_fast_sender_waits_for_a_slow_receiver(pair: Pair) -> None:
    """The queue at the receiver, and what the sender keeps, stay within the room."""
    server, client = pair
    client.sent.room = server.room = 4 * MIB
    count, most = 40, 0
    message = [torch.zeros(MIB // 8, dtype=torch.int64)]

    def send() -> None:
        for number in range(count):
            client.send(f"part{number}", message)

    def waiting() -> int:
        return max(client.sent._cost, server._came_cost - server._took_cost)

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        deadline = time.monotonic() + 10
        while most <= MIB and time.monotonic() < deadline:  # nothing is taken before something waits
            most = waiting()
            time.sleep(0.01)
        for number in range(count):
            server.recv(f"part{number}", [(torch.int64, (MIB // 8,))])
            most = max(most, waiting())
        sending.result(timeout=10)
    assert MIB < most <= 4 * MIB


def test_a_layout_of_exabytes_gets_no_memory(pair: Pair) -> None:
    server, client = pair
    client._post(tensors("seeds/pair", layout="int64(1152921504606846975,)"))
    tracemalloc.start()
    try:
        with pytest.raises(Desync, match="expects"):
            server.recv("seeds/pair", [(torch.int64, (1 << 20,))])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_messages_larger_than_the_room_pass_both_ways_at_once(pair: Pair) -> None:
    for end in pair:
        end.sent.room = end.room = 3 * MIB
    words = torch.arange(3 * MIB)  # 24 MiB
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            ends = [pool.submit(end.exchange, "big", [words + int(end.me)]) for end in pair]
            for got, other in zip(ends, (1, 0), strict=True):
                assert torch.equal(got.result(timeout=60)[0], words + other)


def test_a_receiver_that_takes_nothing_is_a_timeout(pair: Pair) -> None:
    _, client = pair
    client.timeout_s, client.sent.room = 0.5, 2 * MIB
    with pytest.raises(LinkError, match="client at layer0: server has taken nothing for 0.5 s"):
        while True:
            client.send("layer0", [torch.zeros(MIB // 4)])


def test_hello_takes_part_in_the_order() -> None:
    with linked("local", Rank.SERVER, Rank.CLIENT) as (server, client):
        client.send_hello(Hello(PROTOCOL_VERSION, Rank.CLIENT, "00", {}))
        client._post(next(frames_of(0, "decode1/a", *laid_out([torch.zeros(1)]))))
        server.recv_hello()
        assert server.order.place == Place(1, State.DECODE, 1)
