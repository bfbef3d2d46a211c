"""What each token of a document is worth to each KV head, before any question: the first part of `compact`.

A score is a function of one layer: (prefill, layer, kernels, budget in tokens) -> (KV, T), higher is better.
What stays whatever it scores is infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcache.model import Model
from mpcache.model.prefill import Prefill
from mpcache.model.reread import reread
from mpcache.model.rope import rope_tables, rotate
from mpcache.policy.refit import reference_queries, targets_of
from mpcache_kernels import Backend

SINK = RECENT = 4  # first and last tokens, which stay
VOTERS, POOL = 32, 5  # snapkv: the last queries, and tokens over which their votes are averaged
JUDGES, STATIC_RECENT = 0.2, 16  # static: the share of the last queries that judge, and tokens that stay
FUTURE, SPREAD = 512, 0.02  # expected: positions of a question, and what is added to each share
SKETCH, BLOCK, FIRST, LAST = 48, 256, 8, 4  # compactor: columns, keys of a block, tokens that stay

REPEATED = ("kvzip", "kvzip+")  # by a second reading, chunk by chunk

ScoreOf = Callable[[Prefill, int, Backend, int], Tensor]


@dataclass(frozen=True)
class Scorer:
    """A score by name. queries: how many of a context's last ones it looks at.  source: where it is from."""

    of: ScoreOf
    queries: Callable[[int], int]
    source: str


