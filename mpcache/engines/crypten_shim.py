"""The one place where CrypTen 0.4.1 is imported, and what it needs to run here unchanged.

Four things are put right, none of them in CrypTen's own protocol code:
- torch moved `torch.onnx._internal.registration`; CrypTen imports it for ONNX conversion, which
  this project does not use. The new module is put under the old name.
- CrypTen chooses between two communicators of its own. All its code asks `communicator.get()`,
  which is replaced by one that returns this thread's communicator.
- Its provider of correlated randomness and its generators (Mersenne Twister) are replaced: every
  mask and share comes from the dealer's tape or from AES-CTR.
- Its configuration is one global object that its functions change while they run; it is made
  thread-local, so that two parties can run in two threads of one process.
"""

from __future__ import annotations

import importlib
import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from mpcache.runtime.party import Party

try:
    importlib.import_module("torch.onnx._internal.registration")
except ModuleNotFoundError:
    sys.modules["torch.onnx._internal.registration"] = importlib.import_module(
        "torch.onnx._internal.torchscript_exporter.registration"
    )

import crypten
import crypten.communicator
import crypten.config.config
import crypten.mpc
from crypten.communicator.communicator import Communicator
from crypten.mpc import MPCTensor
from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor

from mpcache.rank import Rank
from mpcache.runtime import correlations
from mpcache.runtime.meta import broadcast, materialise
from mpcache.runtime.program import Opening, Request
from mpcache.runtime.rng import KeyStream

crypten.CrypTensor.set_grad_enabled(False)
XOR = torch.distributed.ReduceOp.BXOR


class _Current(threading.local):
    """The party that this thread plays, and the step that it is at."""

    party: Party | None = None
    step: str = ""


_current = _Current()


def call(party: Party, run: Callable[[], Any], step: str) -> Any:
    """Run CrypTen code as `party`; what it opens and draws is booked under `step`."""
    before = _current.party, _current.step
    _current.party, _current.step = party, step
    try:
        return run()
    finally:
        _current.party, _current.step = before


def _party() -> Party:
    if _current.party is None:
        raise RuntimeError("CrypTen code runs only inside crypten_shim.call")
    return _current.party


class LinkCommunicator(Communicator):  # type: ignore[misc]
    """CrypTen's communicator over a party's link: every collective is a set of openings."""

    def get_world_size(self) -> int:
        return 2

    def get_rank(self) -> int:
        return int(_party().rank)

    def _open(self, *items: Opening) -> list[Any]:
        opened = _party().open(items, _current.step)
        return [materialise(t, i.share.device) for t, i in zip(opened, items, strict=True)]

    def all_reduce(self, input: Any, op: Any = None, batched: bool = False) -> Any:
        return self._reduce(input, None, op, batched)

    def reduce(self, input: Any, dst: int, op: Any = None, batched: bool = False) -> Any:
        return self._reduce(input, Rank(dst), op, batched)

    def _reduce(self, input: Any, to: Rank | None, op: Any, batched: bool) -> Any:
        tensors = input if batched else [input]
        opened = self._open(*(Opening(t, "masked by CrypTen", to=to, xor=op == XOR) for t in tensors))
        return opened if batched else opened[0]

    def broadcast(self, input: Any, src: int, batched: bool = False, **_: Any) -> Any:
        tensors = input if batched else [input]
        opened = self._open(*(Opening(t, "CrypTen broadcast", sender=Rank(src)) for t in tensors))
        return opened if batched else opened[0]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self._open(*(Opening(tensor, "CrypTen gather", sender=r) for r in (Rank.SERVER, Rank.CLIENT)))

    def gather(self, tensor: torch.Tensor, dst: int) -> list[Any]:
        items = (
            Opening(tensor, "CrypTen gather", sender=r, to=Rank(dst)) for r in (Rank.SERVER, Rank.CLIENT)
        )
        opened = self._open(*items)
        return opened if self.get_rank() == dst else [None]

    def scatter(self, scatter_list: Sequence[torch.Tensor], src: int, **_: Any) -> torch.Tensor:
        me = self.get_rank()
        if me == src:
            self._open(
                *(
                    Opening(t, "CrypTen scatter", sender=Rank(src), to=Rank(r))
                    for r, t in enumerate(scatter_list)
                    if r != src
                )
            )
            return scatter_list[me]
        template = torch.empty_like(scatter_list[me])
        (mine,) = self._open(Opening(template, "CrypTen scatter", sender=Rank(src), to=Rank(me)))
        return cast(torch.Tensor, mine)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        self._open(Opening(tensor, "CrypTen send", sender=Rank(self.get_rank()), to=Rank(dst)))

    def recv(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        me = Rank(self.get_rank())
        (received,) = self._open(Opening(tensor, "CrypTen send", sender=Rank(src), to=me))
        return cast(torch.Tensor, received)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, dtype=torch.int64))


