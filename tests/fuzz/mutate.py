"""Damaged copies of valid inputs: bytes flipped, cut, moved, repeated; values replaced by extreme ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

NUMBERS = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff" * 8,
    b"\x00" * 7 + b"\x01", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x80" * 12,  # a varint without end
    b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"1" + b"0" * 12, b"NaN",
    b"{", b"[", b"}", b'"', b"\\", b"\n", b"\t", b"\x1b[2J", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"*a", b"&a", b"!!python/object:os.system", b"%s%n", b"../" * 9, b"2001-13-45",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30, -(2**63), 0.5,
    1e308, 1e-320, float("inf"), float("nan"), "", "x", "\x00", "\x1b[31m", "a\nb", "\ud800", "\U0010ffff",
    "9" * 40, "x" * 3000, [], {}, [[]], [0] * 50, ["x"] * 9, {"": None}, {"x": {"x": {}}}, [[[[[[[[[]]]]]]]]],
)  # fmt: skip
LARGEST = 1 << 16  # bytes of a case


def damaged(rng: random.Random, seed: bytes, others: Sequence[bytes]) -> bytes:
    """One to eight mutations of `seed`, now and then with a piece of one of `others`."""
    data = bytearray(seed)
    for _ in range(1 + min(7, int(rng.expovariate(0.7)))):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + 1 + int(rng.expovariate(0.1)))
        match rng.randrange(10):
            case 0 if data:
                data[min(i, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                data[i:i] = rng.randbytes(1 + int(rng.expovariate(0.2)))
            case 2:
                del data[i:j]
            case 3:
                data[i:] = b""
            case 4:
                data[i:j] = rng.choice(NUMBERS)
            case 5:
                data[i:i] = rng.choice(NUMBERS)
            case 6:
                piece, k = data[i:j], rng.randrange(len(data) + 1)
                data[k:k] = piece
            case 7:
                data[i:i] = bytes(data[i:j]) * rng.choice((2, 10, 100))
            case 8:
                other = rng.choice(others)
                k = rng.randrange(len(other) + 1)
                data[i:j] = other[k : k + 40]
            case _ if data:
                data[min(i, len(data) - 1)] = rng.randrange(256)
        del data[LARGEST:]
    return bytes(data)


def replaced(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON value with one to three of its values replaced, moved, added or left out."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1:
                other, its = rng.choice(places)
                if its in other if isinstance(other, dict) else its < len(other):
                    holder[key] = json.loads(json.dumps(other[its]))
            case 2 if isinstance(holder, dict):
                holder[rng.choice((*map(str, VALUES), str(key) + "x"))] = copy.deepcopy(rng.choice(VALUES))
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _places(tree: Any) -> Any:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])
