"""The party of the cost reading, which counts, and the operations that it reads once and repeats.

`CostParty` answers a program by shapes and books what both computing parties send, what the dealer deals,
and the work that each request is for. `MemoizedOps` wraps an engine: what was read once with some shapes
is repeated from memory the next time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, cast

import torch

from mpcache.cost.tally import Steps, Tally
from mpcache.ops import Selection, SelectionOf
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.party import ShapeParty, sends
from mpcache.runtime.program import Ask, Call, Draw, Open, Opening, Program, Request
from mpcache.runtime.ring import Matrix
from mpcache.runtime.shares import Awaited, KnownOperand, MaskedOperand, Share, known_rows
from mpcache.runtime.standing import OperandPlace, StandingMasks


@dataclass(frozen=True)
class RecordedCall:
    """A blocking call that was read already, or counts that no ask tells: what it took, and its result."""

    tally: Tally
    result: Any = None

    def __call__(self, party: Any, step: str) -> Any:
        raise RuntimeError("only the cost reading answers this")


class CostParty(ShapeParty):
    """Answers by shapes, and tallies both directions of every step. `steps`: by full step name.

    standing: price operands that the server knows as what it uploads to the dealer once; else each session
    masks them anew.
    """

    def __init__(self, standing: bool = True) -> None:
        super().__init__(Rank.SERVER)
        self.standing = _UploadedMasks(self) if standing else None
        self.steps: Steps = defaultdict(Tally)
        self.largest = 0  # bytes of the largest single correlation

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        server = client = 0
        for item in items:
            n = math.prod(item.share.shape) * item.width
            tally = self.steps[item.step or step]
            if sends(item, Rank.SERVER):
                tally.server_sent += n
                server += n
            if sends(item, Rank.CLIENT):
                tally.client_sent += n
                client += n
        tally = self.steps[step]
        tally.rounds += 1
        tally.critical += max(server, client)
        return [item.share for item in items]  # already a shape

    def draw(self, request: Request, step: str) -> list[Any]:
        tally = self.steps[step]
        tally.server_offline += sum(part.nbytes for part in request.sent_to(Rank.SERVER))
        tally.client_offline += sum(part.nbytes for part in request.sent_to(Rank.CLIENT))
        size = sum(part.held for part in request.parts)
        tally.random_bytes += size
        self.largest = max(self.largest, size)
        _count(tally, request)
        parts: list[Any] = [MetaTensor(part.shape, part.dtype) for part in request.parts]
        return [*parts, None] if request.keep else parts

    def call(self, run: Callable[[Any, str], Any], step: str) -> Any:
        if isinstance(run, RecordedCall):
            self.steps[step] += run.tally
            return run.result
        return run(self, step)

    def by_phase(self) -> dict[str, Steps]:
        """Return the steps of each phase under their names in it."""
        phases: dict[str, Steps] = defaultdict(dict)
        for step, tally in self.steps.items():
            phase, _, name = step.partition("/")
            phases[phase][name] = tally
        return dict(phases)


class _UploadedMasks(StandingMasks):
    """Books what the server sends of each operand to a dealer that does not hold it yet."""

    def __init__(self, party: CostParty) -> None:
        super().__init__()
        self._party = party

    def take(self, x: Share, ring: int, step: str) -> KnownOperand | MaskedOperand:
        operand = super().take(x, ring, step)
        self._party.steps[step].uploaded += self.places[-1].nbytes
        return operand

    def _operand(self, x: Share, place: OperandPlace) -> MaskedOperand:
        return MaskedOperand(x.data, x.data, x.bits, ring=place.ring, known=known_rows(x))

    def _matrix(self, x: Share, place: OperandPlace) -> KnownOperand:
        return KnownOperand(Matrix(x.data), Rank.SERVER, x.bits, place.ring)


def _count(tally: Tally, request: Request) -> None:
    """Add what a correlation is used for."""
    work = request.work
    tally.comparisons += work.comparisons
    tally.multiplications += work.multiplications
    tally.lookups += work.lookups
    tally.multiply_adds += work.multiply_adds
    tally.key_blocks += work.key_blocks


class MemoizedOps:
    """Ops on meta tensors that are read once per shapes of their arguments.

    The second time an operation books what it took and gives the same result, which has shapes and no
    values. Everything that policies call on the inner ops works, whatever its name.
    standing: as the `CostParty` has it that reads.
    """

    def __init__(self, ops: Any, standing: bool = True) -> None:
        self._ops, self._standing = ops, standing
        self._programs: dict[Hashable, tuple[list[Ask], Any]] = {}
        self._results: dict[Hashable, Any] = {}  # of methods that are no programs

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ops, name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            key = (name, _key(args), _key(kwargs))
            if key in self._programs:
                return self._repeat(key)
            if key in self._results:
                return _fresh(self._results[key])
            result = method(*args, **kwargs)
            if isinstance(result, GeneratorType):
                return self._read(key, result)
            self._results[key] = result
            return result

        return call

    def _repeat(self, key: Hashable) -> Program[Any]:
        asks, result = self._programs[key]
        for ask in asks:  # noqa: UP028 - a list takes no answers; they are shapes that are known already
            yield ask
        return _fresh(result)

    def _read(self, key: Hashable, program: Program[Any]) -> Program[Any]:
        asks: list[Ask] = []
        working = 0
        reply: Any = None
        while True:
            try:
                ask = program.send(reply)
                if isinstance(ask, Call) and not isinstance(ask.run, RecordedCall):
                    ask = _note(ask, self._standing)
            except StopIteration as stop:
                result = self._selections(key, stop.value)
                break
            match ask:
                case Open(items):
                    working += sum(8 * math.prod(item.share.shape) for item in items)
                case Draw(request):
                    working += sum(part.held for part in request.parts)
            asks.append(ask)
            reply = yield ask
        last = Call(RecordedCall(Tally(working=working)))
        asks.append(last)
        yield last
        self._programs[key] = _shortened(asks), result
        return result

    def _selections(self, key: Hashable, result: Any) -> Any:
        """Wrap selections among a result, since they are asked for programs, too."""
        if isinstance(result, tuple):
            return tuple(self._selections((key, i), part) for i, part in enumerate(result))
        return _MemoizedSelection(result, key) if isinstance(result, SelectionOf) else result


class _MemoizedSelection(MemoizedOps):
    """A selection among memoized ops; `key`: what it was made from."""

    def __init__(self, selection: Selection, key: Hashable) -> None:
        super().__init__(selection)
        self.key = key


def _note(ask: Call, standing: bool) -> Call:
    """Read a call by itself, CrypTen's code as a rule: all that it takes is booked under one step."""
    alone = CostParty(standing)
    result = alone.call(ask.run, "")
    tally = alone.steps[""]
    # CrypTen frees what it has used: its largest correlation, and as much that is masked and opened.
    tally.working = 2 * alone.largest
    return Call(RecordedCall(tally, result), ask.step)


