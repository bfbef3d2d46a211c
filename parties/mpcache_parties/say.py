"""Name how a party's code tells people what it does: one line of text at a time."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def quiet(text: str) -> None:
    """Say nothing."""
