"""Each dealt random part hides one opening: a session is rerun on the same tapes with one part replaced.

What it masks moves by a third of its ring. Everything else stays, up to the rounding of values, which is
random and follows from masks: a few units. So a mask that hides two values is seen, and one that hides none.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from mpcache.engines import threads
from mpcache.policy import parse_policy
from mpcache.protocols import compare
from mpcache.rank import Rank
from mpcache.runtime import party as parties
from mpcache.runtime.program import Opening, Part, Request
from mpcache.runtime.rng import KeyStream, derive_key
from mpcache.runtime.shares import centred
from mpcache.session import Session
from tests.support import tiny_policies as tiny
from tests.support.play import play
from tests.support.policy_specs import PRIVATE, marked

CONTEXT = 24
THIRD = 0x5555555555555555  # of a ring of any size: bits 0, 2, 4, ...
SAMPLE = 6  # parts of each policy, where not all are tried
GUARD = "checks of the client's, masked"  # a digest of shares: it moves with all of them
ONE_WAY = "share of an activation, masked"  # what the client sends is its own share, less the mask
# Their values follow from other masks, however they are masked themselves: a comparison of the scores' masks
# with what they open to, the buckets that these round to, and a digest of shares.
RANDOM_VALUES = {
    "digits, compared and masked", "groups of digits, masked", "windows, compared and masked",
    "buckets, summed and masked", "buckets' digits, masked", GUARD,
}  # fmt: skip
FOLLOW = (RANDOM_VALUES, {GUARD}, set[str]())
BY_DIGITS = ("mpcache", "full")
IN_TWO_LEVELS = "fast-bits, in two levels"
CASES = [
    *(pytest.param(spec, "fast", id=name, marks=marked(name)) for name, spec in PRIVATE.items()),
    *(pytest.param(PRIVATE[name], "fast-bits", id=f"{name}, fast-bits") for name in BY_DIGITS),
    pytest.param(PRIVATE["mpcache"], IN_TWO_LEVELS, id=f"mpcache, {IN_TWO_LEVELS}"),
]


@dataclass(eq=False, repr=False)
class Rerun:
    """A session on fixed tapes. replaced: which random part, counted from 0, moves by a third of its ring.

    reused: a planted bug, a pair of parts (i, j) of one shape: j is i again.
    opened: what the client learns, with the openings.  parts: all that were drawn.
    """

    replaced: int | None = None
    reused: tuple[int, int] | None = None
    opened: list[tuple[Opening, torch.Tensor]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    _count: Counter[tuple[int, Rank]] = field(default_factory=Counter)
    _first: dict[tuple[int, Rank], torch.Tensor] = field(default_factory=dict)

    def expand(self, value: torch.Tensor, part: Part, rank: Rank) -> torch.Tensor:
        """Stand in for the value of a part: the same at the party and at the dealer (a thread is a party)."""
        me = threading.get_ident(), rank
        i = self._count[me]
        self._count[me] += 1
        if threading.current_thread().name == rank.label == "server":
            self.parts.append(part)
        if self.reused is not None and i == self.reused[1]:
            value = self._first[me].reshape(value.shape)
        if i == self.replaced and rank is (Rank.CLIENT if part.owner is None else part.owner):
            third = torch.tensor(THIRD).to(value.dtype)
            value = value ^ third if part.xor else value + third
        if self.reused is not None and i == self.reused[0]:
            self._first[me] = value.clone()
        return value

    def moved(self, other: Rerun) -> set[int]:
        """Return which openings, counted from 0, differ in most of their elements by more than rounding."""
        assert [(i.why, i.step, i.ring) for i, _ in self.opened] == [
            (i.why, i.step, i.ring) for i, _ in other.opened
        ]
        found = set()
        for n, ((item, one), (_, two)) in enumerate(zip(self.opened, other.opened, strict=True)):
            apart = (one ^ two) & ((1 << item.ring) - 1) if item.xor else centred(one - two, item.ring).abs()
            if (
                item.why == ONE_WAY
            ):  # a share, which follows from much; its own mask moves it by a third exactly
                shifts = ((centred(one - two + sign * THIRD, item.ring)).abs() < 1 << 8 for sign in (1, -1))
                if one.numel() and torch.stack(list(shifts)).any(0).double().mean() > 0.5:
                    found.add(n)
                continue
            far = apart >= (1 if item.xor else max(1, 1 << max(0, item.ring - 3)))
            if one.numel() and far.double().mean() > 0.5:
                found.add(n)
        return found


def rerun(spec: str, protocol: str, **how: Any) -> Rerun:
    """Three steps of a session of one layer, or of the two that share."""
    seen, shape = Rerun(**how), tiny.shape(layers=2 if "share=0-1" in spec else 1)
    context, policy = tiny.tokens(CONTEXT), parse_policy(spec)
    numbers, expand = itertools.count(), parties._expand

    def expanding(
        tape: KeyStream, request: Request, rank: Rank, row: torch.Tensor | None = None
    ) -> tuple[list[Any], Iterator[torch.Tensor]]:
        values, shares = expand(tape, request, rank, row)
        random = zip(values, request.random, strict=True)
        return [seen.expand(value, part, rank) for value, part in random], shares

    def program(ops: Any, party: Any, rank: Rank) -> None:
        threading.current_thread().name = "dealer" if ops.side.device == "meta" else rank.label
        if rank is Rank.CLIENT:
            opening = party.open

            def open_(items: Sequence[Opening], step: str) -> list[Any]:
                values: list[Any] = opening(items, step)
                seen.opened += [(i, v) for i, v in zip(items, values, strict=True) if v is not None]
                return values

            party.open = open_
        mine = rank is Rank.SERVER
        session = Session(ops, party, shape, policy.bind(CONTEXT, shape))
        session.setup(tiny.model(shape).weights if mine else None)
        prefill = tiny.prefilled(policy, shape, context) if mine else None
        session.context(prefill, tiny.KERNELS if mine else None)
        for chunk in ([1, 2], [3]):
            session.chunk(chunk if rank is Rank.CLIENT else None, len(chunk))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parties, "_expand", expanding)
        patch.setattr(threads, "fresh_seed", lambda: derive_key(bytes(32), f"tape {next(numbers)}"))
        patch.setattr("secrets.token_hex", lambda n: "00" * n)  # the session's name
        if protocol == IN_TWO_LEVELS:
            patch.setattr(compare, "MANY", 1)
        play(program, protocol.split(",")[0])
    return seen


@cache
def first_run(spec: str, protocol: str) -> Rerun:
    return rerun(spec, protocol)


def check(spec: str, protocol: str, chosen: Sequence[int]) -> dict[int, list[int]]:
    """Rerun with each of these parts replaced; return which part moved which opening, in all."""
    base = first_run(spec, protocol)
    by_opening: dict[int, list[int]] = {}
    for i in chosen:
        part = base.parts[i]
        moved = base.moved(rerun(spec, protocol, replaced=i))
        reasons = [base.opened[n][0].why for n in sorted(moved)]
        small = part.dtype is torch.int16 and not part.xor  # the blur
        if part.own or small:  # roots of key trees, the guard's factor
            assert RANDOM_VALUES.issuperset(reasons), (i, part, reasons)
            continue
        why = {n: base.opened[n][0].why for n in sorted(moved)}
        # What moves because it follows from shares counts where nothing else does.
        found = ([n for n, reason in why.items() if reason not in never] for never in FOLLOW)
        own = next((some for some in found if some), [])
        assert len(own) == 1, (i, part, reasons)
        by_opening.setdefault(own[0], []).append(i)
    return by_opening


def test_reruns_are_the_same() -> None:
    """Without a replaced part nothing at all differs."""
    one, two = first_run(PRIVATE["full"], "fast"), rerun(PRIVATE["full"], "fast")
    assert len(one.opened) > 30 and len(one.parts) > 30
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.opened, two.opened, strict=True))


@pytest.mark.parametrize(("spec", "protocol"), CASES)
def test_a_part_moves_its_own_opening(spec: str, protocol: str) -> None:
    """Some parts of each policy, chosen by a fixed seed."""
    parts = range(len(first_run(spec, protocol).parts))
    check(spec, protocol, random.Random(0).sample(parts, SAMPLE))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("spec", "protocol"), CASES)
def test_every_part_moves_its_own_opening(spec: str, protocol: str) -> None:
    """All parts, and each opening but the logits is hidden by one part alone, or by one of each party."""
    base = first_run(spec, protocol)
    by_opening = check(spec, protocol, range(len(base.parts)))
    for parts in by_opening.values():
        owners = {base.parts[i].owner for i in parts}
        assert len(parts) == 1 or (len(parts) == 2 and owners == {Rank.SERVER, Rank.CLIENT}), by_opening
    bare = {item.why for n, (item, _) in enumerate(base.opened) if n not in by_opening}
    assert bare == {"logits for the client", "whether all was in range"}


def test_a_mask_that_hides_two_values_is_seen() -> None:
    """A planted bug: of two openings of one shape the second has the first one's mask."""
    base = first_run("full", "fast")
    shapes = [(p.shape, p.dtype) if p.owner is None and not p.own else i for i, p in enumerate(base.parts)]
    pair = next((i, j) for j, s in enumerate(shapes) for i in range(j) if shapes[i] == s and len(s) > 1)  # type: ignore[arg-type]
    bug = rerun("full", "fast", reused=pair)
    moved = bug.moved(rerun("full", "fast", reused=pair, replaced=pair[0]))
    assert len([n for n in moved if base.opened[n][0].why not in RANDOM_VALUES]) == 2
