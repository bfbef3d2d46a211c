"""The debug engine: the decode program in plain fixed point, every value checked against its range.

`CheckedOps` is `FastOps` with the protocols replaced by what they mean (mpcache.engines.ideal), so that
scales, rings and the places of truncations are those of the private run. `Ranges` reads the program: it
judges every claim, and remembers how near each operation came to its bounds.

    ranges = Ranges()
    session = Session(CheckedOps(), ranges, shape, policy)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpcache.engines import ideal
from mpcache.engines.fast import FastOps
from mpcache.engines.ideal import Claim
from mpcache.errors import OutOfRange
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.runtime.party import Party
from mpcache.runtime.program import Opening, Program, Request, local
from mpcache.runtime.shares import MaskedOperand, Share, encode


class CheckedOps(FastOps):
    """`Ops` on shares that are the whole secret. bits: fraction bits, as `FastOps` has them."""

    name = "checked"
    do = ideal

    def __init__(self, bits: int = 16) -> None:
        super().__init__(Rank.SERVER, bits)

    def secret(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None
    ) -> Share:
        if value is None:
            raise ValueError("the debug engine knows every input")
        bits = self.bits if bits is None else bits
        return Share(encode(value.cpu(), bits).reshape(tuple(shape)), bits, owner)

    def prepare_own(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, ring: int = 48
    ) -> Program[MaskedOperand]:
        return self.prepare(self.secret(value, shape, owner), ring)

    def start_verdict(self, rounds: int) -> Program[Any]:
        return local(None)  # `Ranges` judges

    def finish_verdict(self, started: Any) -> Program[torch.Tensor | None]:
        return local(None)


@dataclass
class Range:
    """What one operation saw, in the value's own units, not raw ones.

    The bound is [low, high), or the size below `high` where `low` is None.
    largest, smallest: of all values (of their sizes, where `low` is None).  step: of the largest.
    """

    operation: str
    high: float
    low: float | None
    largest: float = 0.0
    smallest: float = math.inf
    step: str = ""

    @property
    def spare_bits(self) -> float:
        """How many times the largest value could double."""
        return math.inf if self.largest == 0 else math.log2(self.high / self.largest)


class Ranges(Party):
    """Reads a program of `CheckedOps`. Raises OutOfRange with operation, step, value and bound.

    strict: false remembers what left its range (`largest` beyond `high`) and goes on.
    """

    rank = Rank.SERVER

    def __init__(self, strict: bool = True) -> None:
        self.ledger, self.strict = Ledger(), strict
        self.seen: dict[tuple[str, float], Range] = {}

    def __iter__(self) -> Iterator[Range]:
        """Every operation and bound, the tightest first."""
        return iter(sorted(self.seen.values(), key=lambda r: r.spare_bits))

    def begin(self, phase: str) -> None:
        pass

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        return [item.share for item in items]

    def draw(self, request: Request, step: str) -> list[Any]:
        raise AssertionError(f"{step}: a protocol itself was called, not its meaning: {request.kind}")

    def call(self, run: Callable[[Any, str], Any], step: str) -> Any:
        if isinstance(run, Claim):
            self._judge(run, step)
            return None
        return run(self, step)

    def _judge(self, claim: Claim, step: str) -> None:
        if claim.raw.numel() == 0:
            return
        unit = 2.0**claim.bits
        values = claim.raw if claim.least is not None else claim.raw.abs()
        smallest, largest = (float(v) / unit for v in values.aminmax())
        high, low = claim.most / unit, None if claim.least is None else claim.least / unit
        mine = self.seen.setdefault((claim.operation, high), Range(claim.operation, high, low))
        if largest >= mine.largest:
            mine.largest, mine.step = largest, step
        mine.smallest = min(mine.smallest, smallest)
        for value in (largest, smallest):
            if self.strict and not (low if low is not None else -high) <= value < high:
                allowed = f"below {high:.6g}" if low is None else f"{low:.6g} to {high:.6g}"
                raise OutOfRange(
                    f"{claim.operation} at {step}: a value of {value:.6g} is out of range, {allowed}; "
                    "protocol fast would give a wrong answer"
                )
