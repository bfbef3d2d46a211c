"""What a party shows its operator: metrics for Prometheus, and gRPC's standard health service.

Both answer in the open, so they are bound to this machine unless told otherwise, and neither knows
more than `mpcache_parties.operations.status`: public sizes.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Thread
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mpcache.errors import BadInput, PortInUse
from mpcache_parties.network.channels import SERVICE
from mpcache_parties.operations.status import PartyStatus

HERE = "127.0.0.1"
REQUEST_S = 10.0  # longest silence of a caller in the middle of its request for metrics
CALLERS = 16  # for metrics, at once: each has a thread
REQUEST_BYTES = 4 << 10  # of a question for health: a service's name


@contextmanager
def operated(board: PartyStatus, metrics: str | None, health: str | None) -> Iterator[PartyStatus]:
    """The board, shown at [HOST:]PORT where asked for; not ready any more when the party ends."""
    with ExitStack() as stack:
        if metrics is not None:
            stack.callback(show_metrics(board, metrics))
        if health is not None:
            stack.callback(show_health(board, health))
        try:
            yield board
        finally:
            board.be_ready(False)


class Metrics(Collector):
    """A board as Prometheus reads it."""

    def __init__(self, board: PartyStatus) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        board, totals = self._board, self._board.totals()
        label = board.rank.label
        simple = (
            ("rounds", "Waits for a message of the other computing party.", totals.traffic.rounds),
            ("wire_bytes", "Bytes on the links with framing, both directions.", totals.wire_bytes),
            ("tokens", "Chunks computed: the question is the first token's.", totals.tokens),
            ("dealer_wait_seconds", "Time spent waiting for the dealer: its lag.", totals.dealer_wait_s),
        )
        for name, text, value in simple:
            counter = CounterMetricFamily(f"mpcache_{name}", text, labels=["party"])
            counter.add_metric([label], value)
            yield counter
        text = "Payload bytes on the links; offline: with the dealer."
        payload = CounterMetricFamily("mpcache_bytes", text, labels=["party", "traffic", "direction"])
        for direction in ("sent", "received"):
            payload.add_metric([label, "online", direction], getattr(totals.traffic, direction))
            payload.add_metric([label, "offline", direction], getattr(totals.traffic, f"offline_{direction}"))
        yield payload
        phase = GaugeMetricFamily("mpcache_phase", "Sessions in each phase.", labels=["party", "phase"])
        for name, count in board.phases().items():
            phase.add_metric([label, name], count)
        yield phase
        ended = CounterMetricFamily("mpcache_sessions", "Ended sessions.", labels=["party", "outcome"])
        for name, count in board.ended.items():
            ended.add_metric([label, name], count)
        yield ended
        ready = GaugeMetricFamily("mpcache_ready", "1: serving; 0: starting or ending.", labels=["party"])
        ready.add_metric([label], int(board.ready))
        yield ready


class _Page(BaseHTTPRequestHandler):
    """Every GET gets all metrics as text, whatever else it asks for: prometheus_client's own server raises
    on an odd `Accept`."""

    server: _Pages
    timeout = REQUEST_S

    def do_GET(self) -> None:
        page = generate_latest(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Who asks is not logged."""


class _Pages(ThreadingHTTPServer):
    """Serves metrics. A caller that goes away in the middle is no fault of this party's."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Raises OSError."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self.registry = registry
        self._places = BoundedSemaphore(CALLERS)
        super().__init__((host, port), _Page)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)  # as many as there may be are silent: come again
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def show_metrics(board: PartyStatus, place: str) -> Callable[[], None]:
    """Serve `/metrics` at [HOST:]PORT; the result ends it. Raises BadInput or PortInUse."""
    host, port = where("--metrics", place)
    registry = CollectorRegistry()
    registry.register(Metrics(board))
    ProcessCollector(registry=registry)  # memory and CPU time of this process
    try:
        server = _Pages(host, port, registry)
    except OSError as error:
        raise PortInUse(f"--metrics {place}: cannot listen there: {error.strerror or error}") from None
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join(2.0)

    return end


class _Health(health.HealthServicer):
    """The standard one keeps every name that was ever watched; this one keeps its own two."""

    def Watch(self, request: Any, context: Any, send_response_callback: Any = None) -> Any:
        if request.service in (health.OVERALL_HEALTH, SERVICE):
            return super().Watch(request, context, send_response_callback)
        status = health_pb2.HealthCheckResponse
        send_response_callback(status(status=status.SERVICE_UNKNOWN))
        send_response_callback(None)  # the end: it will never be known
        return None


def show_health(board: PartyStatus, place: str) -> Callable[[], None]:
    """Answer grpc.health.v1.Health at [HOST:]PORT: SERVING while the board is ready, else NOT_SERVING.

    The result ends it. Raises BadInput or PortInUse.
    """
    host, port = where("--health", place)
    servicer = _Health()

    def show(ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in (health.OVERALL_HEALTH, SERVICE):
            servicer.set(service, status.SERVING if ready else status.NOT_SERVING)

    show(board.ready)
    board.on_ready.append(show)
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", REQUEST_BYTES)]
    server = grpc.server(ThreadPoolExecutor(2), options=options, maximum_concurrent_rpcs=8)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise PortInUse(f"--health {place}: cannot listen there; is the port in use?") from None
    server.start()
    return lambda: server.stop(None).wait(2.0)


def where(flag: str, place: str) -> tuple[str, int]:
    """[HOST:]PORT in parts. Raises BadInput."""
    host, _, port = place.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise BadInput(f"{flag} is {place!r}; give PORT or HOST:PORT with a port from 1 to 65535")
    return host or HERE, int(port)
