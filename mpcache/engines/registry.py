"""The engines that private sessions run on, by the names that `--protocol` takes."""

from __future__ import annotations

from collections.abc import Mapping

from mpcache.engines.fast import FastBitsOps, FastOps
from mpcache.engines.stock import StockOps

PROTOCOLS: Mapping[str, type[FastOps] | type[StockOps]] = {
    ops.name: ops for ops in (FastOps, FastBitsOps, StockOps)
}
