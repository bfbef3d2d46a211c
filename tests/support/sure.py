"""The part of a plain answer that the private one must repeat: up to a near tie, which noise may turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpcache.answer import plain_answer
from mpcache.model import Model
from mpcache.sampling import Chooser, Sampling

TIE = 0.02  # logits of this distance may change places by the error of the fixed point and the blur


class _Watched(Sampling):
    """Greedy sampling that notes by how much each token won."""

    def chooser(self, reveal: str = "logits") -> Chooser:
        gaps: list[float] = []
        object.__setattr__(self, "gaps", gaps)

        class Watching(Chooser):
            def __call__(self, logits: torch.Tensor) -> int:
                first, second = logits.double().topk(2).values.tolist()
                gaps.append(first - second)
                return super().__call__(logits)

        return Watching(self, reveal)


def sure_ids(model: Model, bound: Any, context: Sequence[int], question: Sequence[int], n: int) -> list[int]:
    """The plain engine's greedy tokens, up to the first that a near tie decided; at least one."""
    sampling = _Watched()
    ids = plain_answer(model, bound, context, question, n, sampling, ()).ids
    gaps: list[float] = vars(sampling)["gaps"]
    sure = next((i for i, gap in enumerate(gaps) if gap < TIE), len(ids))
    assert sure, f"the first token is a near tie: {gaps}; ask something else"
    return ids[:sure]
