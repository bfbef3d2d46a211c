"""Say who dials whom, and with which of gRPC's options: sizes, keepalive, reconnecting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpcache.rank import Rank
from mpcache.transport.flow_control import READ_AHEAD_BYTES, largest_frame
from mpcache_parties.network.metadata import RANK_KEY
from mpcache_protos import party_pb2

SERVICE = party_pb2.DESCRIPTOR.services_by_name["Party"].full_name
CONNECT = f"/{SERVICE}/Connect"  # the one method: a stream in each direction
PING_EVERY_S = 5.0
PING_TIMEOUT_S = 15.0

Options = list[tuple[str, Any]]

OPTIONS: Options = [
    ("grpc.http2.bdp_probe", 0),  # else gRPC reads ahead as far as it likes, past every room
    ("grpc.http2.lookahead_bytes", READ_AHEAD_BYTES),
    ("grpc.http2.max_frame_size", 1 << 20),  # 16 kB by default: a quarter more work for a dealer's megabytes
    ("grpc.keepalive_time_ms", int(PING_EVERY_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),  # a minute by default, whatever is above
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.enable_http_proxy", 0),  # a proxy between parties must be a decision, not an environment variable
]
DIAL_OPTIONS = [
    *OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
LISTEN_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]  # else two parties could share a port unnoticed


def channel_options(me: Rank, options: Options) -> Options:
    """Return these options, and the size of a frame that gRPC is to refuse before this party sees it."""
    return [*options, ("grpc.max_receive_message_length", largest_frame(me))]


def dials(rank: Rank, peer: Rank) -> bool:
    """Return whether `rank` is the one that connects: the client to both, the server to the dealer."""
    return rank is not peer and (peer is Rank.DEALER or rank is Rank.CLIENT)


def caller_in(about: Mapping[str, Any], me: Rank) -> Rank | None:
    """Return which of those that dial `me` a stream's metadata names; None where it names none."""
    said = about.get(RANK_KEY)
    return next((rank for rank in Rank if str(int(rank)) == said and dials(rank, me)), None)
