"""What must be equal at both computing parties while all values stay in their ranges.

A check is a number in shares that is zero if a value was in range. Both shares then follow from each other,
and each party takes note of its own side of that: two strings that are equal, or differ. Each hashes its
string as it comes, which costs no message; `mpcache.protocols.verdict` compares the two hashes in secret.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

BYTES = 8  # of a digest: strings that differ have the same one with probability 2^-64


class Guard:
    """One party's string, hashed."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=BYTES)

    def __deepcopy__(self, memo: object) -> Guard:
        """Stay the party's one: a copy of what notes here notes here, too."""
        return self

    def note(self, data: npt.NDArray[Any]) -> None:
        """Append numbers: what the other party has, too, if all is well."""
        self._hash.update(np.ascontiguousarray(data).data)

    def close(self) -> torch.Tensor:
        """Return the digest (1,) int64 of what was noted since the last one."""
        digest = int.from_bytes(self._hash.digest(), "little", signed=True)
        self._hash = blake2b(digest_size=BYTES)
        return torch.tensor([digest])
