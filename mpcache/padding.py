"""Hide how long a question, or the client's document, is: only the next multiple of a grid is public.

Padding stands before the own tokens of either, so that the last row is a token in any case, and no later
token follows padding of its own turn. Nothing attends to it: its columns' scores go down by `MASKED_SCORE`,
by marks that the client shares. The tokens after it stand where they would without it: how far back is the
client's secret, so queries and keys are turned by angles that the client shares, as a matrix (d, d) for each
token, which all layers use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpcache.cache import Cache
from mpcache.model import ModelShape
from mpcache.model.rope import rope_tables, rotate
from mpcache.ops import AnyEngine, Value
from mpcache.rank import Rank


@dataclass(frozen=True)
class PaddedChunk:
    """A chunk of m rows, some of them padding.

    one_hots: (m, vocab).  seen: marks (m,), 0 for padding.  turns: (m, d, d), queries and keys times this.
    """

    one_hots: Value
    seen: Value
    turns: Value


def padded_length(tokens: int, grid: int) -> int:
    """Return how long a question, or a document, of so many tokens is made."""
    return -(-tokens // grid) * grid


def pad_chunk(
    ops: AnyEngine, shape: ModelShape, cache: Cache, tokens: Sequence[int] | None, m: int, like: int = 0
) -> PaddedChunk:
    """Share a chunk of m rows with padding before its tokens; tokens: at the client, who knows how many.

    like: the token that padding repeats where the chunk is nothing else.
    """
    hot = seen = turns = None
    d = shape.head_dim
    if tokens is not None:
        missing = m - len(tokens)
        # Padding repeats the first token: what any row computes stays in the ranges of ordinary tokens.
        padding = [tokens[0] if tokens else like] * missing
        hot = torch.nn.functional.one_hot(torch.tensor(padding + list(tokens)), shape.vocab)
        seen = (torch.arange(m) >= missing).long()
        first = cache.context + cache.length - cache.padding - missing
        places = (first + torch.arange(m)).clamp(min=0)
        turns = rotate(torch.eye(d, dtype=torch.float64).expand(m, d, d), *rope_tables(shape, places))
        cache.padding += missing
    return PaddedChunk(
        ops.secret(hot, (m, shape.vocab), Rank.CLIENT, bits=0),
        ops.secret(seen, (m,), Rank.CLIENT, bits=0),
        ops.secret(turns, (m, d, d), Rank.CLIENT),
    )
