"""Define the seam between the protocols and the wire: tensors with one peer, in order, counted.

`Link` is what the engines see. `mpcache.transport.local.LocalLink` connects two threads of one process
(tests, the cost model's check); `mpcache_parties.network.grpc_link.GrpcLink` connects processes. Both are
`mpcache.transport.frames.FrameLink`s, and one suite tests both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.tensor_bytes import NUMPY_DTYPES

# What travels and what is kept, by the name that both wire and files give it.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NUMPY_DTYPES}

Spec = tuple[torch.dtype, tuple[int, ...]]  # what a receiver expects: dtype and shape
Buffer = bytes | bytearray | memoryview


class Layout(NamedTuple):
    """How the tensors of one message lie in its data. Units: bytes."""

    text: str  # as both ends write it: `int64(3, 4) bool()`; empty: no tensor
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class Hello:
    """How a party introduces itself. All of it is public."""

    version: int
    rank: Rank
    nonce: str  # random, hex; new in each run
    public: Mapping[str, str] = field(default_factory=dict)  # the public config, flat


class Link(ABC):
    """An ordered, reliable channel to one peer.

    Each message carries the sender's step name and a sequence number; the receiver states the
    step, dtypes and shapes it expects, and anything else is a `Desync` that names both sides.
    `labels` book each tensor's bytes under a finer step name than the message's own.
    A link is used by one thread of its party.
    """

    me: Rank
    peer: Rank
    ledger: Ledger
    offline: bool  # book traffic as offline: one end is the dealer
    before_frame: Callable[[], None]  # called before each frame of tensors, and while one waits for room
    order: Any  # what the peer may still send: a `session_order.Order`
    peer_left: bool  # the peer has ended the session, and takes nothing any more

    @abstractmethod
    def send(self, step: str, tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None) -> None:
        """Queue one message; returns before the peer has it. Books bytes, no round.

        The tensors are copied: the caller may change them afterwards.
        """

    @abstractmethod
    def recv(
        self, step: str, specs: Sequence[Spec], labels: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """Wait for the peer's next message. Books bytes, no round.

        Raises Desync, PeerLost, PeerTimeout or PeerFailed.
        """

    @abstractmethod
    def exchange(
        self, step: str, tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """Both send, then both receive tensors of the same dtypes and shapes: one round."""

    @abstractmethod
    def swap(
        self, step: str, outgoing: Sequence[Buffer], leaving: Layout, coming: Layout,
        labels_out: Sequence[str] | None = None, labels_in: Sequence[str] | None = None,
    ) -> bytes | bytearray:  # fmt: skip
        """Send what there is to send, receive what there is to receive: one round in all.

        outgoing: one after another, the bytes that `leaving` describes. Returns those of `coming`; neither
        becomes a tensor of its own.
        A message that goes one way only is a round too, at both ends: the receiver waits for it.
        """

    @abstractmethod
    def send_facts(self, step: str, facts: Mapping[str, object]) -> None:
        """Queue a small JSON object of public facts (at most 64 KiB). Books bytes, no round."""

    @abstractmethod
    def recv_facts(self, step: str, patience: float | None = None) -> dict[str, Any]:
        """Wait for the peer's facts. Books bytes, no round. Raises as `recv` does.

        patience: seconds of silence that are borne, where they are other than the link's own.
        """

    @abstractmethod
    def skip_to_facts(self, step: str) -> dict[str, Any]:
        """Wait for the peer's facts, and drop all messages before them, one in its middle too."""

    @abstractmethod
    def check_alive(self, step: str) -> None:
        """Raise what the link has failed with, if it has."""

    @abstractmethod
    def poll_facts(self, step: str) -> dict[str, Any] | None:
        """Take the peer's facts if they have come; None if they have not. Raises as `recv` does."""

    @abstractmethod
    def send_hello(self, hello: Hello) -> None:
        """Queue the introduction. Not booked but as `wire_bytes`."""

    @abstractmethod
    def recv_hello(self) -> Hello:
        """Wait for the peer's introduction. Raises as `recv` does."""

    @abstractmethod
    def poll_hello(self) -> Hello | None:
        """Take the peer's introduction if it has come; None if it has not. Raises as `recv` does."""

    @abstractmethod
    def close(self, reason: str = "") -> None:
        """End the channel. With a reason, the peer's next call raises PeerFailed with it."""


Links = Mapping[Rank, Link]  # one party's, by peer


def tensor_of(data: bytes) -> torch.Tensor:
    """Return bytes as a tensor of uint8, to be sent: (len(data),)."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the bytes that `tensor_of` made a tensor of."""
    return tensor.numpy().tobytes()
