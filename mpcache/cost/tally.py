"""What a policy costs, exactly, for any model shape, before anyone runs it: the fourth reading.

The decode program itself is read, on shapes alone (meta tensors), and what it asks for is counted:
there is no second description that could drift. Rounds and bytes are those of a real run, to the byte
(tests/mpcache/test_cost.py compares with the ledgers of three parties). An operation that was met
before with the same shapes is not read again but repeated from memory (`MemoizedOps`), so a model of
many layers costs little more than one layer, whatever a policy does in which of them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import GeneratorType
from typing import Any, cast

import torch

from mpcache.decode import Operands
from mpcache.engines.fast import FastBitsOps, FastOps
from mpcache.engines.stock import StockOps
from mpcache.model.loading import ModelShape
from mpcache.ops import Ops, Selection, SelectionOf
from mpcache.policy import BoundPolicy, parse
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.party import ShapeParty, sends
from mpcache.runtime.program import Ask, Call, Draw, Open, Opening, Program, Request
from mpcache.runtime.shares import Awaited, MaskedOperand, Share
from mpcache.session import Session

PROTOCOLS: Mapping[str, type[FastOps] | type[StockOps]] = {
    ops.name: ops for ops in (FastOps, FastBitsOps, StockOps)
}


@dataclass(slots=True)
class Tally:
    """What a step, a layer or a phase takes.

    rounds: in each, both wait for a message.
    server_sent, client_sent: online bytes to the other computing party.
    critical: online bytes of the busier direction, summed over rounds (what a duplex link waits for).
    server_offline, client_offline: bytes that the dealer sends there.
    comparisons: of two secrets, or a secret with a public number.  multiplications: of two secrets.
    lookups: secret places in public tables or series.
    multiply_adds: 64-bit ones of products, tables and series, at the server (the busier party).
    key_blocks: AES blocks of evaluating key trees, at each party.
    random_bytes: expanded from key streams or received from the dealer, at the server.
    working: most bytes that one operation draws and opens, a lower bound of its memory.
    """

    rounds: int = 0
    server_sent: int = 0
    client_sent: int = 0
    critical: int = 0
    server_offline: int = 0
    client_offline: int = 0
    comparisons: int = 0
    multiplications: int = 0
    lookups: int = 0
    multiply_adds: int = 0
    key_blocks: int = 0
    random_bytes: int = 0
    working: int = 0

    def __iadd__(self, other: Tally) -> Tally:
        working = max(self.working, other.working)
        for name in _AMOUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.working = working
        return self

    @property
    def online(self) -> int | float:
        """Bytes that one computing party sends, the mean of both."""
        total = self.server_sent + self.client_sent
        return total / 2 if total % 2 else total // 2

    @property
    def offline(self) -> int:
        """Bytes that the dealer sends."""
        return self.server_offline + self.client_offline


_AMOUNTS = tuple(f.name for f in fields(Tally))
Steps = dict[str, Tally]  # by step name within a phase: `layer3/select/coarse`


@dataclass(frozen=True)
class Cost:
    """The cost of one policy for one model shape, context and protocol.

    question: tokens.  steps: decode steps that were read, as they follow the question.
    phases: `setup`, `context`, `question`, `decode1`, ..., as a ledger has them, with their steps.
    held: bytes that a computing party keeps from step to step: operands, cache and their masks.
    """

    shape: ModelShape
    policy: BoundPolicy
    protocol: str
    question: int
    steps: int
    phases: Mapping[str, Steps]
    held: int

    def total(self, phase: str) -> Tally:
        """A phase; `decode` stands for all decode steps together."""
        return total(self._steps(phase))

    def by_layer(self, phase: str) -> dict[int | None, Tally]:
        """Per layer, and None for what stands outside of them."""
        parts: dict[int | None, Tally] = {i: Tally() for i in range(self.shape.layers)}
        for step, tally in self._steps(phase):
            number, _ = split(step)
            parts.setdefault(number, Tally())
            parts[number] += tally
        return parts

    def by_op(self, phase: str) -> Steps:
        """Per operation, summed over layers, in program order."""
        parts: Steps = {}
        for step, tally in self._steps(phase):
            _, name = split(step)
            parts.setdefault(name, Tally())
            parts[name] += tally
        return parts

    def shares_selection(self) -> set[int]:
        """Layers that spread weights by another layer's selection: they select nothing themselves."""
        names = [step for step, _ in self._steps("decode")]
        selects, spreads = (
            {n for name in names if f"/{word}" in name and (n := split(name)[0]) is not None}
            for word in ("select", "scatter")
        )
        return spreads - selects

    @property
    def peak(self) -> int:
        """Estimated peak memory of one computing party, in bytes: what it holds, and the largest step."""
        return self.held + max(self.total(phase).working for phase in self.phases)

    def _steps(self, phase: str) -> Iterator[tuple[str, Tally]]:
        for name, steps in self.phases.items():
            if name == phase or (phase == "decode" and name.startswith("decode")):
                yield from steps.items()


def total(steps: Iterable[tuple[str, Tally]]) -> Tally:
    sum_of = Tally()
    for _, tally in steps:
        sum_of += tally
    return sum_of


def split(step: str) -> tuple[int | None, str]:
    """`layer3/mlp/gate` -> (3, `mlp/gate`); `lm_head` -> (None, `lm_head`)."""
    match = re.fullmatch(r"layer(\d+)/?(.*)", step)
    return (int(match[1]), match[2] or "together") if match else (None, step or "together")


