"""Read a document a second time behind itself: what a later reader of it will look at, before any question.

A chunk of the document is read again with the whole document in view. Its queries look up what they
repeat, as a question's would: KVzip (arXiv 2505.23416) scores tokens by them, and attention matching (arXiv
2602.16284) fits what stays to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcache.errors import BadInput
from mpcache.model.loading import Model
from mpcache.model.prefill import Prefill, apply_linear, feed_forward, normalise, project_heads
from mpcache.model.rope import rope_tables

CHUNK = 2048  # tokens that are read again at once
SHORTEST = 128  # the same where the model's positions end: they overlap the document's end then
ROWS = 256  # of them that attend at once, each lot to what stands before its end
LEAD = 8  # tokens before a chunk that are read with it, so that its beginning is expected


@dataclass(frozen=True, eq=False)
class Reread:
    """One chunk of the document, read again with n tokens in all.

    begin, end: its tokens in the document.  q: per layer (heads, n, d), rotated and scaled.  k, v: per layer
    (kv_heads, n, d).  sizes: per layer (n,), the length of the residual stream.
    """

    begin: int
    end: int
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]


def reread(known: Prefill) -> tuple[Reread, ...]:
    """Read a context again, chunk by chunk; once, however often it is asked for. Raises ValueError."""
    if "reread" not in known.notes:
        if known.model is None:
            raise ValueError("a context that was not read by a model cannot be read again")
        known.notes["reread"] = tuple(_chunks(known.model, known))
    found: tuple[Reread, ...] = known.notes["reread"]
    return found


def _chunks(model: Model, known: Prefill) -> list[Reread]:
    length, room = len(known.token_ids), model.shape.max_positions
    size = min(CHUNK, max(SHORTEST, room - length - LEAD))
    if LEAD + min(size, length) > room:
        raise BadInput(
            f"the model's {room} positions leave no room to read a context of {length} tokens again, which "
            "the policy needs; shorten the context, or take another policy"
        )
    # A beginning-of-text token is read once, as in training.
    first = 1 if length > 1 and known.token_ids[0] == model.shape.bos_id else 0
    return [_read(model, known, begin, min(begin + size, length)) for begin in range(first, length, size)]


@torch.no_grad()
def _read(model: Model, known: Prefill, begin: int, end: int) -> Reread:
    """Read tokens `begin` to `end` behind the document, or over the positions of its end."""
    shape, weights, device = model.shape, model.weights, known.k[0].device
    length = len(known.token_ids)
    ids = torch.tensor(known.token_ids[max(0, begin - LEAD) : end])
    n = len(ids)
    start = min(length, shape.max_positions - n)
    positions = torch.arange(start, start + n, device=device)
    x = weights.embed[ids].to(device)
    if weights.positions is not None:
        x = x + weights.positions[start : start + n].to(device)
    tables = rope_tables(shape, positions) if shape.positions == "rope" else None

    queries, keys, values, sizes = [], [], [], []
    for stored, k_doc, v_doc in zip(weights.layers, known.k, known.v, strict=True):
        layer = stored.to(device)
        sizes.append(x.norm(dim=-1))
        q, k, v = project_heads(normalise(x, shape.norm_eps), layer, shape, tables)
        queries.append(q)
        keys.append(k)
        values.append(v)
        if len(queries) == shape.layers:
            break  # what the last layer makes of them is not asked for
        out = _attend(q, torch.cat([k_doc, k], 1), torch.cat([v_doc, v], 1))
        x = x + apply_linear(out, layer.wo, layer.bo)
        x = x + feed_forward(normalise(x, shape.norm_eps), layer, shape)
    return Reread(begin, end, tuple(queries), tuple(keys), tuple(values), tuple(sizes))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the last tokens, q (heads, n, d), to all before and, causally, to themselves: (n, heads d).

    k, v: (kv_heads, before + n, d).
    """
    (heads, n, _), length = q.shape, k.shape[1]
    k, v = (t.repeat_interleave(heads // len(t), 0)[None] for t in (k, v))
    found = []
    for begin in range(0, n, ROWS):
        rows = min(ROWS, n - begin)
        seen = length - n + begin + rows
        visible = torch.ones(rows, seen, dtype=torch.bool, device=q.device).tril_(seen - rows)
        found.append(
            F.scaled_dot_product_attention(
                q[None, :, begin : begin + rows], k[:, :, :seen], v[:, :, :seen], visible, scale=1.0
            )[0]
        )
    return torch.cat(found, 1).transpose(0, 1).flatten(1)
