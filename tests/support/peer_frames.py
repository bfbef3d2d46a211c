"""Frames as a peer writes them, honest or not."""

from __future__ import annotations

from mpcache.config import PublicConfig
from mpcache_parties.handshake import PROTOCOL_VERSION
from mpcache_protos import party_pb2 as pb


def tensors(step: str, sequence: int = 0, size: int = 8, layout: str = "int64(1,)") -> bytes:
    message = pb.Tensors(sequence=sequence, step=step, layout=layout, data=bytes(size))
    return bytes(pb.Frame(tensors=message).SerializeToString())


def facts(step: str, json: str = "{}", sequence: int = 0) -> bytes:
    return bytes(pb.Frame(facts=pb.Facts(sequence=sequence, step=step, json=json)).SerializeToString())


HELLO = pb.Frame(
    hello=pb.Hello(version=PROTOCOL_VERSION, rank=1, nonce="00", public=PublicConfig().flat())
).SerializeToString()
BYE = pb.Frame(bye=pb.Bye()).SerializeToString()


def ack(frames: int) -> bytes:
    return bytes(pb.Frame(ack=pb.Ack(frames=frames)).SerializeToString())
