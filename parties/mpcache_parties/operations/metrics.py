"""Show a party's metrics to Prometheus: rounds, bytes, tokens, phases, memory.

They answer in the open, so they are bound to this machine unless told otherwise, and know no more than
`mpcache_parties.operations.status`: public sizes.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from threading import BoundedSemaphore, Thread
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mpcache.errors import PortInUse
from mpcache_parties.operations.own_address import own_address
from mpcache_parties.operations.status import BOUNDS_S, Durations, PartyStatus

REQUEST_S = 10.0  # longest silence of a caller in the middle of its request for metrics
CALLERS = 16  # for metrics, at once: each has a thread


class PartyMetrics(Collector):
    """A party's status as Prometheus reads it."""

    def __init__(self, status: PartyStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status, totals = self._status, self._status.totals()
        label = status.rank.label
        simple = (
            ("rounds", "Waits for a message of the other computing party.", totals.traffic.rounds),
            ("wire_bytes", "Bytes on the links with framing, both directions.", totals.wire_bytes),
            ("tokens", "Chunks computed: the question is the first token's.", totals.tokens),
            ("refused_connections", "Callers that were refused.", status.refused),
            ("dealer_wait_seconds", "Time spent waiting for the dealer: its lag.", totals.dealer_wait_s),
        )
        for name, text, value in simple:
            counter = CounterMetricFamily(f"mpcache_{name}", text, labels=["party"])
            counter.add_metric([label], value)
            yield counter
        for name, text, took in (
            ("first_token_seconds", "From a question to its answer's first token.", totals.first_tokens),
            ("token_seconds", "A further token.", totals.further_tokens),
        ):
            yield _histogram(name, text, label, took)
        text = "Payload bytes on the links; offline: with the dealer."
        payload = CounterMetricFamily("mpcache_bytes", text, labels=["party", "traffic", "direction"])
        for direction in ("sent", "received"):
            payload.add_metric([label, "online", direction], getattr(totals.traffic, direction))
            payload.add_metric([label, "offline", direction], getattr(totals.traffic, f"offline_{direction}"))
        yield payload
        phase = GaugeMetricFamily("mpcache_phase", "Sessions in each phase.", labels=["party", "phase"])
        for name, count in status.phases().items():
            phase.add_metric([label, name], count)
        yield phase
        ended = CounterMetricFamily("mpcache_sessions", "Ended sessions.", labels=["party", "outcome"])
        for name, count in status.ended.items():
            ended.add_metric([label, name], count)
        yield ended
        ready = GaugeMetricFamily("mpcache_ready", "1: serving; 0: starting or ending.", labels=["party"])
        ready.add_metric([label], int(status.ready))
        yield ready


def _histogram(name: str, text: str, label: str, took: Durations) -> HistogramMetricFamily:
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    family = HistogramMetricFamily(f"mpcache_{name}", text, labels=["party"])
    family.add_metric([label], list(zip(bounds, accumulate(took.counts), strict=True)), took.total_s)
    return family


class _Page(BaseHTTPRequestHandler):
    """Every GET gets all metrics as text, whatever else it asks for.

    prometheus_client's own server raises on an odd `Accept`.
    """

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
        """Listen at this address. Raises OSError."""
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


def show_metrics(status: PartyStatus, place: str) -> Callable[[], None]:
    """Serve `/metrics` at [HOST:]PORT; the result ends it. Raises BadInput or PortInUse."""
    host_port = own_address("--metrics", place)
    registry = CollectorRegistry()
    registry.register(PartyMetrics(status))
    ProcessCollector(registry=registry)  # memory and CPU time of this process
    try:
        server = _Pages(host_port.host, host_port.port, registry)
    except OSError as error:
        raise PortInUse(f"--metrics {place}: cannot listen there: {error.strerror or error}") from None
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join(2.0)

    return end