class TapeProvider:
    """CrypTen's provider interface over the party's tape (its TFP and TTP are not reachable)."""

    NAME = "tape"

    def _draw(self, request: Request, device: Any) -> list[torch.Tensor]:
        parts = _party().draw(request, _current.step)
        return [materialise(p, device or "cpu") for p in parts]

    def generate_additive_triple(
        self, size0: torch.Size, size1: torch.Size, op: str, device: Any = None, *args: Any, **kwargs: Any
    ) -> list[Any]:
        if args or kwargs:
            raise ValueError(f"convolutions are not used here: {op} with {args} {kwargs}")
        fn = getattr(torch, op)
        a, b = (torch.empty(s, dtype=torch.int64, device="meta") for s in (size0, size1))
        out = tuple(fn(a, b).shape)
        parts = self._draw(correlations.triple(tuple(size0), tuple(size1), out, fn), device)
        return [ArithmeticSharedTensor.from_shares(p, precision=0) for p in parts]

    def square(self, size: torch.Size, device: Any = None) -> list[Any]:
        parts = self._draw(correlations.square(tuple(size)), device)
        return [ArithmeticSharedTensor.from_shares(p, precision=0) for p in parts]

    def generate_binary_triple(self, size0: torch.Size, size1: torch.Size, device: Any = None) -> list[Any]:
        out = broadcast(size0, size1)
        parts = self._draw(correlations.binary_triple(tuple(size0), tuple(size1), out), device)
        return [BinarySharedTensor.from_shares(p) for p in parts]

    def B2A_rng(self, size: torch.Size, device: Any = None) -> tuple[Any, Any]:
        _, arithmetic, binary = self._draw(correlations.shared_bit(tuple(size)), device)
        return (
            ArithmeticSharedTensor.from_shares(arithmetic, precision=0),
            BinarySharedTensor.from_shares(binary),
        )

    def wrap_rng(self, size: torch.Size, device: Any = None) -> Any:
        raise ValueError("wrap counting is CrypTen's protocol for three parties and more")


class _Generators(dict[Any, Any]):
    """`crypten.generators[kind][device]`: the current party's AES-CTR stream of that kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __getitem__(self, device: Any) -> KeyStream | None:
        return _party().stream(self._kind)


def _uniform(
    size: Any, ring_size: int = 2**64, generator: KeyStream | None = None, device: Any = None, **_: Any
) -> torch.Tensor:
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(size, dtype=torch.int64, device="meta")
    if math.prod(size) == 0:  # CrypTen makes an empty tensor before it wraps one
        return torch.empty(size, dtype=torch.int64)
    stream = generator if generator is not None else _party().stream("local")
    if stream is None:
        raise RuntimeError("this party has no randomness of its own")
    return stream.tensor(tuple(size))


def _uniform_bits(size: Any, bitlength: int | None = None, **kwargs: Any) -> torch.Tensor:
    words = _uniform(size, **kwargs)
    return words if bitlength in (None, 64) else words & ((1 << bitlength) - 1)


class _ThreadLocalConfig:
    """A data descriptor that gives each thread its own copy of CrypTen's configuration."""

    def __init__(self, initial: Any) -> None:
        self._initial = initial
        self._local = threading.local()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return getattr(self._local, "value", self._initial)

    def __set__(self, instance: Any, value: Any) -> None:
        self._local.value = value


def _install() -> None:
    communicator, provider = LinkCommunicator(), TapeProvider()
    crypten.communicator.get = lambda: communicator
    crypten.mpc.get_default_provider = lambda: provider
    crypten.generators.update({kind: _Generators(kind) for kind in crypten.generators})
    replaced = {"generate_random_ring_element": _uniform, "generate_kbit_random_tensor": _uniform_bits}
    for module in list(sys.modules.values()):
        if module is not None and module.__name__.startswith("crypten"):
            for name, ours in replaced.items():
                if hasattr(module, name):
                    setattr(module, name, ours)
    cls = crypten.config.config.CrypTenConfig
    cls.config = _ThreadLocalConfig(crypten.cfg.config)


_install()

__all__ = ["LinkCommunicator", "MPCTensor", "TapeProvider", "call", "crypten"]
