"""Does the private run do what the plain one does? Selections, tokens and logits, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpcache.answer import bind_to_document
from mpcache.engines.plain import PlainOps
from mpcache.model import Model
from mpcache.model.prefill import prefill
from mpcache.ops import AnyEngine
from mpcache.policy import parse_policy
from mpcache.protocols import ranges
from mpcache.rank import Rank
from mpcache.runtime.shares import decode
from mpcache.session import Session
from mpcache_kernels import backend
from tests.support.play import play

KERNELS = backend("cpu")


@dataclass
class Agreement:
    """What two readings of the same session did. difference: the largest of the logits."""

    plain: list[int]
    private: list[int]
    difference: float
    selections: int  # clusters chosen, over all steps, layers, heads and levels
    changed: int  # of these, not the plain run's
    wrong: int  # of these, not the best by the private run's own scores, or changed for no reason: by
    # more than the fixed-point error that the row's scores had
    score_error: float  # the largest error of a score that a selection was made by
    margin: float  # between the plain run's first two candidates, at the first token that differs (0: none)


def record(ops: AnyEngine) -> list[tuple[Any, Any]]:
    """Every (scores, selection) of `ops.topk` from now on."""
    seen: list[tuple[Any, Any]] = []
    topk = ops.topk

    def recording(scores: Any, k: int, values: Any, *limit: int, **options: Any) -> Any:
        result = yield from topk(scores, k, values, *limit, **options)
        seen.append((scores, result[0]))
        return result

    ops.topk = recording  # type: ignore[method-assign]
    return seen


def opened(server: Any, client: Any) -> torch.Tensor:
    """Scores that both parties hold, in the clear."""
    if server.ring == 64:  # stock
        return decode(server.data + client.data, server.bits)
    raw = (server.data + client.data) & ((1 << server.ring) - 1)
    raw = raw - ((raw >> (server.ring - 1)) << server.ring)
    return decode(raw, 0) * ranges.SCORE_UNIT


def generate(
    session: Session, chunk: Sequence[int] | None, m: int, n: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy: n tokens after a first chunk of m; both lists empty where the logits are not learned."""
    tokens: list[int] = []
    logits: list[torch.Tensor] = []
    for _ in range(n):
        out = session.chunk(chunk, m)
        if chunk is not None and out is not None:
            logits.append(out.double())
            tokens.append(int(out.argmax()))
            chunk = tokens[-1:]
        m = 1
    return tokens, logits


def compare(
    model: Model, context: Sequence[int], question: Sequence[int], n: int, spec: str, protocol: str = "fast"
) -> Agreement:
    """The same document, question and greedy choice, plain and by three parties."""
    bound = parse_policy(spec).bind(len(context), model.shape)
    filled = prefill(model, context, window=bound.window)
    bound, _ = bind_to_document(bound, model.shape, filled, KERNELS)
    plain_ops = PlainOps()
    plain_seen = record(plain_ops)
    session = Session(plain_ops, None, model.shape, bound)
    session.setup(model.weights)
    session.context(filled, KERNELS)
    with torch.no_grad():
        plain_tokens, plain_logits = generate(session, question, len(question), n)

    def program(ops: Any, party: Any, rank: Rank) -> Any:
        seen = record(ops)
        private = Session(ops, party, model.shape, bound)
        private.setup(model.weights if rank is Rank.SERVER else None)
        private.context(*((filled, KERNELS) if rank is Rank.SERVER else (None, None)))
        asked = question if rank is Rank.CLIENT else None
        return seen, *generate(private, asked, len(question), n)

    played = play(program, protocol)
    seen, tokens, logits = played.client
    selections = changed = wrong = 0
    score_error = 0.0
    # After a different token the runs are about different texts.
    same = next((i for i, (a, b) in enumerate(zip(plain_tokens, tokens, strict=True)) if a != b), n)
    pairs = list(zip(plain_seen, played.server[0], seen, strict=True))
    for (scores, chosen), server, client in pairs[: len(pairs) // n * (same + 1)]:
        hot = server[1].slots().data + client[1].slots().data
        assert ((hot == 0) | (hot == 1)).all() and (hot.sum(-1) == 1).all()
        own = opened(server[0], client[0])
        here = hot.argmax(-1).sort(-1).values
        there = chosen.index.sort(-1).values
        best = torch.sort(own, dim=-1, descending=True, stable=True).indices[..., : here.shape[-1]]
        selections += here.numel()
        wrong += int((here != best.sort(-1).values).sum())
        error = (own - scores).abs().amax(-1, keepdim=True)
        score_error = max(score_error, float(error.max()))
        mine, its = (torch.zeros_like(scores).scatter(-1, i, 1) for i in (here, there))
        edge = scores.masked_fill(its == 0, torch.inf).amin(-1, keepdim=True)  # the last one chosen
        far = (scores - edge).abs() > 2 * error + 1e-6
        changed += int((mine != its).sum()) // 2
        wrong += int(((mine != its) & far).sum())
    difference = max(
        float((a - b).abs().max()) for a, b in list(zip(plain_logits, logits, strict=True))[: same + 1]
    )
    first, second = plain_logits[same].topk(2).values.tolist() if same < n else (0.0, 0.0)
    return Agreement(
        plain_tokens, tokens, difference, selections, changed, wrong, score_error, first - second
    )
