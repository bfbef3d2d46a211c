"""max(x, 0) in one round: a comparison whose key trees also carry the mask.

x is opened as x + r in the whole ring. [x < 0] = m + u - 2 m u with m public and u shared, as in
`mpcache.protocols.compare`; so max(x, 0) = (x + r - r) (1 - [x < 0]) needs shares of r u beside those
of u. A second tree for the same r, with the payload r (1 - 2 msb(r)), gives them without a message.
Source: Boyle et al., EUROCRYPT 2021, section 4 (ReLU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mpcache.protocols import dcf
from mpcache.protocols.compare import key_parts
from mpcache.protocols.dcf import KeyShape
from mpcache.protocols.fence import Fence
from mpcache.protocols.linear import masked
from mpcache.runtime.program import Part, Program, Request, RequestKind, draw, open_masked, tree_cipher
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side


def relu(side: Side, x: Share, width: int) -> Program[Share]:
    """Compute max(x, 0) for |x_raw| < 2^(width-1), in x's own ring, exactly. One round, two trees each.

    The guard lets values below 2^(width-2) pass, and none from 2^(width-1) on in a ring of width + 4 bits.
    """
    n = math.prod(x.shape)
    keys = KeyShape(2 * n, width - 1)  # first half: [x < 0], second half: r [x < 0]
    seeds, words, bits = key_parts(keys)
    low = (1 << keys.depth) - 1
    cipher = yield from tree_cipher()
    far = min(x.ring, width + 4)
    fence = Fence(far, far - width + 2, 1, 3)

    def derive(r: torch.Tensor, s: tuple[torch.Tensor, torch.Tensor]) -> Sequence[torch.Tensor]:
        top = (r >> keys.depth) & 1
        carried = torch.cat([torch.ones_like(r), r])
        trees = dcf.dcf_keygen(keys, cipher, s, (r & low).repeat(2), carried * (1 - 2 * top.repeat(2)))
        return fence.tables(r), carried * top.repeat(2), *trees

    derived = (fence.part((n,)), Part((2 * n,)), words, bits)
    request = Request(RequestKind.COMPARE, (Part((n,)), seeds), derived, derive, keys.work())
    r, own, tables, tops, cw, cb = yield from draw(request)
    (c,) = yield from open_masked(masked(x.data.reshape(n) + r, x.ring, "masked for max(x, 0)"))
    fence.watch(side, tables, c + (1 << (width - 1)))
    points = (c & low).repeat(2).unsqueeze(-1)
    _, t = dcf.dcf_eval(keys, cipher, side.number, own, cw, cb, points)
    u, ru = (tops + t.squeeze(-1)).chunk(2)
    m = (c >> keys.depth) & 1
    # x [x < 0] = (c - r) (m + (1 - 2m) u)
    below = m * (side.first(c) - r) + (1 - 2 * m) * (c * u - ru)
    return Share(x.data - below.reshape(x.shape), x.bits, ring=x.ring)
