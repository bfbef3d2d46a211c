"""Make a model's curve: what each of its KV heads loses at each share of its tokens; and check it.

Loss is of the refitted head's whole output over a second reading: of the document and of the reading's own
tokens, relative to the residual stream. The text is documents of facts and plain prose, by seeds that nothing
else draws; none of it is ever served.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcache.console.terminal import Say
from mpcache.demo.documents import CountTokens, make_document, take_verses
from mpcache.errors import BadInput
from mpcache.evaluate.score import EvalModel, score
from mpcache.evaluate.sweep import FULL, EvalGrid, bind_at_budget, take_sample
from mpcache.evaluate.tasks import FACTS, TASKS
from mpcache.model import Model
from mpcache.model.prefill import Prefill, prefill
from mpcache.model.reread import Reread, reread
from mpcache.policy.counts import LEAST
from mpcache.policy.curve import LEVELS, HeadCurve, try_curve
from mpcache.policy.plan import FULL_PERCENT
from mpcache.policy.refit import Targets, fit, reference_queries, targets_of
from mpcache.policy.scores import score_tokens
from mpcache_kernels import Backend, backend

CHECKED = (5, 10, 20, 40)  # percent of a document, at which fresh facts are asked
CHECK_SEED = 7919  # of their documents


def texts(model: Model, documents: int, tokens: int, given: Sequence[str]) -> list[list[int]]:
    """Make the documents to calibrate on, facts and plain prose in turn; then those that are given.

    tokens: of each, at most. Returns token ids. Raises BadInput where they hold no document.
    """
    encode = model.tokenizer.encode
    count: CountTokens = lambda text: len(encode(text, bos=False))  # noqa: E731
    made = []
    for i in range(documents):
        rng = random.Random(f"calibrate {i}")
        try:
            if i % 2:
                text = "".join(verse + "\n" for verse in take_verses(rng, count, tokens - 1))
            else:
                text, _ = make_document(rng, count, tokens - 1, FACTS)
        except ValueError as error:
            raise BadInput(f"--context {tokens}: too short for a document of facts: {error}") from None
        made.append(encode(text, bos=True))
    return [*made, *(encode(text, bos=True)[:tokens] for text in given)]


def calibrate(model: Model, documents: Sequence[Sequence[int]], device: str, say: Say) -> Tensor:
    """Measure the errors of each head at each level, the mean over documents: (layers, kv_heads, levels)."""
    kernels, found = backend(device), []
    for i, ids in enumerate(documents, 1):
        known = prefill(model, ids, device)
        layers = []
        for layer in range(model.shape.layers):
            say(f"document {i} of {len(documents)}, layer {layer + 1} of {model.shape.layers}")
            layers.append(layer_errors(known, layer, kernels))
        found.append(torch.stack(layers))
    return torch.stack(found).mean(0)


@torch.no_grad()
def layer_errors(known: Prefill, layer: int, kernels: Backend) -> Tensor:
    """Measure what each head of a layer loses at each level: (kv_heads, levels)."""
    assert known.model is not None
    shape, parts = known.model.shape, reread(known)
    k, v = known.k[layer], known.v[layer]
    order = torch.sort(
        score_tokens("kvzip+", known, layer, kernels, 0), dim=-1, descending=True, stable=True
    ).indices
    out = known.model.weights.layers[layer].wo.to(v.device)
    out = out.reshape(shape.kv_heads, shape.group, shape.head_dim, -1)
    grams = (out @ out.transpose(-1, -2)).mean(1)  # |d W_O|^2 = d (W_O W_O^T) d, the mean over the group
    power = torch.cat([part.sizes[layer] for part in parts]).square().mean()
    errors = torch.zeros(shape.kv_heads, len(LEVELS), dtype=torch.float64)
    for head in range(shape.kv_heads):
        targets = targets_of(reference_queries(parts, layer, head, shape.kv_heads), k[head], v[head])
        own = _own_part(parts, layer, head, shape.group)
        share = torch.sigmoid(targets.log_sums - own.log_sums)  # the document's, of each query's attention
        for j, level in enumerate(LEVELS[:-1]):  # with all of them nothing is lost
            kept = order[head, : max(LEAST, int(level * k.shape[1]))].sort().values
            change = _change(targets, own, share, kept, v[head])
            errors[head, j] = float(((change @ grams[head]) * change).sum(-1).mean() / power)
    return errors


@dataclass(frozen=True, eq=False)
class OwnPart:
    """What a second reading's queries see of its own tokens. log_sums: (n, 1).  out: (n, d)."""

    log_sums: Tensor
    out: Tensor


def _own_part(parts: Sequence[Reread], layer: int, head: int, group: int) -> OwnPart:
    sums, outs = [], []
    for part in parts:
        q, k, v = part.q[layer], part.k[layer][head], part.v[layer][head]
        n = q.shape[1]
        scores = q[head * group : (head + 1) * group] @ k.T
        later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(later, -torch.inf)
        sums.append(scores.logsumexp(-1).flatten())
        outs.append((scores.softmax(-1) @ v).flatten(0, 1))
    return OwnPart(torch.cat(sums)[:, None], torch.cat(outs))


def _change(targets: Targets, own: OwnPart, share: Tensor, kept: Tensor, v: Tensor) -> Tensor:
    """Compute by how much the whole output moves where `kept` stay, refitted: (n, d)."""
    bias, values = fit(targets, kept, v, share)
    x = targets.attention[:, kept] * bias.exp()
    before = share * targets.out + (1 - share) * own.out
    after = (share * (x @ values) + (1 - share) * own.out) / (share * x.sum(-1, keepdim=True) + 1 - share)
    return after - before


def check_curve(
    engine: EvalModel, curve: HeadCurve, answers: int, tokens: int, say: Say
) -> dict[str, object]:
    """Ask fresh facts with the curve, at several budgets, in documents of at most so many tokens.

    Counted are those that the full cache answers right. Raises BadInput.
    """
    try_curve(curve)
    task, full, asked = TASKS["recall"], 0, 0
    right = dict.fromkeys(CHECKED, 0)
    grid = EvalGrid((task,), ("after",), (), CHECKED, answers, CHECK_SEED, tokens)
    for i in range(task.samples(answers)):
        say(f"fresh facts: document {i + 1} of {task.samples(answers)}")
        sample, known = take_sample(engine, task, "after", grid, i)
        read = engine.read(known.context, 0)

        def answered(spec: str, percent: int) -> list[int]:
            bound = bind_at_budget(engine, spec, percent, len(known.context))  # noqa: B023
            scores = score(task, engine.session(bound, read), sample, known)  # noqa: B023
            return [turn.right for turn in scores]

        able = answered(FULL, FULL_PERCENT)
        asked, full = asked + len(able), full + sum(able)
        for percent in CHECKED:
            right[percent] += sum(map(min, able, answered("compact", percent)))
    found: dict[str, object] = {
        "task": task.name, "context_tokens": tokens, "asked": asked, "full": full,
    }  # fmt: skip
    return found | {"right": {str(percent): n for percent, n in right.items()}}
