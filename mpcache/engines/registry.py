"""Engines by the name of their protocol. CrypTen's is imported when somebody asks for it, and only then."""

from __future__ import annotations

from importlib.util import find_spec

from mpcache.choices import ProtocolName
from mpcache.engines.fast import FastBitsOps, FastOps
from mpcache.errors import BadInput
from mpcache.ops import AnyEngine
from mpcache.rank import Rank

STOCK = ProtocolName.STOCK
FAST: dict[str, type[FastOps]] = {ops.name: ops for ops in (FastOps, FastBitsOps)}
PROTOCOLS = (*FAST, STOCK)  # what may run between parties


def engine(protocol: str, rank: Rank, bits: int = 16, device: str = "cpu") -> AnyEngine:
    """Make the engine of a protocol for one party. device: cpu, or meta where only shapes are read.

    Raises BadInput for `stock` where CrypTen is not installed.
    """
    if protocol in FAST:
        return FAST[protocol](rank, bits, device)
    check_protocol(protocol)
    from mpcache.engines.stock import StockOps

    return StockOps(rank, bits, device)


def check_protocol(protocol: str) -> None:
    """Raise BadInput for a protocol that cannot run here."""
    if protocol == STOCK and not all(find_spec(name) for name in ("crypten", "omegaconf", "onnx")):
        raise BadInput(
            "protocol stock is CrypTen's own, and CrypTen is not installed; pip install omegaconf onnx and "
            "pip install --no-deps crypten==0.4.1, or choose protocol fast"
        )
