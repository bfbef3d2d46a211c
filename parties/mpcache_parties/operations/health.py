"""Answer gRPC's standard health service for a party, SERVING while it is ready; and ask it.

It answers in the open, so it is bound to this machine unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mpcache.errors import PortInUse
from mpcache_parties.network.channels import SERVICE
from mpcache_parties.operations.own_address import own_address
from mpcache_parties.operations.status import PartyStatus

REQUEST_BYTES = 4 << 10  # of a question for health: a service's name


class _Health(health.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """The standard one keeps every name that was ever watched; this one keeps its own two."""

    def Watch(self, request: Any, context: Any, send_response_callback: Any = None) -> Any:
        if request.service in (health.OVERALL_HEALTH, SERVICE):
            return super().Watch(request, context, send_response_callback)
        answer = health_pb2.HealthCheckResponse
        send_response_callback(answer(status=answer.SERVICE_UNKNOWN))
        send_response_callback(None)  # the end: it will never be known
        return None


def show_health(status: PartyStatus, place: str) -> Callable[[], None]:
    """Answer grpc.health.v1.Health at [HOST:]PORT: SERVING while the status is ready, else NOT_SERVING.

    The result ends it. Raises BadInput or PortInUse.
    """
    host_port = own_address("--health", place)
    servicer = _Health()

    def show(ready: bool) -> None:
        answer = health_pb2.HealthCheckResponse
        for service in (health.OVERALL_HEALTH, SERVICE):
            servicer.set(service, answer.SERVING if ready else answer.NOT_SERVING)

    show(status.ready)
    status.on_ready.append(show)
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", REQUEST_BYTES)]
    server = grpc.server(ThreadPoolExecutor(2), options=options, maximum_concurrent_rpcs=8)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(str(host_port))
    except RuntimeError:
        raise PortInUse(f"--health {place}: cannot listen there; is the port in use?") from None
    server.start()
    return lambda: server.stop(None).wait(2.0)


def is_serving(address: str, seconds: float) -> bool | None:
    """Ask the health service at HOST:PORT whether the party is ready; None if nobody answers in time."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=seconds, wait_for_ready=True
            )
        except grpc.RpcError:
            return None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
