"""Options that list layers, as in 2-9, or groups of them, as in 2-3/4-5-6."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpcache.policy.base import Policy

SHARE_ALLOWED = "default, none, or layers as in 2-3/4-5-6"
SHARE_MEANING = (
    "layers that go together, by the first one; default: pairs, but for the first and last two layers"
)
LAYERS_ALLOWED = "auto, or layers that rise, as in 2-9"


def listed_layers(policy: Policy, option: str, auto: Iterable[int], first: int, layers: int) -> list[int]:
    """Read an option that lists layers from `first` on. Raises PolicyError."""
    text: str = getattr(policy, option)
    if text == "auto":
        return sorted(i for i in set(auto) if first <= i < layers)
    numbers = [int(part) if part.isdecimal() else -1 for part in text.split("-")]
    if numbers != sorted(set(numbers)) or not first <= numbers[0] <= numbers[-1] < layers:
        raise policy.fail(option, f"auto, or layers {first} to {layers - 1} that rise, as in 2-9")
    return numbers


def shared_layers(policy: Policy, layers: int) -> list[int]:
    """Read the option `share`: for each layer the one that it goes by. Raises PolicyError."""
    share: str = getattr(policy, "share")  # noqa: B009 - an option that not every policy has
    leader = list(range(layers))
    if share == "default":  # 0, 1 and the last two go by themselves
        for i in range(2, layers - 3, 2):
            leader[i + 1] = i
    elif share != "none":
        seen: set[int] = set()
        for group in share.split("/"):
            numbers = [int(text) if text.isdecimal() else -1 for text in group.split("-")]
            rising = len(numbers) > 1 and numbers == sorted(set(numbers))
            if not rising or not 0 <= numbers[0] <= numbers[-1] < layers or seen & set(numbers):
                pairs = f"layers 0 to {layers - 1}, rising and each once, as in 2-3/4-5"
                raise policy.fail("share", f"default, none, or {pairs}")
            seen |= set(numbers)
            for i in numbers:
                leader[i] = numbers[0]
    return leader
