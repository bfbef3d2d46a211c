"""A dealer that serves, as a process, and everything that a caller can do to its three ports.

Its stderr is kept: whatever comes in, there are only its own lines in it. A case is a JSON text.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from mpcache.config import PublicConfig
from mpcache.rank import Rank
from mpcache.transport.flow_control import largest_frame
from mpcache.transport.link import Hello
from mpcache_parties.handshake import PROTOCOL_VERSION
from mpcache_parties.network.channels import SERVICE
from mpcache_parties.network.metadata import BEACON_KEY, RANK_KEY, REASON_KEY, RECEIVED_KEY, SESSION_KEY
from mpcache_protos import party_pb2 as pb
from tests.fuzz.mutate import NUMBERS, damaged
from tests.support.links import free_settings
from tests.support.paths import ROOT
from tests.support.processes import PARTY, environment, write_config
from tests.support.service import said

LIMIT = largest_frame(Rank.DEALER, Rank.CLIENT)  # bytes of a frame that it takes
HEALTH = "/grpc.health.v1.Health"
REQUEST_S = 8.0  # longest time for an answer; case and answer take milliseconds
HOLD_S = 0.3  # how long a session waits for its peers: each case may leave one
ROOM = 400 << 20  # bytes that the party may grow by, over all cases; 64 sessions are a part of it
OWN_LINE = re.compile(r"dealer: \S.*")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
# What a call may end with; no UNKNOWN, which is an exception in the party's code, and no deadline.
ANSWERS = {
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED,
}  # fmt: skip
HEALTH_ANSWERS = ANSWERS | {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INTERNAL,
}  # no such name or bytes


class Party:
    """The dealer's process. It is started at once and is ready when it is first used."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.settings = free_settings(connect_s=HOLD_S, recv_s=HOLD_S, reconnect_s=HOLD_S)
        self.metrics, self.health = (int(a.rpartition(":")[2]) for a in self._free())
        self.noise = place / "stderr"
        self._read = 0
        config = write_config(self.settings, place / "config.yaml")
        flags: list[object] = ["--rank", 2, "--config", config, "--serve", "--sessions", 64, "--insecure"]
        flags += ["--metrics", self.metrics, "--health", self.health]
        with self.noise.open("wb") as noise:
            self.process = subprocess.Popen(
                [*PARTY, *map(str, flags)], cwd=ROOT, env=environment(),
                stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, preexec_fn=_die_with_parent,
            )  # fmt: skip
        atexit.register(self.process.kill)

    @staticmethod
    def _free() -> tuple[str, str]:
        addresses = free_settings().addresses
        return addresses.server, addresses.dealer

    @cached_property
    def channels(self) -> tuple[grpc.Channel, grpc.Channel]:
        """To the party's own port and to its health; waits until it serves."""
        options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
        places = self.settings.addresses.dealer, f"127.0.0.1:{self.health}"
        channels = [grpc.insecure_channel(place, options) for place in places]
        for channel in channels:
            grpc.channel_ready_future(channel).result(timeout=60)
        self._base = self._rss()
        return channels[0], channels[1]

    def _rss(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def check(self) -> None:
        """It lives, answers, has said nothing but lines of its own, and is no larger than it should be."""
        assert self.process.poll() is None, f"the party ended with {self.process.returncode}"
        request = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()
        said = self.channels[1].unary_unary(f"{HEALTH}/Check")(request, timeout=REQUEST_S)
        status = health_pb2.HealthCheckResponse.FromString(said).status
        assert status == health_pb2.HealthCheckResponse.SERVING, status
        with self.noise.open("rb") as noise:
            noise.seek(self._read)
            new = noise.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.decode().split("\n")[:-1]:
            assert OWN_LINE.fullmatch(line) and line.isprintable() and len(line) < 2600, f"{new!r:.3000}"
        assert self._rss() - self._base < ROOM, f"the party takes {self._rss() - self._base} bytes more"


def _die_with_parent() -> None:
    """Also when that one is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def wires(folder: Path, made: Callable[[str, int, Any, Any, bytes], None]) -> None:
    """A target for each port."""
    party = Party(folder / "party")

    def through(do: Callable[[Party, Any], None]) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            party.channels  # noqa: B018  waits until it serves
            do(party, json.loads(data))
            party.check()

        return run

    made("health RPC", 1, through(_ask_health), _health_case, _text([["Check", b"", 1]]))
    page = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    made("metrics", 1, through(_ask_metrics), _metrics_case, _text([page, "end"]))
    hello = Hello(PROTOCOL_VERSION, Rank.CLIENT, "00", said(PublicConfig()))
    whole = {"method": "Connect", "streams": [_stream("5e" * 16, Rank.CLIENT, [_hello(hello)])]}
    made("Connect RPC", 1, through(_connect), _connect_case, _text(whole))


def _text(case: Any) -> bytes:
    return json.dumps(case, default=bytes.hex).encode()


# ---------------------------------------------------------------------------------------------- health


def _health_case(rng: random.Random) -> bytes:
    """Some calls at once: method, request, and whether an answer is waited for. Or bytes without gRPC."""
    if rng.random() < 0.1:
        return _text({"raw": _garbage(rng)})
    seeds = [
        health_pb2.HealthCheckRequest(service=name).SerializeToString()
        for name in ("", SERVICE, "x", "x" * 3000, "漢字", "a\x00b\n")
    ]
    calls = []
    for _ in range(rng.choice((1, 1, 1, 4))):
        method = rng.choice(("Check", "Check", "Watch", "Watch", "List", "Nothing", "check", "", "../Check"))
        size = rng.choice((0, 1, 100, 5000, 5 << 20))
        request = rng.choice((damaged(rng, rng.choice(seeds), seeds), rng.randbytes(min(size, 5000))))
        calls.append([method, size if rng.random() < 0.05 else request, rng.random() < 0.8])
    return _text(calls)


def _ask_health(party: Party, case: Any) -> None:
    if isinstance(case, dict):
        _send_raw(party.health, bytes.fromhex(case["raw"]))
        return
    calls = []
    for method, request, wait in case:
        data = bytes.fromhex(request) if isinstance(request, str) else bytes(request)
        kind = party.channels[1].unary_stream(f"{HEALTH}/{method}")
        calls.append((kind(data, timeout=REQUEST_S), wait, method == "Watch" and _known(data)))
    for call, wait, goes_on in calls:
        try:
            for reply in call if wait else ():
                health_pb2.HealthCheckResponse.FromString(reply)
                if goes_on:  # says more when something changes, which it does not
                    break
        except grpc.RpcError as error:
            _check_status(error, HEALTH_ANSWERS)
        finally:
            call.cancel()


def _known(request: bytes) -> bool:
    """Whether this asks for a service that the party has: watching another one ends at once."""
    try:
        return health_pb2.HealthCheckRequest.FromString(request).service in ("", SERVICE)
    except DecodeError:
        return False


# --------------------------------------------------------------------------------------------- metrics


def _metrics_case(rng: random.Random) -> bytes:
    """Bytes, and how the caller ends: it waits for the answer, resets, or goes in the middle of it."""
    seeds = [
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n\r\n",
        b"GET /metrics?name[]=mpcache_rounds_total&name[]=%ff%00 HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text; escaping=allow-utf-8\r\n\r\n",
        b"GET / HTTP/1.1\r\nAccept: text/plain; version=1.0.0; escaping=values, */*;q=0.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        b"OPTIONS * HTTP/1.1\r\nConnection: keep-alive, Upgrade\r\nExpect: 100-continue\r\n\r\n",
        b"GET /favicon.ico\r\n",
        b"HEAD / HTTP/9.9\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n", PREFACE,
    ]  # fmt: skip
    data = rng.choice(seeds)
    match rng.randrange(8):
        case 0:
            data = rng.randbytes(rng.choice((1, 30, 3000)))
        case 1:  # oversized: the line, the headers, one header
            long = rng.choice((b"a" * 70_000, b"%41" * 30_000, b"name[]=x&" * 9000))
            line, headers = b"GET /?" + long + b" HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9000
            one = b"GET / HTTP/1.1\r\nAccept: " + long[:60_000] + b"\r\n"
            data = rng.choice((line, headers, one)) + b"\r\n"
        case _:
            data = damaged(rng, data, seeds)
    return _text([data, rng.choice(("end", "end", "end", "reset", "leave"))])


def _ask_metrics(party: Party, case: Any) -> None:
    data, end = bytes.fromhex(case[0]), case[1]
    gone = suppress(OSError)  # it may have heard enough, and reset the connection
    with socket.create_connection(("127.0.0.1", party.metrics), REQUEST_S) as caller, gone:
        caller.sendall(data)
        if end == "reset":
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif end == "end":
            _check_page(caller)
    with urllib.request.urlopen(f"http://127.0.0.1:{party.metrics}/metrics", timeout=REQUEST_S) as page:
        assert b'mpcache_ready{party="dealer"} 1.0' in page.read()


def _check_page(caller: socket.socket) -> None:
    """What comes until the party ends the connection, which it does when nothing more is to come."""
    caller.shutdown(socket.SHUT_WR)
    answer = b""
    try:
        while piece := caller.recv(1 << 16):
            answer += piece
    except TimeoutError:
        raise AssertionError(f"no end of the answer: {answer!r:.300}") from None
    assert b"Traceback" not in answer and b" 500 " not in answer[:20], answer[:3000]


# --------------------------------------------------------------------------------------------- Connect


def _hello(hello: Hello) -> bytes:
    said = pb.Hello(version=hello.version, rank=int(hello.rank), nonce=hello.nonce, public=dict(hello.public))
    frame: bytes = pb.Frame(hello=said).SerializeToString()
    return frame


def _stream(session: str, rank: Rank, frames: list[Any]) -> dict[str, Any]:
    return {"metadata": [[RANK_KEY, str(int(rank))], [SESSION_KEY, session]], "frames": frames}


def _connect_case(rng: random.Random) -> bytes:
    """One or two peers of a session, with something wrong in the metadata, in the frames, or in both."""
    if rng.random() < 0.05:
        return _text({"raw": _garbage(rng)})
    session = rng.randbytes(16).hex()
    peers = rng.choice(([Rank.SERVER, Rank.CLIENT], [Rank.CLIENT, Rank.SERVER], [Rank.CLIENT]))
    streams = [_stream(session, peer, odd_frames(rng, peer)) for peer in peers]
    for stream in streams:
        stream["metadata"] = odd_metadata(rng, stream["metadata"])
    method = "Connect" if rng.random() < 0.95 else rng.choice(("connect", "Nothing", "", "Connect/x"))
    return _text({"method": method, "streams": streams})


def odd_metadata(rng: random.Random, pairs: list[list[Any]]) -> list[list[Any]]:
    """Values that are none, twice, missing, or much too long. Values with -bin at their key are bytes."""
    texts = ("", "0", "1", "2", "3", "-1", "01", "+1", "1.0", "9" * 18, "9" * 19, "9" * 40, "x" * 3000,
             "65535", "65536", "99999", "1 ", " 1", "1,2", "../../etc", "5e" * 16, "5E" * 16, "unix:/tmp/x",
             "127.0.0.1:22", "[::1]:22", "%2e", "None", "~" * 200)  # fmt: skip
    for _ in range(rng.choice((0, 1, 1, 2))):
        key = rng.choice((RANK_KEY, SESSION_KEY, RECEIVED_KEY, RECEIVED_KEY, BEACON_KEY, BEACON_KEY, "odd"))
        match rng.randrange(5):
            case 0:
                pairs = [pair for pair in pairs if pair[0] != key]
            case 1:
                reason = rng.choice((*NUMBERS, b"x" * 3000, rng.randbytes(50)))
                pairs.append([REASON_KEY, reason])
            case 2:
                pairs = [pair for pair in pairs if pair[0] != key] + [[key, rng.choice(texts)]]
            case _:
                pairs.append([key, rng.choice(texts)])
    return pairs


def odd_frames(rng: random.Random, peer: Rank) -> list[Any]:
    """A peer's first frames: lost, doubled, swapped, damaged, replaced, too large (a number: of bytes)."""
    hello = Hello(PROTOCOL_VERSION, peer, rng.randbytes(16).hex(), said(PublicConfig()))
    facts = [pb.Frame(facts=pb.Facts(step=step, json=json.dumps({"session": "00", "context_tokens": 40})))
             for step in ("facts/model", "facts/question", "facts/agreed")]  # fmt: skip
    tensors = pb.Frame(tensors=pb.Tensors(step="seeds/tape", layout="uint8(32,)", data=bytes(32)))
    others = (pb.Frame(ack=pb.Ack(frames=rng.choice((0, 1, 2**63)))), pb.Frame(bye=pb.Bye()),
              pb.Frame(abort=pb.Abort(reason="\x1b[2J\n" * rng.choice((1, 900)))))  # fmt: skip
    frames: list[Any] = [_hello(hello), *(f.SerializeToString() for f in (*facts, tensors))]
    seeds = [*frames, *(f.SerializeToString() for f in others)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        i, j = rng.randrange(len(frames)), rng.randrange(len(frames))
        match rng.randrange(8):
            case 0 if len(frames) > 1:
                del frames[i]
            case 1:
                frames.insert(j, frames[i])
            case 2:
                frames[i], frames[j] = frames[j], frames[i]
            case 3:
                frames.insert(i, rng.choice(seeds))
            case 4:
                frames[i] = rng.randbytes(rng.choice((0, 1, 100, 5000)))
            case 5 if rng.random() < 0.2:
                frames[i] = rng.choice((LIMIT - 5, LIMIT, LIMIT + 1, 50 * LIMIT))
            case _ if isinstance(frames[i], bytes):
                frames[i] = damaged(rng, frames[i], seeds)
    return frames


def _connect(party: Party, case: Any) -> None:
    if "raw" in case:
        address = party.settings.addresses.dealer
        _send_raw(int(address.rpartition(":")[2]), bytes.fromhex(case["raw"]))
        return
    open_stream = party.channels[0].stream_stream(f"/{SERVICE}/{case['method']}")
    calls = []
    for stream in case["streams"]:
        metadata = [(k, bytes.fromhex(v) if k.endswith("-bin") else v) for k, v in stream["metadata"]]
        frames = [bytes.fromhex(frame) if isinstance(frame, str) else frame for frame in stream["frames"]]
        calls.append(open_stream(bytes_of(frames), metadata=metadata, timeout=REQUEST_S))
    for call in calls:
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            _check_status(error, ANSWERS)


def bytes_of(frames: list[Any]) -> Iterator[bytes]:
    """Frames of `odd_frames`, as they are sent."""
    return (bytes(frame) for frame in frames)


# ----------------------------------------------------------------------------------------------- both


def _check_status(error: Any, allowed: set[grpc.StatusCode]) -> None:
    """A call ends with a status that says what is wrong, in one line."""
    code, details = error.code(), error.details() or ""
    assert code in allowed, f"{code}: {details!r:.1000}"
    assert details.isprintable() and len(details) < 2600 and "Traceback" not in details, f"{details!r:.3000}"


def _garbage(rng: random.Random) -> bytes:
    """Bytes for a port that speaks HTTP/2: none of it, or its beginning and then something else."""
    after = PREFACE + b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8)  # and a ping
    return rng.choice((rng.randbytes(rng.choice((1, 50, 5000))), damaged(rng, after, [PREFACE, after]),
                       PREFACE + rng.randbytes(rng.choice((1, 50, 5000)))))  # fmt: skip


def _send_raw(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), REQUEST_S) as caller:
        caller.settimeout(0.02)
        with suppress(OSError):
            caller.sendall(data)
            while caller.recv(1 << 16):
                pass
