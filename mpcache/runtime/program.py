"""Programs: what a protocol asks of the outside, and how programs are put together.

A protocol is a generator. It yields what it needs - an opening, correlated randomness, a call that
blocks - and goes on with the answer. The four readings (docs/design.md, section 2) differ only in who
answers. `yield from` composes in sequence, `together` in lockstep with merged openings, and `at` names
a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from mpcache.rank import Rank
from mpcache.runtime.ring import pack_difference
from mpcache.runtime.rng import TreeCipher

# Parts and asks are named tuples: thousands are made for each token, and one costs a third of a frozen
# dataclass.
T = TypeVar("T")
Shape = tuple[int, ...]


class RequestKind(StrEnum):
    """What correlated randomness is for. `mpcache.audit.catalog` has each in words, with its source."""

    MASK = "mask"
    MASKED_OPERAND = "masked operand"
    TRUNCATION = "truncation"
    TRUNCATION_PRODUCT = "truncation/product"
    TRUNCATIONS_PRODUCT = "truncations/product"
    LINE = "line"
    VERDICT = "verdict"
    BLUR = "blur"
    COMPARE = "compare"
    TOPK = "topk"
    TOPK_DIGITS = "topk/digits"
    SCATTER = "scatter"
    SHUFFLE = "shuffle"
    ONE_HOT = "one-hot"
    EXP = "exp"
    HIGHEST = "highest bucket"
    EXP_DIGITS = "exp/digits"
    ACTIVATION = "activation"
    NORM = "norm"
    SQUARE = "square"
    TRIPLE_MUL = "triple/mul"
    TRIPLE_MATMUL = "triple/matmul"
    AND = "and"
    BIT = "bit"


@dataclass(frozen=True)
class Work:
    """What a correlation is used for, counted once for its whole shape.

    comparisons: of two secrets, or a secret with a public number.  multiplications: of two secrets.
    lookups: secret places in public tables or series.
    multiply_adds: 64-bit ones of products, tables and series, at the server (the busier party).
    key_blocks: AES blocks of evaluating key trees, at each party.
    """

    comparisons: int = 0
    multiplications: int = 0
    lookups: int = 0
    multiply_adds: int = 0
    key_blocks: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.comparisons + other.comparisons,
            self.multiplications + other.multiplications,
            self.lookups + other.lookups,
            self.multiply_adds + other.multiply_adds,
            self.key_blocks + other.key_blocks,
        )


NO_WORK = Work()  # the opening and a few additions are all there is


def products_of(n: int) -> Work:
    """Count n products of two masked secrets: three products at the server, two at the client."""
    return Work(multiplications=n, multiply_adds=3 * n)


class Part(NamedTuple):
    """One tensor of a correlation.

    dtype: int64 for Z_2^64, or a smaller signed type for a smaller ring.
    ring: bits that count of a derived part of int64; the dealer sends no more bytes than hold them.
    xor: its shares combine by XOR instead of addition.
    owner: known whole to this party, zero at the other (random parts only).
    own: each party has its own, unrelated value (random parts only; seeds).
    public: the same at both parties (derived parts only).
    """

    shape: Shape
    dtype: torch.dtype = torch.int64
    xor: bool = False
    owner: Rank | None = None
    own: bool = False
    public: bool = False
    ring: int = 64

    @property
    def width(self) -> int:
        """Bytes of an element as it travels."""
        return min(self.dtype.itemsize, -(-self.ring // 8))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it travels."""
        return math.prod(self.shape) * self.width

    @property
    def held(self) -> int:
        """Bytes of the tensor in memory, and of the stream that it is read from."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def packed(self) -> bool:
        """Whether it travels in fewer bytes than it is held in."""
        return self.width < self.dtype.itemsize

    @property
    def spec(self) -> tuple[torch.dtype, Shape]:
        """The tensor as a receiver expects it: dtype and shape."""
        return (torch.uint8, (*self.shape, self.width)) if self.packed else (self.dtype, self.shape)

    def sent_to(self, rank: Rank) -> bool:
        """Whether the dealer sends this derived part to one party, which else expands its own share."""
        return self.public or rank is Rank.SERVER

    def combine(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the value behind two shares; both values of an `own` part."""
        if self.own:
            return a, b
        return a ^ b if self.xor else a + b

    def correct(self, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return the share that makes `value` with the other party's share, as it travels (`spec`)."""
        if self.packed:
            return pack_difference(value, other, self.xor, self.width)
        return value ^ other if self.xor else value - other


@dataclass(frozen=True)
class Request:
    """A correlation by public shapes; `derive` maps random values to derived ones at the dealer.

    work: what the parties do with it. A request cannot be made without, so no protocol is free by omission.
    keep: the dealer's program gets the random values too, to derive later correlations from them
    (a masked operand's mask, a selection's rotation).
    matrix: of a product with a `KnownOperand`: the last random part masks its rows, the derived one is that
    times B (`mpcache.runtime.rows_ahead`).
    """

    kind: RequestKind
    random: tuple[Part, ...]
    derived: tuple[Part, ...]
    derive: Callable[..., Sequence[torch.Tensor]]
    work: Work
    keep: bool = False
    matrix: Any = None

    def __post_init__(self) -> None:
        """Raise ValueError on a kind that the catalog cannot know."""
        if not isinstance(self.kind, RequestKind):
            raise ValueError(f"a request of no known kind: {self.kind!r}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, random ones first."""
        return self.random + self.derived

    def sent_to(self, rank: Rank) -> list[Part]:
        """List the derived parts that the dealer sends to one party."""
        return [part for part in self.derived if part.sent_to(rank)]


class Opening(NamedTuple):
    """One tensor to open: each sender's share goes to the recipients, who add them up.

    to: the recipient, or None for both computing parties.  why: the reason, for the audit.
    sender: the only party whose share is not zero, or None.
    xor: the shares are XOR shares.  ring: the value's significant bits; what an element's whole bytes have
    above them is noise of the shares.
    """

    share: torch.Tensor
    why: str
    to: Rank | None = None
    sender: Rank | None = None
    xor: bool = False
    ring: int = 64
    step: str = ""

    @property
    def width(self) -> int:
        """Bytes per element."""
        return -(-self.ring // 8)

    def booked(self, step: str) -> Opening:
        """Return the same, booked under a step: the last field. `_replace` takes several times as long."""
        return Opening(*self[:-1], step)


class Open(NamedTuple):
    """Openings that travel in one message: one round. Answered by a tensor (or None) for each."""

    items: tuple[Opening, ...]
    step: str = ""

    def under(self, name: str) -> Open:
        """Return the same openings, booked under `name`."""
        # What has no step of its own is booked where the round is.
        if any(i.step for i in self.items):
            items = tuple(i.booked(f"{name}/{i.step}") if i.step else i for i in self.items)
        else:
            items = self.items
        return Open(items, _below(name, self.step))


class Draw(NamedTuple):
    """Correlated randomness from the dealer. Answered by this party's parts."""

    request: Request
    step: str = ""

    def under(self, name: str) -> Draw:
        """Return the same draw, booked under `name`."""
        return Draw(self.request, _below(name, self.step))


class Call(NamedTuple):
    """A function of the party and the step: what no opening and no draw says. Answered by its result.

    CrypTen's code communicates by itself and blocks; `tree_cipher` only asks.
    """

    run: Callable[[Any, str], Any]
    step: str = ""

    def under(self, name: str) -> Call:
        """Return the same call, booked under `name`."""
        return Call(self.run, _below(name, self.step))


Ask = Open | Draw | Call
Program = Generator[Ask, Any, T]


class Answers(Protocol):
    """Who a program is read by."""

    def open(self, items: Sequence[Opening], step: str) -> list[Any]: ...
    def draw(self, request: Request, step: str) -> list[Any]: ...
    def call(self, run: Callable[[Any, str], Any], step: str) -> Any: ...


def _below(name: str, step: str) -> str:
    return f"{name}/{step}" if step else name


def open_masked(*openings: Opening) -> Program[list[torch.Tensor]]:
    """Open masked values to both computing parties, in one round: what they see is uniform."""
    answer: list[torch.Tensor] = yield Open(openings)
    return answer


def open_secret(opening: Opening) -> Program[torch.Tensor | None]:
    """Open a secret itself, without a mask, to one recipient: `Ops.reveal` alone may. One round.

    Raises ValueError without a recipient or a reason, or where its bytes would hold more than its ring: no
    mask hides the noise above it, which follows from both parties' shares.
    """
    if opening.to is None or not opening.why:
        raise ValueError("a secret is opened to one recipient, for a reason")
    if opening.ring % 8:
        raise ValueError(
            f"a secret is opened in whole bytes: {opening.why} has a ring of {opening.ring} bits"
        )
    answer: list[torch.Tensor | None] = yield Open((opening,))
    return answer[0]


def draw(request: Request) -> Program[list[Any]]:
    """Draw this party's parts of a correlation (`Party.draw`)."""
    answer: list[Any] = yield Draw(request)
    return answer


def _trees(party: Any, step: str) -> TreeCipher | None:
    return party.trees  # type: ignore[no-any-return]


def tree_cipher() -> Program[TreeCipher | None]:
    """Take what this phase's key trees grow by (`Party.trees`); None where there are only shapes."""
    answer: TreeCipher | None = yield Call(_trees)
    return answer


def at(name: str, program: Program[T]) -> Program[T]:
    """Run `program` with all that it asks booked under `name`."""
    reply: Any = None
    while True:
        try:
            ask = program.send(reply)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        reply = yield ask.under(name)


def together(*programs: Program[Any]) -> Program[list[Any]]:
    """Run independent programs in lockstep; what they open at the same time shares one message."""
    results: list[Any] = [None] * len(programs)
    replies: dict[int, Any] = dict.fromkeys(range(len(programs)))
    while True:
        waiting: dict[int, Open] = {}
        for i, reply in replies.items():
            try:
                ask = programs[i].send(reply)
                while not isinstance(ask, Open):
                    ask = programs[i].send((yield ask))
                waiting[i] = ask
            except StopIteration as stop:
                results[i] = stop.value
        if not waiting:
            return results
        if len(waiting) == 1:
            ((i, ask),) = waiting.items()
            replies = {i: (yield ask)}
            continue
        # The round is booked where the first of them is; the bytes of each stay its own.
        step = next(iter(waiting.values())).step
        items = [
            item if item.step else item.booked(ask.step) for ask in waiting.values() for item in ask.items
        ]
        opened = iter((yield Open(tuple(items), step)))
        replies = {i: list(islice(opened, len(ask.items))) for i, ask in waiting.items()}


def rounds_later(rounds: int) -> Program[None]:
    """Let so many rounds of what runs `together` with this go by; they must be there."""
    for _ in range(rounds):
        yield Open(())


def local(value: T) -> Program[T]:
    """Return a value as a program that asks nothing."""
    return value
    yield  # pragma: no cover - makes this function a generator


def run(program: Program[T], answers: Answers) -> T:
    """Read a program: answer what it asks until it returns."""
    reply: Any = None
    while True:
        try:
            ask = program.send(reply)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        match ask:
            case Open(items, step):
                reply = answers.open(items, step)
            case Draw(request, step):
                reply = answers.draw(request, step)
            case Call(fn, step):
                reply = answers.call(fn, step)
