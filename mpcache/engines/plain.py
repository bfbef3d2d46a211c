"""The plain reading: float tensors. It is the truth that the secure run is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mpcache.model.prefill import apply_activation, normalise
from mpcache.model.rope import Rotation, rotate
from mpcache.ops import Engine, SelectionOf
from mpcache.rank import Rank
from mpcache.runtime.program import Program, local
from mpcache_kernels import Backend


class PlainSelection(SelectionOf[torch.Tensor]):
    """Chosen positions in the clear. index: (*rows, k), descending score, ties to the lower index."""

    def __init__(self, index: torch.Tensor, n: int) -> None:
        self.index, self.n = index, n

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        index = self.index.unsqueeze(-1).expand(*self.index.shape, values.shape[-1])
        return values.gather(-2, index)

    def gather(self, values: torch.Tensor) -> Program[torch.Tensor]:
        return local(self.pick(values))

    def scatter(self, weights: torch.Tensor) -> Program[torch.Tensor]:
        *rows, _, c = weights.shape
        index = self.index.unsqueeze(-1).expand(weights.shape)
        return local(weights.new_zeros(*rows, self.n, c).scatter(-2, index, weights))

    def prepare(self) -> Program[PlainSelection]:
        return local(self)

    def refine(self, finer: PlainSelection, children: int) -> Program[PlainSelection]:
        parent = self.index.gather(-1, finer.index // children)
        return local(type(self)(parent * children + finer.index % children, self.n * children))

    def marks(self) -> torch.Tensor:
        marks = torch.zeros(*self.index.shape[:-1], self.n, device=self.index.device)
        return marks.scatter(-1, self.index, 1.0)


class PlainOps(Engine[torch.Tensor, torch.Tensor]):
    """`Ops` on torch float tensors; no rounds, no bytes.

    kernels: for the steps that have one, on `device`; without them each operation stands for itself, as
    it does on shares.
    """

    name = "plain"

    def __init__(self, kernels: Backend | None = None, device: torch.device | str = "cpu") -> None:
        self.kernels, self.device = kernels, torch.device(device)

    def secret(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None
    ) -> torch.Tensor:
        assert value is not None, "the plain reading knows every input"
        return value.float().to(self.device).reshape(tuple(shape))

    def rescale(self, x: torch.Tensor) -> Program[torch.Tensor]:
        return local(x)

    def prepare(self, x: torch.Tensor, ring: int = 48) -> Program[torch.Tensor]:
        return local(x)

    def cat_operands(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        return torch.cat(list(parts), dim)

    cat = cat_operands

    def linear(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Program[torch.Tensor]:
        y = x @ w
        return local(y if bias is None else y + bias)

    def scores(self, q: torch.Tensor, keys: torch.Tensor) -> Program[torch.Tensor]:
        return local(q @ keys.transpose(-1, -2))

    def as_scores(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def norm_linear(
        self, x: torch.Tensor | None, change: torch.Tensor, eps: float, w: torch.Tensor,
        bias: torch.Tensor | None = None, turn: Rotation | None = None,
    ) -> Program[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
        x = change if x is None else x + change
        y = normalise(x, eps) @ w
        y = y if bias is None else y + bias
        if turn is not None:
            y = replace(turn, cos=turn.cos.to(self.device), sin=turn.sin.to(self.device))(y)
        return local((x, y))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Program[torch.Tensor]:
        return local(rotate(x, cos.to(x), sin.to(x)))

    def gate(self, kind: str, gate: torch.Tensor, up: torch.Tensor | None) -> Program[torch.Tensor]:
        y = apply_activation(kind, gate)
        return local(y if up is None else y * up)

    def softmax(
        self, scores: torch.Tensor, visible: torch.Tensor | None
    ) -> Program[tuple[torch.Tensor, torch.Tensor]]:
        if visible is not None:
            scores = scores.masked_fill((visible == 0).to(self.device), float("-inf"))
        e = torch.exp(scores - scores.amax(-1, keepdim=True))
        return local((e, e.sum(-1, keepdim=True)))

    def weighted_sum(self, weights: torch.Tensor, values: torch.Tensor) -> Program[torch.Tensor]:
        return local(weights @ values)

    def reciprocal(self, total: torch.Tensor) -> Program[torch.Tensor]:
        return local(1 / total)

    def mul(self, x: torch.Tensor, y: torch.Tensor) -> Program[torch.Tensor]:
        return local(x * y)

    def relu(self, x: torch.Tensor) -> Program[torch.Tensor]:
        return local(x.clamp(min=0))

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def ones(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.ones(tuple(shape), device=self.device)

    def mask_scores(self, scores: torch.Tensor, alive: torch.Tensor, far: int) -> torch.Tensor:
        return scores + (alive - 1) * far

    def topk(
        self, scores: torch.Tensor, k: int, values: Sequence[torch.Tensor], limit: int = 512
    ) -> Program[tuple[PlainSelection, list[torch.Tensor]]]:
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        chosen = PlainSelection(order[..., :k], scores.shape[-1])
        return local((chosen, [chosen.pick(v) for v in values]))

    def reveal(self, x: torch.Tensor, to: Rank, why: str) -> Program[torch.Tensor | None]:
        return local(x.cpu())
