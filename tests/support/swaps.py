"""What a party receives in its rounds: the tensors' bytes, without what aligns them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpcache.transport.link import Layout

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def pieces(data: bytes | bytearray, layout: Layout) -> list[Bytes]:
    """Cut what `Link.swap` returned."""
    whole = np.frombuffer(bytes(data), np.uint8)
    return [whole[start : start + size] for start, size in zip(layout.starts, layout.sizes, strict=True)]
