"""What is public of a policy's plan, and every opening of a decode step, with its formula.

All of it comes from the decode program: it is read at the sizes that are asked for, and again at a few
others, and the formulas are those that give the sizes of all readings (`mpcache.audit.formula`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from mpcache.audit.formula import Names, total
from mpcache.cost.reader import CostParty
from mpcache.cost.tally import split_step
from mpcache.engines.registry import engine
from mpcache.errors import MpcacheError, PolicyError
from mpcache.model import ModelShape
from mpcache.policy import BoundPolicy, parse_policy
from mpcache.policy.clusters import Choice, ClusterPlan
from mpcache.policy.evicting import LivingPlan
from mpcache.policy.plan import SplitPlan
from mpcache.rank import Rank
from mpcache.runtime.party import COMPUTING
from mpcache.runtime.program import Opening, Request, RequestKind
from mpcache.session import Session

READINGS = 7  # of which formulas are made: more than they have unknowns


@dataclass(frozen=True)
class TensorTrace:
    """A tensor that is opened or dealt.

    size: its dimensions and its bytes per element; what the dealer sends to both counts twice.
    """

    why: str
    to: str
    size: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.size)


@dataclass
class StepTrace:
    """What one step of one layer opens and draws. keys: bytes of one key, for each kind of tree in it."""

    opened: list[TensorTrace] = field(default_factory=list)
    dealt: list[TensorTrace] = field(default_factory=list)
    kinds: list[RequestKind] = field(default_factory=list)
    rounds: int = 0
    keys: list[int] = field(default_factory=list)

    @property
    def symbols(self) -> dict[str, int]:
        """key1, key2, ...: how large a key is depends on its depth, which may depend on other sizes."""
        return {f"key{i}": size for i, size in enumerate(self.keys, 1)}

    @property
    def form(self) -> tuple[Any, ...]:
        """What readings of one program at different sizes have in common."""
        seen = ((one.why, one.to, len(one.size)) for one in (*self.opened, *self.dealt))
        return self.rounds, tuple(self.kinds), len(self.keys), tuple(seen)


class TraceParty(CostParty):
    """Reads every step of the decode program in full, and writes down what is opened to whom."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, StepTrace] = defaultdict(StepTrace)

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        self.said[step].rounds += 1
        for item in items:
            to = "both" if item.to is None else item.to.label
            who = "" if item.sender is None else f", from the {item.sender.label}"
            said = self.said[item.step or step]
            said.opened.append(TensorTrace(item.why, to + who, (*item.share.shape, item.width)))
        return super().open(items, step)

    def draw(self, request: Request, step: str) -> list[Any]:
        said = self.said[step]
        if request.kind not in said.kinds:
            said.kinds.append(request.kind)
        tree = [part for part in request.derived if part.public]  # of shapes (keys, ...), sent to both
        if tree:
            said.keys.append(sum(part.nbytes for part in tree) // max(1, tree[0].shape[0]))
            said.dealt.append(
                TensorTrace(request.kind, "", (tree[0].shape[0], said.keys[-1], len(COMPUTING)))
            )
        for part in request.derived:
            if not part.public:
                said.dealt.append(TensorTrace(request.kind, "", (*part.shape, part.width)))
        return super().draw(request, step)


@dataclass(frozen=True)
class Line:
    """What a step opens for one reason.

    times: tensors of this size.  formula: bytes in the symbols of `Explained`, None where none was found.
    size: as in `TensorTrace`, at the sizes that were asked for.
    """

    why: str
    to: str
    times: int
    formula: str | None
    size: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.size)

    @property
    def told(self) -> str:
        """The formula, or the dimensions and the bytes of an element."""
        if self.formula is None:
            *shape, width = self.size
            return f"({' x '.join(map(str, shape))}) of {width} B"
        return "" if self.formula.isdigit() else self.formula