def score_tokens(name: str, prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score the tokens of a layer: (KV, T), what always stays infinite. Once per context and layer."""
    depends = budget if name in ("compactor", "snapkv") else 0
    key = ("score", name, layer, depends)
    if key not in prefill.notes:
        prefill.notes[key] = SCORES[name].of(prefill, layer, kernels, budget)
    found: Tensor = prefill.notes[key]
    return found


def always(scores: Tensor, first: int = SINK, last: int = RECENT) -> Tensor:
    """Make the scores of the first and last tokens infinite."""
    scores = scores.clone()
    scores[..., :first] = torch.inf
    scores[..., max(0, scores.shape[-1] - last) :] = torch.inf
    return scores


# --------------------------------------------------------------------------- by a second reading


def _repeated(prefill: Prefill, layer: int, kernels: Backend, weighed: bool) -> Tensor:
    """Take the most that a second reading's query looks at each token, in the chunk that holds it.

    Which one it is stays in the context's notes (`best_queries`).
    """
    k, v = prefill.k[layer], prefill.v[layer]
    sizes = _output_sizes(_model(prefill), v, layer) if weighed else None
    found = torch.zeros(k.shape[:2], device=k.device)
    best, before = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device), 0
    for part in reread(prefill):
        q, own = part.q[layer], part.k[layer]
        keys = torch.cat([k[:, :SINK], k[:, part.begin : part.end], own], 1)
        count, sink = part.end - part.begin, keys.shape[1] - own.shape[1] - (part.end - part.begin)
        rows = torch.ones(q.shape[1], device=k.device)
        columns = torch.ones(q.shape[0], count, device=k.device)
        if sizes is not None:
            rows, columns = 1 / part.sizes[layer], sizes[:, part.begin : part.end]
        chunk = slice(part.begin, part.end)
        found[:, chunk], query = kernels.repeat_importance(q, keys, sink, count, rows, columns)
        best[:, chunk] = query + before
        before += q.shape[0] // len(k) * q.shape[1]
    prefill.notes["best queries", layer, weighed] = best
    return always(found)


def best_queries(prefill: Prefill, layer: int, score: str) -> Tensor | None:
    """Return which reference query of a KV head looks most at each token: (KV, T); None: it is not known.

    They are counted as `mpcache.policy.refit.reference_queries` returns them. The score has been computed.
    """
    return prefill.notes.get(("best queries", layer, score == "kvzip+")) if score in REPEATED else None


def kvzip(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score by attention alone (KVzip)."""
    return _repeated(prefill, layer, kernels, weighed=False)


def kvzip_plus(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score by attention times what a token adds to the residual stream, relative to it."""
    return _repeated(prefill, layer, kernels, weighed=True)


def rms(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score by the root mean square of a second reading's attention to the document alone."""
    k, v = prefill.k[layer], prefill.v[layer]
    found = []
    for head in range(len(k)):
        attention = targets_of(
            reference_queries(reread(prefill), layer, head, len(k)), k[head], v[head]
        ).attention
        found.append(attention.square().mean(0).sqrt())
    return always(torch.stack(found))


def _model(prefill: Prefill) -> Model:
    if prefill.model is None:
        raise ValueError("this score needs the model that read the context")
    return prefill.model


def _output_sizes(model: Model, v: Tensor, layer: int) -> Tensor:
    """Measure |v_t W_O^h|: (heads, T), of v (KV, T, d)."""
    shape = model.shape
    out = model.weights.layers[layer].wo.to(v.device).reshape(shape.heads, shape.head_dim, -1)
    gram = out @ out.transpose(1, 2)  # |v W|^2 = v (W W^T) v
    rows = v.repeat_interleave(shape.group, 0)
    return ((rows @ gram) * rows).sum(-1).clamp(min=0).sqrt()


# ------------------------------------------------------------------------- by the context itself


def expected(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score by the attention to expect of a normal query at one of the next positions, times |v|."""
    q, k, v = prefill.q_window[layer], prefill.k[layer], prefill.v[layer]
    length, shape = k.shape[1], _model(prefill).shape
    q = shifted(prefill, q, prefill.first_position, -1)[:, min(SINK, q.shape[1] - 1) :]
    mean, spread = q.mean(1), q - q.mean(1, keepdim=True)
    covariance = spread.transpose(1, 2) @ spread / q.shape[1]  # (heads, d, d)
    if shape.positions == "rope":  # the mean rotation of the positions to come
        cos, sin = rope_tables(shape, torch.arange(length, length + FUTURE, device=k.device))
        unit = torch.eye(shape.head_dim, device=k.device).expand(FUTURE, -1, -1)
        turn = rotate(unit, cos, sin).mean(0)  # row i: where dimension i goes
        mean, covariance = mean @ turn, turn.T @ covariance @ turn
    keys = k.repeat_interleave(shape.group, 0)
    raw = (keys @ mean[..., None])[..., 0] + ((keys @ covariance) * keys).sum(-1) / 2
    raw[:, :SINK] = -torch.inf if length > SINK else raw[:, :SINK]
    share = raw.softmax(-1).reshape(len(k), shape.group, length).mean(1)
    return always((share + SPREAD) * v.norm(dim=-1))


def keydiff(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score keys by how far they point away from the mean of all (KeyDiff)."""
    unit = F.normalize(prefill.k[layer], dim=-1)
    return always(-F.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1))


def compactor(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score by attention within blocks of keys, and by leverage, the more the larger the budget is."""
    q, k, v = prefill.q_window[layer], prefill.k[layer], prefill.v[layer]
    length = k.shape[1]
    first, last = min(FIRST, length - 1), LAST if length > FIRST + LAST else 0
    inner = slice(first, length - last)
    keys = shifted(prefill, k, 0, -1)[:, inner]
    keys = keys - keys.mean(1, keepdim=True)
    seed = torch.Generator().manual_seed(layer)  # public, as all of the rule
    sketch = torch.randn(k.shape[2], SKETCH, generator=seed).to(k.device) / SKETCH**0.5
    columns = keys @ sketch
    gram = columns.transpose(1, 2) @ columns + 1e-2 * torch.eye(SKETCH, device=k.device)
    leverage = (columns * torch.linalg.solve(gram, columns.transpose(1, 2)).transpose(1, 2)).sum(-1)
    group = q.shape[0] // len(k)
    paid = torch.zeros(leverage.shape, device=k.device)
    for begin in range(0, paid.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        mine, theirs = q[:, inner][:, block], k[:, inner][:, block].repeat_interleave(group, 0)
        attention = (mine @ theirs.transpose(1, 2) * k.shape[2] ** 0.5).softmax(-1).sum(1)
        paid[:, block] = attention.reshape(len(k), group, -1).mean(1)
    paid = F.avg_pool1d((paid * v[:, inner].norm(dim=-1))[:, None], 3, 1, 1)[:, 0]
    scores = _standard(paid) + budget / length * _standard(leverage)
    return always(F.pad(scores, (first, last)), first, last)


def static(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score as mpcache's static eviction does: for all heads alike, by the last fifth of the queries."""
    k = prefill.k[layer]
    known = prefill.last_queries(_judges(k.shape[1]))
    votes = kernels.window_importance(known.q_window[layer], k, known.first_position)
    return always(votes.expand(len(k), -1), SINK, STATIC_RECENT)


def snapkv(prefill: Prefill, layer: int, kernels: Backend, budget: int) -> Tensor:
    """Score as snapkv does: by the pooled votes of the last queries, whose own tokens stay."""
    k = prefill.k[layer]
    last = min(VOTERS, budget)
    known = prefill.last_queries(_voters(k.shape[1]))
    heads = zip(known.q_window[layer].chunk(len(k)), k.chunk(len(k)), strict=True)
    votes = torch.stack([kernels.window_importance(*pair, known.first_position) for pair in heads])
    votes[:, k.shape[1] - last :] = 0
    pooled = F.avg_pool1d(votes[:, None], POOL, 1, POOL // 2)[:, 0]
    return always(pooled, 0, last)


def shifted(prefill: Prefill, x: Tensor, first: int, way: int) -> Tensor:
    """Turn x (heads, m, d) of positions from `first` on by as much (way 1), or back (-1)."""
    shape = _model(prefill).shape
    if shape.positions != "rope":
        return x
    cos, sin = rope_tables(shape, torch.arange(first, first + x.shape[1], device=x.device))
    return rotate(x.transpose(0, 1), cos, way * sin).transpose(0, 1)


def _standard(x: Tensor) -> Tensor:
    """Shift and scale to mean 0 and deviation 1, over all heads."""
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-6)


def _none(context: int) -> int:
    return 0


def _all(context: int) -> int:
    return context


def _judges(context: int) -> int:
    return max(1, round(JUDGES * context))


def _voters(context: int) -> int:
    return min(VOTERS, context)


SCORES: dict[str, Scorer] = {
    "kvzip+": Scorer(kvzip_plus, _none, "KVzip+, after arXiv 2505.23416"),
    "kvzip": Scorer(kvzip, _none, "KVzip, arXiv 2505.23416"),
    "rms": Scorer(rms, _none, "attention matching, arXiv 2602.16284"),
    "expected": Scorer(expected, _all, "Expected Attention, arXiv 2510.00636"),
    "keydiff": Scorer(keydiff, _none, "KeyDiff, arXiv 2504.15364"),
    "compactor": Scorer(compactor, _all, "Compactor, arXiv 2507.08143"),
    "static": Scorer(static, _judges, "MPCache's static eviction, arXiv 2501.06807"),
    "snapkv": Scorer(snapkv, _voters, "SnapKV, arXiv 2404.14469"),
}
