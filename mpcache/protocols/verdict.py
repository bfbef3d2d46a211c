"""Whether all values of a step were in range, for one party alone (docs/protocols.md, section 10.3).

Both parties hold a digest of what they noted (`mpcache.runtime.guard`): a and b, equal if all is well. The
client learns z = alpha (a xor b) in GF(2^64), with a fresh alpha of the server's: zero if they are equal, and
else a uniform number that says nothing but that. The dealer shares alpha rho for a rho of the client's:

1. The client sends e = b xor rho; the server computes alpha (a xor e), which is z xor alpha rho.
2. That is opened to the client, with the shares of alpha rho.

Neither takes a round of its own: the first goes beside the last round of what is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpcache.rank import Rank
from mpcache.runtime.program import (
    NO_WORK,
    Opening,
    Part,
    Program,
    Request,
    RequestKind,
    draw,
    open_masked,
    open_secret,
    rounds_later,
)
from mpcache.runtime.side import Side

_LOW = 0x1B  # x^64 = x^4 + x^3 + x + 1
_WORD = (1 << 64) - 1


def field_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply in GF(2^64): (1,) int64 each."""
    a, b, product = int(x) & _WORD, int(y) & _WORD, 0
    while b:
        if b & 1:
            product ^= a
        a = (a << 1) ^ (_LOW if a >> 63 else 0)
        a &= _WORD
        b >>= 1
    return torch.tensor([product - (product >> 63 << 64)])


def start_verdict(side: Side, rounds: int) -> Program[Any]:
    """Close the guard after so many rounds of what runs beside, in the next one. To `finish_verdict`."""

    def derive(alpha: tuple[torch.Tensor, torch.Tensor], rho: torch.Tensor) -> Sequence[torch.Tensor]:
        return (field_product(alpha[0], rho),)

    one = (1,)
    random = (Part(one, own=True), Part(one, xor=True, owner=Rank.CLIENT))
    request = Request(RequestKind.VERDICT, random, (Part(one, xor=True),), derive, NO_WORK)
    alpha, rho, share = yield from draw(request)
    yield from rounds_later(rounds)
    mine: Any = share if side.device == "meta" else side.guard.close()
    (e,) = yield from open_masked(
        Opening(mine ^ rho, "checks of the client's, masked", sender=Rank.CLIENT, xor=True)
    )
    if side.rank is Rank.SERVER and side.device != "meta":
        return share ^ field_product(alpha, mine ^ e)
    return share


def finish_verdict(share: torch.Tensor) -> Program[torch.Tensor | None]:
    """Open it to the client: true if all was in range, None at the server. One round."""
    z = yield from open_secret(Opening(share, "whether all was in range", to=Rank.CLIENT, xor=True))
    return None if z is None or z.is_meta else z == 0
