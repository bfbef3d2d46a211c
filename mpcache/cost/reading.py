"""In which chunks the client's document is read: as many tokens at once as memory and time allow.

A chunk takes the rounds of one token, whatever its size: the fewer chunks, the fewer rounds. But all of a
chunk's queries are scored against all of its keys, half of which they may not see, and what one operation
draws and opens has to be held at once. The choice follows from public sizes alone: all parties make the same.
It is made by what `full` takes in one layer, which stands for all: that is read in no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mpcache.config import PublicConfig
from mpcache.cost.pricing import blank_session
from mpcache.cost.rates import phase_ms
from mpcache.cost.tally import Tally, sum_tallies
from mpcache.model.shape import ModelShape
from mpcache.policy import NO_DOCUMENT, ReadingPlan, parse_policy
from mpcache.transport.network import NO_NETWORK, Profile, parse_network

SIZES = (16, 32, 64, 128)  # tokens that may be read at once
WORKING_BYTES = 1 << 30  # that one operation may draw and open, where a smaller chunk is not larger


@dataclass(frozen=True)
class ChunkPrice:
    """What a document takes when it is read by so many tokens at once.

    ms: of all of it in one layer, modelled.  working: bytes that its largest operation draws and opens.
    """

    size: int
    ms: float
    working: int


def chunks_of(tokens: int, size: int) -> list[int]:
    """Split so many tokens into chunks of `size`, and what is left."""
    return [min(size, tokens - begin) for begin in range(0, tokens, size or 1)]


def reading_plan(
    shape: ModelShape, public: PublicConfig, context: int, tokens: int, protocol: str
) -> ReadingPlan:
    """Plan how so many tokens of the client's are read, after a context of so many. Raises PolicyError."""
    if not tokens:
        return NO_DOCUMENT
    network = parse_network(public.network)
    size = (
        public.document_chunk
        or best_chunk(shape, context, tokens, protocol, network, public.fraction_bits).size
    )
    eviction = parse_policy(public.private_policy).on_shares(tokens, shape)
    return ReadingPlan(tuple(chunks_of(tokens, size)), eviction)


@lru_cache(maxsize=64)
def best_chunk(
    shape: ModelShape, context: int, tokens: int, protocol: str, network: Profile | None, bits: int = 16
) -> ChunkPrice:
    """Choose how many tokens of the client's document are read at once, after a context of so many."""
    prices = chunk_prices(shape, context, tokens, protocol, network or NO_NETWORK, bits)
    fitting = [one for one in prices if one.working <= WORKING_BYTES] or prices[:1]
    return min(fitting, key=lambda one: one.ms)


def reading_ms(
    shape: ModelShape, context: int, tokens: int, protocol: str, network: Profile | None, bits: int = 16
) -> float:
    """Return how long the reading of so many tokens takes, modelled, in the best chunks."""
    return shape.layers * best_chunk(shape, context, tokens, protocol, network, bits).ms if tokens else 0.0


def chunk_prices(
    shape: ModelShape, context: int, tokens: int, protocol: str, network: Profile, bits: int = 16
) -> Sequence[ChunkPrice]:
    """Price each size: by its first and its last chunk, between which the cost grows evenly."""
    sizes = [size for size in SIZES if size < tokens] or [SIZES[0]]
    if tokens <= SIZES[-1]:
        sizes.append(tokens)
    found = []
    for size in dict.fromkeys(sizes):
        size = min(size, tokens)
        ends = [_read(shape, context + before, size, protocol, bits) for before in {0, tokens - size}]
        ms = tokens / size * sum(phase_ms(tally, network) for tally in ends) / len(ends)
        found.append(ChunkPrice(size, ms, max(tally.working for tally in ends)))
    return found


def _read(shape: ModelShape, before: int, size: int, protocol: str, bits: int) -> Tally:
    """Count what a chunk takes in one layer, after `before` tokens."""
    shape = replace(shape, layers=2)  # the last layer of a model is read in part
    policy = parse_policy("full").bind(before, shape)
    session, party = blank_session(shape, policy, protocol, bits)
    for _ in session.read_document(ReadingPlan((size,)), None):
        pass
    return sum_tallies(step for step in party.steps.items() if "/layer0/" in step[0])
