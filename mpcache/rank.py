"""The three parties and their numbers (docs/threat-model.md says what each one learns)."""

from __future__ import annotations

from enum import IntEnum


class Rank(IntEnum):
    """0 and 1 compute on shares; 2 only hands out correlated randomness."""

    SERVER = 0
    CLIENT = 1
    DEALER = 2

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def peer(self) -> Rank:
        """The other computing party."""
        if self is Rank.DEALER:
            raise ValueError("the dealer has no computing peer")
        return Rank.CLIENT if self is Rank.SERVER else Rank.SERVER
