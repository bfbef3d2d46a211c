"""Public integers of a policy: what a plan is, and how budgets become whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class LeakClass(StrEnum):
    """What a policy reveals beyond public sizes (docs/threat-model.md)."""

    NONE = "none"
    COUNT = "count"
    MODEL_COUNT = "model-count"
    STATIC_INDEX = "static-index"
    STEP_INDEX = "step-index"
    STEP_BIT = "step-bit"
    TOKEN_CLASS = "token-class"


FULL_PERCENT = 100  # of the context: no budget

Budget = int | float  # a count, or a ratio written with a point: 0.25
Budgets = Budget | tuple[Budget, ...]  # one for all layers, or one for each: 512/256/256/128


def setting(default: Any, meaning: str, allowed: str) -> Any:
    """Declare an option: its default, what it means, and what may be given, in words that users read."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


def tokens_of(budget: Budget, whole: int, at_least: int = 1) -> int:
    """Turn a budget into a whole number: ratios are rounded up, once, here."""
    n = math.ceil(budget * whole - 1e-9) if isinstance(budget, float) else budget
    return max(at_least, n)


@dataclass(frozen=True)
class LayerPlan:
    """Public integers of one layer.

    kept: context tokens in its cache.  attended: most context tokens that one query attends to.
    representatives: keys that q is scored against beside the kept tokens.
    """

    kept: int
    attended: int
    representatives: int


@dataclass(frozen=True)
class SplitPlan(LayerPlan):
    """A layer whose heads keep different numbers of tokens; kept is their mean, rounded up.

    heads: the KV heads of each part, which keep the same number.  parts: the plan of each part.
    """

    heads: tuple[tuple[int, ...], ...]
    parts: tuple[LayerPlan, ...]

    @staticmethod
    def of(heads: Sequence[Sequence[int]], parts: Sequence[LayerPlan]) -> SplitPlan:
        """Join the plans of a layer's parts."""
        kv_heads = sum(map(len, heads))
        kept = sum(len(some) * part.kept for some, part in zip(heads, parts, strict=True))
        return SplitPlan(
            -(-kept // kv_heads), max(part.attended for part in parts),
            max(part.representatives for part in parts), tuple(map(tuple, heads)), tuple(parts),
        )  # fmt: skip

    def by_head(self, name: str) -> list[int]:
        """Return one of the parts' integers for each KV head."""
        found = {
            head: getattr(part, name)
            for some, part in zip(self.heads, self.parts, strict=True)
            for head in some
        }
        return [found[head] for head in sorted(found)]


@dataclass(frozen=True)
class Plan:
    """Public integers of one policy for one context length and one model."""

    context: int
    layers: tuple[LayerPlan, ...]

    @property
    def kept(self) -> int:
        """Context tokens in the cache of the layer that keeps most."""
        return max(layer.kept for layer in self.layers)

    @property
    def attended(self) -> int:
        return max(layer.attended for layer in self.layers)

    def tokens_kept(self, kv_heads: int) -> int:
        """Context tokens in the cache of the layer that keeps most; of split ones, the mean of all heads."""
        if not any(isinstance(layer, SplitPlan) for layer in self.layers):
            return self.kept
        return round(self._mean("kept", kv_heads))

    def tokens_attended(self, kv_heads: int) -> float:
        """Context tokens that a query attends to at most: in any layer; of split ones, in the mean of all."""
        if not any(isinstance(layer, SplitPlan) for layer in self.layers):
            return self.attended
        return self._mean("attended", kv_heads)

    def _mean(self, name: str, kv_heads: int) -> float:
        heads = (
            layer.by_head(name) if isinstance(layer, SplitPlan) else [getattr(layer, name)] * kv_heads
            for layer in self.layers
        )
        return sum(map(sum, heads)) / (kv_heads * len(self.layers))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """All integers, a line for all layers that are alike."""
        taken = [getattr(layer, "leader", i) for i, layer in enumerate(self.layers)]
        layers: list[dict[str, Any]] = []
        for i, layer in enumerate(self.layers):
            found = {k: v for k, v in _told(layer).items() if v not in ((), {}) and k != "leader"}
            if taken[i] not in (None, i):
                before = taken[i] == i - 1 and taken.count(i - 1) == 2
                found["choice of"] = "the layer before" if before else f"layer {taken[i]}"
            layers.append(found)
        return [
            f"{name}: " + ", ".join(f"{k} {v}" for k, v in layer.items()) for name, layer in alike(layers)
        ]


def _told(layer: LayerPlan) -> dict[str, Any]:
    """Name a layer's integers; of one whose heads differ, what each of them keeps and attends to."""
    if not isinstance(layer, SplitPlan):
        return asdict(layer)
    found = {name: tuple(layer.by_head(name)) for name in ("kept", "attended", "representatives")}
    return {name: written(by_head) for name, by_head in found.items() if any(by_head)}


@dataclass(frozen=True)
class SharedEviction:
    """Public integers of an eviction on shares: what stays of a document that nobody may see.

    tokens: of the document.  judges: its last queries, whose attention ranks its tokens.  first, last: tokens
    that stay whatever they score.  kept: per layer, those among them.  leaders: per layer, the one whose
    ranking it takes.  by_head: each KV head ranks for itself, else all heads together.  pool: neighbours
    whose scores are added, an odd number.
    """

    tokens: int
    judges: int
    first: int
    last: int
    kept: tuple[int, ...]
    leaders: tuple[int, ...]
    by_head: bool
    pool: int = 1

    def chosen(self, layer: int) -> int:
        """Return how many tokens of a layer stay for their scores."""
        return max(0, self.kept[layer] - self.first - self.last)

    def largest(self, group: int, heads: int) -> int:
        """Bound a token's score: each of its judges pays it 1 at most in each head."""
        return self.pool * self.judges * (group if self.by_head else heads)


def alike(items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Group layers that are equal under one name, those with the first layer first: `layers 0 to 5`."""
    groups: list[tuple[Any, list[int]]] = []
    for i, item in enumerate(items):
        mine = next((numbers for other, numbers in groups if other == item), None)
        if mine is None:
            groups.append((item, [i]))
        else:
            mine.append(i)
    for item, numbers in groups:
        yield layers_told(numbers), item


def layers_told(numbers: Sequence[int]) -> str:
    """Name layers, which rise: `layers 0 to 2, 4, 6 .. 30, 31`."""
    parts, i = [], 0
    while i < len(numbers):
        step = numbers[i + 1] - numbers[i] if i + 1 < len(numbers) else 0
        j = i
        while j + 1 < len(numbers) and numbers[j + 1] - numbers[j] == step:
            j += 1
        if step == 1:
            parts.append(f"{numbers[i]} to {numbers[j]}")
        elif j - i > 2:
            parts.append(f"{numbers[i]}, {numbers[i + 1]} .. {numbers[j]}")
        else:
            parts.append(str(numbers[i]))
            j = i
        i = j + 1
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(parts)}"


def written(value: Any) -> str:
    """Write an option's value as the policy grammar reads it."""
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