@dataclass(frozen=True)
class Step:
    """One step of one layer: its protocols, rounds, openings, and the dealer's bytes.

    keys: bytes of a key of each of its trees, symbols of the formulas where they depend on the sizes.
    """

    name: str
    kinds: tuple[RequestKind, ...]
    rounds: int
    keys: tuple[int, ...]
    opened: tuple[Line, ...]
    offline: str | None
    offline_bytes: int


@dataclass(frozen=True)
class StepReading:
    """One decode step, read at one size. symbols: of each layer (None: outside of the layers)."""

    bound: BoundPolicy
    symbols: Mapping[int | None, Mapping[str, int]]
    steps: Mapping[tuple[int | None, str], StepTrace]

    @property
    def form(self) -> dict[tuple[int | None, str], tuple[Any, ...]]:
        return {name: said.form for name, said in self.steps.items()}


def read_step(shape: ModelShape, spec: str, context: int, question: int, protocol: str) -> StepReading:
    """Read the first decode step after the question, at one size. Raises PolicyError."""
    bound = parse_policy(spec).bind(context, shape).priced(shape)
    if any(isinstance(plan, SplitPlan) for plan in bound.plan.layers):
        raise PolicyError(f"policy {spec}: a step is explained for heads that keep the same number of tokens")
    session = Session(engine(protocol, Rank.SERVER, device="meta"), TraceParty(), shape, bound)
    session.setup(None)
    session.context(None, None)
    session.chunk(None, question)
    session.party = witness = TraceParty()
    session.chunk(None, 1)
    steps = {split_step(name.partition("/")[2]): said for name, said in witness.said.items()}
    model = {
        "D": shape.width, "H": shape.heads, "KV": shape.kv_heads, "g": shape.group, "d": shape.head_dim,
        "F": shape.ffn, "V": shape.vocab,
    }  # fmt: skip
    symbols: dict[int | None, dict[str, int]] = {None: model}
    for i, plan in enumerate(bound.plan.layers):
        leader = getattr(plan, "leader", i)
        n = session.cache.whole(i).k.shape[1]
        found = {**model, "n": n, **_numbers(session.cache.whole(leader).memory), **_numbers(plan)}
        if isinstance(plan, ClusterPlan) and plan.sizes:  # what lies in no cluster is always attended to
            found["rest"] = n - found["clusters"] * plan.sizes[0]
        if isinstance(plan, LivingPlan):  # what may be dropped
            found["old"] = n - plan.recent
        if isinstance(choice := getattr(session.cache.whole(leader).memory, "choice", None), Choice):
            found["items"] = choice.items
        symbols[i] = found
    return StepReading(bound, symbols, steps)


def _numbers(thing: Any) -> dict[str, int]:
    """Collect the integers of a dataclass, those of a tuple numbered from 1."""
    if not is_dataclass(thing):
        return {}
    found: dict[str, int] = {}
    for name in (f.name for f in fields(thing) if f.name not in ("leader", "age")):
        match value := getattr(thing, name):
            case bool():
                pass
            case int():
                found[name] = value
            case tuple() if value and all(isinstance(v, int) for v in value):
                found |= {f"{name}{i}": v for i, v in enumerate(value, 1)}
    return found


@dataclass(frozen=True)
class Explained:
    """symbols: their values in each layer.  steps: by layer, in program order; None: outside.

    any_heads: whether formulas hold for other numbers of heads, too.
    """

    bound: BoundPolicy
    symbols: Mapping[int | None, Mapping[str, int]]
    steps: Mapping[tuple[int | None, str], Step]
    any_heads: bool = True


