"""What an operator sees of a party: its log, metrics and health; and how it ends when told to."""

from __future__ import annotations

import base64
import json
import signal
import socket
import struct
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest

from mpcache.config import PublicConfig
from mpcache.errors import BadInput, PortInUse
from mpcache.ledger import Ledger
from mpcache.model import load_model
from mpcache.rank import Rank
from mpcache.transport.address import HostPort
from mpcache_parties.network.channels import SERVICE
from mpcache_parties.operations import metrics as operations
from mpcache_parties.operations.exposure import exposed
from mpcache_parties.operations.logs import Log, LogLevel
from mpcache_parties.operations.metrics import PartyMetrics
from mpcache_parties.operations.own_address import own_address
from mpcache_parties.operations.status import PartyStatus, SessionPhase
from tests.support.links import free_ports, free_settings
from tests.support.processes import (
    PARTY,
    SOON_S,
    Process,
    errors_of,
    start,
    started,
    write_config,
)

S, C, D = Rank
QUESTION = "where did the gatekeeper bury seventeen pomegranates"
DOCUMENT = "and nebuchadnezzar counted the camels of the city before the watchman slept"


def soon(call: Callable[[], Any], seconds: float = 60) -> Any:
    """What the call returns, as soon as it is true."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if value := call():
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing within {seconds} s")


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Whole lines: the party may be writing one."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ------------------------------------------------------------------------------------- one real session


class Run:
    """Three parties with logs, metrics and health ports."""

    def __init__(self, folder: Path, place: Path, children: list[Process], tokens: int = 25) -> None:
        settings = free_settings()
        public = PublicConfig(policy="full", max_new_tokens=tokens)
        config = write_config(settings.model_copy(update={"public": public}), place / "config.yaml")
        document = place / "document.txt"
        document.write_text(DOCUMENT)
        flags: dict[Rank, list[object]] = {
            S: ["--model", folder, "--context", document],
            C: ["--question", QUESTION, "--no-stop-at-eos"],
            D: [],
        }
        ports = free_ports(6)
        self.metrics = dict(zip(Rank, ports[:3], strict=True))
        self.health = dict(zip(Rank, ports[3:], strict=True))
        self.logs = {rank: place / f"{rank.label}.log" for rank in Rank}
        self.parties: dict[Rank, Process] = {}
        for rank in (C, D, S):
            own = ["--log", self.logs[rank], "--log-level", "debug"]
            own += ["--metrics", self.metrics[rank], "--health", self.health[rank]]
            self.parties[rank] = start(PARTY, "--rank", int(rank), "--config", config, *flags[rank], *own)
            children.append(self.parties[rank])

    def read_metrics(self, rank: Rank) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics[rank]}/metrics", timeout=2) as page:
                return str(page.read(), "utf-8")
        except OSError:
            return ""

    def read_health(self, rank: Rank) -> str:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        with grpc.insecure_channel(f"127.0.0.1:{self.health[rank]}") as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
            except grpc.RpcError:
                return ""
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def tokens(self, rank: Rank) -> list[dict[str, Any]]:
        return [line for line in lines_of(self.logs[rank]) if line["event"] == "token"]


@pytest.mark.processes
def test_a_session_is_seen_in_logs_metrics_and_health_and_no_secret_is(folder: Path, tmp_path: Path) -> None:
    with started() as children:
        run = Run(folder, tmp_path, children)  # long enough to be met in its decode phase
        assert soon(lambda: "SERVING" in run.read_health(D))
        page = soon(lambda: 'phase="decode"} 1.0' in (text := run.read_metrics(C)) and text)
        assert run.read_health(C) == "SERVING"
        outputs = {rank: child.communicate(timeout=120) for rank, child in run.parties.items()}
    assert [child.returncode for child in run.parties.values()] == [0, 0, 0], outputs
    names = ["rounds", "wire_bytes", "tokens", "dealer_wait_seconds", "bytes", "sessions"]
    assert all(f"# TYPE mpcache_{name}_total counter" in page for name in names)
    for rank in Rank:
        log = lines_of(run.logs[rank])
        assert log[0]["event"] == "start"
        phases = [line["phase"] for line in log if line["event"] == "phase"]
        assert list(dict.fromkeys(phases)) == ["hello", "setup", "context", "question", "decode", "close"]
        assert [line["who"] for line in log] == [rank.label] * len(log)
        assert [line["step"] for line in run.tokens(rank)][:3] == ["question", "decode1", "decode2"]
        assert log[-1]["event"] == "end"
    steps = zip(run.tokens(S), run.tokens(C), strict=True)
    assert all(
        ours["rounds"] == theirs["rounds"] and ours["sent"] == theirs["received"] for ours, theirs in steps
    )

    answer = outputs[C][0]
    pages = "".join(file.read_text() for file in run.logs.values()) + page
    told = pages + "".join(noise for _, noise in outputs.values())
    private = {word for word in f"{QUESTION} {DOCUMENT} {answer}".split() if len(word) > 3}
    assert len(private) > 10
    assert not [word for word in private if word in told]
    for _, weight in load_model(folder).weights.items():
        data = weight.flatten()[:64]
        raw = data.numpy().tobytes()
        for value in data.tolist():
            assert f"{value:.6g}" not in pages or abs(value) in (0, 1)
        for text in (raw[:16].hex(), base64.b64encode(raw[:15]).decode(), str(list(raw[:8]))[1:-1]):
            assert text not in pages


# A party's log is open until its process ends.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_log_that_told_the_question_would_be_seen(tmp_path: Path) -> None:
    """The check above sees what it is for."""
    log = Log("client", tmp_path / "log")
    log("note", text=f"asking {QUESTION}")
    assert all(word in (tmp_path / "log").read_text() for word in QUESTION.split())


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("victim", list(Rank))
def test_a_stop_signal_lets_the_token_in_flight_end(victim: Rank, folder: Path, tmp_path: Path) -> None:
    """Whoever is stopped says after how many tokens, and so many both computing parties have made."""
    with started() as children:
        run = Run(folder, tmp_path, children)
        soon(lambda: run.tokens(C), 120)
        run.parties[victim].send_signal(signal.SIGTERM)
        noises = {rank: child.communicate(timeout=SOON_S)[1] for rank, child in run.parties.items()}
    done = len(run.tokens(C))
    assert 1 <= done < 25
    said = f"{victim.label}: stopped by SIGTERM after {done} token{'s' * (done != 1)}"
    for rank, noise in noises.items():
        assert run.parties[rank].returncode == (143 if rank is victim else 3)
        (line,) = errors_of(noise)
        assert said in line
        assert lines_of(run.logs[rank])[-1]["event"] == "error"
    assert len(run.tokens(S)) == done


# ------------------------------------------------------------------------------------------- the parts


def test_metrics_are_the_ledgers() -> None:
    board, ledger = PartyStatus(S), Ledger()
    registry = CollectorRegistry()
    registry.register(PartyMetrics(board))
    with board.session(ledger) as watch:
        ledger.book("facts/model", sent=7, received=1)
        for name in ("setup", "context", "question", "decode1", "decode11"):
            watch.began(name)
            ledger.book(f"{name}/layer0/qkv", rounds=2, sent=100, received=90, offline_received=1000)
            if name.startswith("decode"):
                ledger.book(f"more/{name}", received=13)
            watch.ended(name, 400.0 if name.startswith("decode") else 1.0)
        watch.waited(0.25)
        board.refuse(3)
        ledger.wire_bytes += 0
        assert board.totals().traffic == ledger.total()
        assert board.phases()[SessionPhase.DECODE] == 1
    assert board.totals().traffic == ledger.total()
    assert sum(board.phases().values()) == 0
    page = generate_latest(registry).decode()
    for line in (
        'mpcache_rounds_total{party="server"} 10.0',
        'mpcache_bytes_total{direction="sent",party="server",traffic="online"} 507.0',
        'mpcache_bytes_total{direction="received",party="server",traffic="offline"} 5000.0',
        'mpcache_tokens_total{party="server"} 3.0',
        'mpcache_dealer_wait_seconds_total{party="server"} 0.25',
        'mpcache_sessions_total{outcome="done",party="server"} 1.0',
        'mpcache_first_token_seconds_bucket{le="0.05",party="server"} 1.0',
        'mpcache_token_seconds_bucket{le="0.25",party="server"} 0.0',
        'mpcache_token_seconds_bucket{le="0.5",party="server"} 2.0',
        'mpcache_token_seconds_bucket{le="+Inf",party="server"} 2.0',
        'mpcache_token_seconds_count{party="server"} 2.0',
        'mpcache_refused_connections_total{party="server"} 3.0',
    ):
        assert line in page.splitlines()


def test_a_session_that_fails_is_counted_so() -> None:
    board = PartyStatus(C)
    with pytest.raises(ValueError), board.session(Ledger()):
        raise ValueError
    assert board.ended == {"done": 0, "failed": 1}


def test_health_follows_the_board() -> None:
    (port,) = free_ports(1)
    board = PartyStatus(D)
    stub = health_pb2_grpc.HealthStub(channel := grpc.insecure_channel(f"127.0.0.1:{port}"))
    status = health_pb2.HealthCheckResponse
    with exposed(board, None, str(port)):
        for ready, expected in (
            (None, status.NOT_SERVING),
            (True, status.SERVING),
            (False, status.NOT_SERVING),
        ):
            if ready is not None:
                board.be_ready(ready)
            for service in ("", SERVICE):
                request = health_pb2.HealthCheckRequest(service=service)
                assert stub.Check(request, timeout=5, wait_for_ready=True).status == expected
    channel.close()
    assert not board.ready


def test_places_that_cannot_be() -> None:
    assert own_address("--metrics", "9100") == HostPort("127.0.0.1", 9100)
    assert own_address("--metrics", "0.0.0.0:9100") == HostPort("0.0.0.0", 9100)
    assert own_address("--health", "[::1]:49100") == HostPort("::1", 49100)
    for place in ("", "host", "70000", "a:b", ":0"):
        with pytest.raises(BadInput, match="--health is"):
            own_address("--health", place)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with (
            pytest.raises(PortInUse, match=f"--metrics {port}: cannot listen there"),
            exposed(PartyStatus(S), port, None),
        ):
            pass
        with (
            pytest.raises(PortInUse, match=f"--health {port}: cannot listen there"),
            exposed(PartyStatus(S), None, port),
        ):
            pass


# A party's log is open until its process ends.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_logs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written: Is a directory"):
        Log("server", tmp_path)
    with pytest.raises(BadInput, match="--log-level is 'loud'; give one of debug, info"):
        Log("server", tmp_path / "log", "loud")
    log = Log("server", tmp_path / "log", "warning")
    log("note")
    log("trouble", LogLevel.ERROR, text='a "quoted"\nline')
    (line,) = lines_of(tmp_path / "log")
    assert (line["who"], line["level"], line["text"]) == ("server", "error", 'a "quoted"\nline')


# ------------------------------------------------------------------------------------------ odd callers


def test_health_keeps_nothing_of_what_it_is_asked() -> None:
    """A watch for a service that will never be known ends, and a long name is not even read."""
    (port,) = free_ports(1)
    with exposed(PartyStatus(D), None, str(port)), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request, answer = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        replies = list(stub.Watch(request(service="x"), timeout=10, wait_for_ready=True))
        assert [reply.status for reply in replies] == [answer.SERVICE_UNKNOWN]
        assert next(stub.Watch(request(service=SERVICE), timeout=10)).status == answer.NOT_SERVING
        for call in (stub.Check, lambda *a, **k: list(stub.Watch(*a, **k))):
            with pytest.raises(grpc.RpcError) as refused:
                call(request(service="x" * 5000), timeout=10)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metrics_wait_for_no_silent_caller(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that says no more, resets, or asks for an odd format holds nothing and leaves no traceback."""
    monkeypatch.setattr(operations._Page, "timeout", 0.2)
    (port,) = free_ports(1)
    with exposed(PartyStatus(D), str(port), None):
        with socket.create_connection(("127.0.0.1", port), 10) as caller:
            caller.sendall(b"GET /met")
            assert caller.recv(100) == b""  # ended by the other side
        with socket.create_connection(("127.0.0.1", port), 10) as caller:
            caller.sendall(b"GET /met")
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        odd = {"Accept": "text/plain; version=x; escaping=y"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=odd)
        with urllib.request.urlopen(request, timeout=10) as page:
            assert b"mpcache_ready" in page.read()
    assert capfd.readouterr().err == ""


def test_metrics_have_a_bounded_number_of_callers() -> None:
    """Silent ones fill the places, not the process: the next one is turned away until one leaves."""
    (port,) = free_ports(1)
    with exposed(PartyStatus(D), str(port), None), ExitStack() as callers:

        def call() -> socket.socket:
            caller = callers.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            caller.sendall(b"GET /met")
            return caller

        silent = [call() for _ in range(operations.CALLERS)]
        refused = call()
        with suppress(ConnectionError):  # a reset, where it had not read what was asked
            assert refused.recv(1) == b""
        for caller in silent:
            caller.close()

        def answered() -> bool:
            with (
                suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page,
            ):
                return b"mpcache_ready" in page.read()
            return False

        assert soon(answered)