def _fresh(result: Any) -> Any:
    """Make an object of its own each time: programs may ask whether two values are one and the same."""
    if isinstance(result, list | tuple):
        return type(result)(map(_fresh, result))
    if isinstance(result, Share | MaskedOperand | KnownOperand | _MemoizedSelection):
        twin = object.__new__(type(result))
        twin.__dict__.update(result.__dict__)
        return twin
    return result


@dataclass(frozen=True)
class _Bytes:
    """Stands for shares of which only the size is asked."""

    shape: tuple[int]


def _shortened(asks: Sequence[Ask]) -> list[Ask]:
    """Say the same rounds and amounts in fewer asks: openings by direction, and the rest summed."""
    short: list[Ask] = []
    between: Steps = {}

    def flush() -> None:
        short.extend(Call(RecordedCall(tally), step) for step, tally in between.items())
        between.clear()

    for ask in asks:
        match ask:
            case Open(items, step):
                flush()
                sizes: dict[tuple[Any, Any, str], int] = defaultdict(int)
                for item in items:
                    sizes[item.sender, item.to, item.step] += math.prod(item.share.shape) * item.width
                merged = (
                    Opening(cast(torch.Tensor, _Bytes((n,))), "counted", to, sender, ring=8, step=name)
                    for (sender, to, name), n in sizes.items()
                )
                short.append(Open(tuple(merged), step))
            case Draw(request, step):
                party = CostParty()
                party.draw(request, step)
                between.setdefault(step, Tally())
                between[step] += party.steps[step]
            case Call(run, step):
                between.setdefault(step, Tally())
                between[step] += cast(RecordedCall, run).tally
    flush()
    return short


def _key(value: Any) -> Hashable:
    """Return what an operation's cost depends on: shapes and public numbers, never a tensor's values."""
    match value:
        case torch.Tensor() | MetaTensor():
            return (torch.Tensor, tuple(value.shape), value.dtype)
        case list() | tuple():
            return (list, *map(_key, value))
        case dict():
            return (dict, *((k, _key(v)) for k, v in value.items()))
        case _MemoizedSelection():
            return value.key
        case Awaited():
            return Awaited
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):  # shares, operands
        return (type(value), *(_key(getattr(value, name)) for name in value.__dataclass_fields__))
    return cast(Hashable, value)  # numbers, text; anything else is itself only