def explained(shape: ModelShape, spec: str, context: int, question: int, protocol: str) -> Explained:
    """Read a decode step and find its formulas, which readings at other sizes give. Raises PolicyError."""
    first = read_step(shape, spec, context, question, protocol)
    readings = [first]
    if protocol == "fast":
        for other in _others(shape, context, question):
            if len(readings) == READINGS:
                break
            with suppress(MpcacheError, ValueError):  # a fixed budget may not fit there
                reading = read_step(other[0], spec, *other[1:], protocol)
                if reading.form == first.form:
                    readings.append(reading)
    steps = {}
    known: dict[tuple[tuple[int, ...], ...], Names] = {}
    for key, said in first.steps.items():
        every = [reading.steps[key] for reading in readings]
        # H is written where KV and g come together.
        mine = {s: tuple(r.symbols[key[0]][s] for r in readings) for s in first.symbols[key[0]] if s != "H"}
        mine |= {s: tuple(one.symbols[s] for one in every) for s in said.symbols}
        of = known.setdefault(tuple(mine.values()), Names(mine if len(readings) == READINGS else {}))
        counted: dict[tuple[str, str, str | None, tuple[int, ...]], int] = defaultdict(int)
        for i, seen in enumerate(said.opened):
            formula = formula_of(of, [[one.opened[i].size for one in every]])
            # Of one formula, one size: in which order its factors come does not matter.
            size = seen.size if formula is None else (seen.bytes,)
            counted[seen.why, seen.to, formula, size] += 1
        lines = tuple(
            Line(why, to, times, formula, size) for (why, to, formula, size), times in counted.items()
        )
        dealt = [[one.dealt[i].size for one in every] for i in range(len(said.dealt))]
        steps[key] = Step(
            key[1], tuple(said.kinds), said.rounds, tuple(said.keys), lines,
            formula_of(of, dealt), sum(seen.bytes for seen in said.dealt),
        )  # fmt: skip
    heads = {reading.symbols[None]["KV"] for reading in readings}
    return Explained(first.bound, first.symbols, steps, len(readings) < READINGS or len(heads) > 1)


def formula_of(names: Names, tensors: Sequence[Sequence[tuple[int, ...]]]) -> str | None:
    """Write bytes of some tensors as a formula; None where none was found.

    tensors: each with its size at every reading.
    """
    if not names.symbols:
        return None
    products = []
    for sizes in tensors:
        factors = [names.of(tuple(dimension)) for dimension in zip(*sizes, strict=True)]
        if any(factor is None for factor in factors):
            return None
        products.append([factor for factor in factors if factor is not None])
    return total(products)


def _others(shape: ModelShape, context: int, question: int) -> Iterator[tuple[ModelShape, int, int]]:
    """Yield other sizes of the same kind.

    The width stays a power of two, or stays none; the context stays on its side of 1024, where policies
    change their defaults.
    """
    widths = (
        (shape.width // 2, shape.width // 4) if shape.width > 1024 else (2 * shape.width, 4 * shape.width)
    )
    heads = ((3, 5), (5, 3), (7, 2), (2, 7), (5, 4), (3, 7), (11, 2), (4, 3), (2, 5), (5, 2))
    # Far ones first, which tell most; near ones where the program takes another path far away; then others by
    # turns, with more of a question or with this model's heads, on which the path depends, too.
    far = (1.13, 1.94, 0.83, 1.41, 0.61, 1.67, 1.24, 0.72, 1.05, 0.91)
    near = (0.99, 1.02, 0.96, 1.03, 0.94, 1.04, 0.97, 1.06, 0.93, 0.98)
    factors = (*far, *near)
    for j, factor in enumerate((*factors, *(one for one in factors for _ in range(2)))):
        i, (kv, group) = j % len(heads), heads[j % len(heads)]
        if j >= len(factors) and j % 2:
            kv, group = shape.kv_heads, shape.group
        other = round(context * factor) if context < 1024 else round(context * (1 + abs(factor - 1)))
        changed = replace(
            shape,
            width=widths[i % 2],
            heads=kv * group,
            kv_heads=kv,
            head_dim=2 * (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)[i],
            ffn=(34, 58, 86, 94, 122, 142, 146, 158, 166, 178)[i],
            vocab=(101, 211, 307, 401, 503, 601, 701, 809, 907, 1009)[i],
            max_positions=2 * shape.max_positions + 1000,
        )
        if context >= 1024 or other < 1024:
            yield changed, other, question + (1, 3, 4, 6, 9, 2, 5, 7, 8, 10)[i] + j // len(factors)