def cost(
    shape: ModelShape,
    policy: str | BoundPolicy,
    context: int = 0,
    question: int = 16,
    protocol: str = "fast",
    new_tokens: int = 2,
    bits: int = 16,
    reveal: str = "logits",
) -> Cost:
    """Read a session by shapes: set-up, context, question, and the decode steps of an answer.

    context, question: tokens. An answer of `new_tokens` tokens has one decode step less: the question
    itself gives the first. A policy that is bound already brings its own context. Raises PolicyError.
    """
    if isinstance(policy, str):
        policy = parse(policy).bind(context, shape)
    policy.priced()
    setup, operands = _setup(shape, protocol, bits)
    party = CostParty()
    session = Session(_remembered(protocol, bits), party, shape, policy, reveal)
    session.operands = operands
    session.context(None, None)
    session.chunk(None, question)
    for _ in range(1, new_tokens):
        session.chunk(None, 1)
    held = _bytes_held(operands) + _bytes_held(session.cache)
    read = {"setup": setup} | party.by_phase()
    return Cost(shape, policy, protocol, question, new_tokens - 1, read, held)


@cache
def _setup(shape: ModelShape, protocol: str, bits: int) -> tuple[Steps, Operands]:
    """Set-up, which no policy changes."""
    party = CostParty()
    session = Session(_remembered(protocol, bits), party, shape, cast(BoundPolicy, None))
    session.setup(None)
    return party.by_phase()["setup"], session.operands


@cache
def _remembered(protocol: str, bits: int) -> Ops:
    ops = PROTOCOLS[protocol](Rank.SERVER, bits, device="meta")
    return cast(Ops, MemoizedOps(ops))


def _bytes_held(thing: Any) -> int:
    """Bytes of all shares (8 per element) and resident operands (a mask and the opened values)."""
    if isinstance(thing, Share):
        return 8 * math.prod(thing.shape)
    if isinstance(thing, MaskedOperand):
        return 16 * math.prod(thing.shape)
    if isinstance(thing, list | tuple):
        return sum(map(_bytes_held, thing))
    if hasattr(thing, "__dataclass_fields__"):
        return sum(_bytes_held(getattr(thing, f.name)) for f in fields(thing))
    return 0


# ------------------------------------------------------------------------------------ the reader


@dataclass(frozen=True)
class RecordedCall:
    """A blocking call that was read already, or counts that no ask tells: what it took, and its result."""

    tally: Tally
    result: Any = None

    def __call__(self, party: Any, step: str) -> Any:
        raise RuntimeError("only the cost reading answers this")


class CostParty(ShapeParty):
    """Answers by shapes, and tallies both directions of every step. `steps`: by full step name."""

    def __init__(self) -> None:
        super().__init__(Rank.SERVER)
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
        size = sum(part.nbytes for part in request.parts)
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
        """The steps of each phase under their names in it."""
        phases: dict[str, Steps] = defaultdict(dict)
        for step, tally in self.steps.items():
            phase, _, name = step.partition("/")
            phases[phase][name] = tally
        return dict(phases)


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
    """

    def __init__(self, ops: Any) -> None:
        self._ops = ops
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
                    ask = _note(ask)
            except StopIteration as stop:
                result = self._selections(key, stop.value)
                break
            match ask:
                case Open(items):
                    working += sum(8 * math.prod(item.share.shape) for item in items)
                case Draw(request):
                    working += sum(part.nbytes for part in request.parts)
            asks.append(ask)
            reply = yield ask
        last = Call(RecordedCall(Tally(working=working)))
        asks.append(last)
        yield last
        self._programs[key] = _shortened(asks), result
        return result

    def _selections(self, key: Hashable, result: Any) -> Any:
        """Selections are asked for programs, too."""
        if isinstance(result, tuple):
            return tuple(self._selections((key, i), part) for i, part in enumerate(result))
        return _MemoizedSelection(result, key) if isinstance(result, SelectionOf) else result


class _MemoizedSelection(MemoizedOps):
    """A selection among remembered ops; `key`: what it was made from."""

    def __init__(self, selection: Selection, key: Hashable) -> None:
        super().__init__(selection)
        self.key = key


def _note(ask: Call) -> Call:
    """Read CrypTen code by itself: all that it takes is booked under one step."""
    alone = CostParty()
    result = alone.call(ask.run, "")
    tally = alone.steps[""]
    # CrypTen frees what it has used: its largest correlation, and as much that is masked and opened.
    tally.working = 2 * alone.largest
    return Call(RecordedCall(tally, result), ask.step)


def _fresh(result: Any) -> Any:
    """An object of its own each time: programs may ask whether two values are one and the same."""
    if isinstance(result, list | tuple):
        return type(result)(map(_fresh, result))
    if isinstance(result, Share | MaskedOperand | _MemoizedSelection):
        twin = object.__new__(type(result))
        twin.__dict__.update(result.__dict__)
        return twin
    return result


@dataclass(frozen=True)
class _Bytes:
    """Stands for shares of which only the size is asked."""

    shape: tuple[int]


def _shortened(asks: Sequence[Ask]) -> list[Ask]:
    """The same rounds and amounts in fewer asks: openings by direction, and what lies between summed."""
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
                    Opening(cast(torch.Tensor, _Bytes((n,))), "counted", to, sender, width=1, step=name)
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
    """What an operation's cost depends on: shapes and public numbers, never a tensor's values."""
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
