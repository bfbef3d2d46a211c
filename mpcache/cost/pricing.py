"""What a policy costs, exactly, for any model shape, before anyone runs it: the fourth reading.

The decode program itself is read, on shapes alone (meta tensors), and what it asks for is counted:
there is no second description that could drift. Rounds and bytes are those of a real run, to the byte
(tests/mpcache/cost/test_pricing.py compares with the ledgers of three parties). An operation that was met
before with the same shapes is not read again but repeated from memory (`reader.MemoizedOps`), so a model
of many layers costs little more than one layer, whatever a policy does in which of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any, cast

from mpcache.choices import ProtocolName, Reveal
from mpcache.cost.reader import CostParty, MemoizedOps
from mpcache.cost.tally import Cost, Steps
from mpcache.decode import Operands
from mpcache.engines.registry import engine
from mpcache.model.shape import ModelShape
from mpcache.ops import Ops
from mpcache.padding import padded_length
from mpcache.policy import NO_DOCUMENT, BoundPolicy, ReadingPlan, parse_policy
from mpcache.rank import Rank
from mpcache.runtime.shares import KnownOperand, MaskedOperand, Share
from mpcache.session import Session


def price(
    shape: ModelShape,
    policy: str | BoundPolicy,
    context: int = 0,
    question: int = 16,
    protocol: str = ProtocolName.FAST,
    new_tokens: int = 2,
    bits: int = 16,
    reveal: Reveal = Reveal.LOGITS,
    standing: bool = True,
    grid: int = 1,
    later: Sequence[int] = (),
    reading: ReadingPlan = NO_DOCUMENT,
) -> Cost:
    """Price a policy: read a session by shapes, from set-up to the decode steps of an answer.

    Parameters
    ----------
    shape
        The model's; its weights are not needed.
    policy
        As text, or bound already; then it brings its own context.
    context, question
        Lengths in tokens.
    protocol
        A name in `mpcache.engines.registry.PROTOCOLS`.
    new_tokens
        Length of the answer. The question itself gives the first token: there is one decode step less.
    bits
        Fraction bits of the fixed point.
    reveal
        What the client learns of each step.
    standing
        Whether the masks of weights and document outlive sessions, as they do but with prepared tapes or
        a session that is kept. Set-up and context then are what the server uploads to the dealer once:
        nothing where the dealer holds it.
    grid
        Questions are padded to its multiples, as this one is.
    later
        Questions of later turns, in tokens; each has an answer of that length, too.
    reading
        How the client's document is read; without chunks: it has none.

    Raises
    ------
    PolicyError
        The policy is unknown, does not fit, or has no price.

    """
    if isinstance(policy, str):
        policy = parse_policy(policy).bind(context, shape)
    policy = policy.priced(shape)
    setup, operands = _setup(shape, protocol, bits, standing)
    party = CostParty(standing)
    session = Session(_memoized(protocol, bits, standing), party, shape, policy, reveal, grid)
    session.operands = operands
    session.context(None, None)
    list(session.read_document(reading, None))
    question = padded_length(question, grid)
    session.chunk(None, question)
    for _ in range(1, new_tokens):
        session.chunk(None, 1)
    for tokens in later:
        session.next_turn()
        session.chunk(None, tokens)
        for _ in range(1, new_tokens):
            session.chunk(None, 1)
    held = _bytes_held(operands) + _bytes_held(session.cache)
    read = {"setup": setup} | party.by_phase()
    return Cost(shape, policy, protocol, question, new_tokens - 1, read, held)


@cache
def _setup(shape: ModelShape, protocol: str, bits: int, standing: bool) -> tuple[Steps, Operands]:
    """Read set-up, which no policy changes."""
    party = CostParty(standing)
    session = Session(_memoized(protocol, bits, standing), party, shape, cast(BoundPolicy, None))
    session.setup(None)
    return party.by_phase()["setup"], session.operands


@cache
def _memoized(protocol: str, bits: int, standing: bool) -> Ops:
    return cast(Ops, MemoizedOps(engine(protocol, Rank.SERVER, bits, "meta"), standing))


def blank_session(
    shape: ModelShape, policy: BoundPolicy, protocol: str, bits: int
) -> tuple[Session, CostParty]:
    """Open a session of the cost reading that has its context, and the party that counts what comes."""
    _, operands = _setup(shape, protocol, bits, standing=True)
    session = Session(_memoized(protocol, bits, True), CostParty(), shape, policy.priced(shape))
    session.operands = operands
    session.context(None, None)
    session.party = party = CostParty()
    return session, party


def _bytes_held(thing: Any) -> int:
    """Bytes of all shares (8 per element) and masked operands (mask and opened values, or one of them)."""
    if isinstance(thing, Share):
        return 8 * math.prod(thing.shape)
    if isinstance(thing, KnownOperand):
        return (6 if thing.ring <= 48 else 8) * math.prod(thing.shape)
    if isinstance(thing, MaskedOperand):
        return 16 * math.prod(thing.shape)
    if isinstance(thing, list | tuple):
        return sum(map(_bytes_held, thing))
    if hasattr(thing, "__dataclass_fields__"):
        return sum(_bytes_held(getattr(thing, f.name)) for f in fields(thing))
    return 0
