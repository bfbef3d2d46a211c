"""What a hostile peer can make a party's process allocate: no more than the room of the phase it is in."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from threading import Event

import pytest

from mpcache.rank import Rank
from mpcache.transport.flow_control import (
    MIB,
    READ_AHEAD_BYTES,
    SMALL_BYTES,
    frame_cost,
    largest_frame,
    queue_room,
)
from mpcache.transport.session_order import AGREED
from mpcache_protos import party_pb2 as pb
from tests.support.links import free_settings
from tests.support.one_party import ONE_PARTY, STATUS
from tests.support.peer_frames import BYE, HELLO, ack, facts, tensors
from tests.support.processes import start

import grpc  # isort: skip  # after the link, which quiets it

from mpcache_parties.network.channels import SERVICE
from mpcache_parties.network.liveness import Beacon
from mpcache_parties.network.metadata import BEACON_KEY, RANK_KEY, SESSION_KEY

pytestmark = pytest.mark.processes

# Of a frame: as gRPC puts it together, hands it over and frees it, and while it is parsed. 9 are seen on idle
# cores, 12 on busy ones, where what is refused is freed later.
COPIES = 14
FLOOD = 64 * MIB  # of room: four times what a party gives to the client

# Phases: what the client says before its flood, to a party with this task. One that waits for a word
# refuses the first frame that is none; one that computes has them all wait.
PHASES: dict[str, tuple[list[bytes], str]] = {
    "hello": ([], "hang"),
    "setup": ([HELLO], "compute"),
    "agreed": ([HELLO, facts(AGREED)], "confirm"),
}


def hello_of_many() -> bytes:
    return bytes(pb.Frame(hello=pb.Hello(public={f"{n:x}": "" for n in range(300_000)})).SerializeToString())


EMPTY_MESSAGES = b"\x12\x00\x1a\x00" * MIB  # tensors and facts in turns: two bytes of a frame for each
FLOODS: dict[str, Callable[[], bytes]] = {
    "large tensors": lambda: tensors("decode1", 1, MIB),
    "small tensors": lambda: tensors("decode1", 1),
    "facts": lambda: facts("decode1", sequence=1),
    "confirmations": lambda: ack(0),
    "many messages in a frame": lambda: EMPTY_MESSAGES[: largest_frame(Rank.SERVER)],
    "many messages in a small frame": lambda: EMPTY_MESSAGES[:SMALL_BYTES],
    "a hello of many entries": hello_of_many,
    "more than a frame": lambda: bytes(FLOOD),
}


def peak(me: Rank, before: Iterable[bytes], flood: bytes | None, task: str) -> int:
    """Bytes of memory that a party's process took at most. Its only peer, the client, sends these frames,
    the flood over and over until it is refused."""
    settings = free_settings()
    addresses = settings.addresses
    peers = f"{int(me)}{int(Rank.CLIENT)}"
    child = start(ONE_PARTY, int(me), peers, addresses.server, addresses.dealer, task)
    beacon = Beacon(addresses.of(me))
    about = ((RANK_KEY, "1"), (SESSION_KEY, secrets.token_hex(16)), (BEACON_KEY, str(beacon.port)))
    ended = Event()

    def said() -> Iterator[bytes]:
        yield from before
        if flood is not None:
            for _ in range(1 + FLOOD // frame_cost(len(flood))):
                if not ended.is_set():
                    yield flood
        yield BYE
        ended.wait(30)

    with grpc.insecure_channel(addresses.of(me)) as channel:
        connect = channel.stream_stream(f"/{SERVICE}/Connect")
        with suppress(grpc.RpcError):
            for frame in connect(said(), metadata=about, wait_for_ready=True, timeout=60):
                if pb.Frame.FromString(frame).WhichOneof("kind") in ("abort", "bye"):
                    break
        ended.set()
    out, text = child.communicate(timeout=60)
    beacon.close()
    assert "Traceback" not in text, text
    return int(out.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="a process's peak memory is read as Linux tells it")
@pytest.mark.parametrize(
    ("me", "phase"), [*((Rank.SERVER, phase) for phase in PHASES), (Rank.DEALER, "setup")]
)
def test_a_flood_takes_no_more_than_the_room(me: Rank, phase: str) -> None:
    before, task = PHASES[phase]
    honest = peak(me, before, None, task)
    under_way = READ_AHEAD_BYTES + COPIES * largest_frame(Rank.SERVER)
    most = queue_room(Rank.CLIENT, me, phase == "agreed") + under_way
    for name, flood in FLOODS.items():
        more = peak(me, before, flood(), task) - honest
        print(f"{me.label}, {phase}: {name}: {more / MIB:.1f} MiB")
        assert more <= most, name
