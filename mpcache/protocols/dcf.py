"""Function secret sharing: distributed comparison functions, vectorised over AES in ECB.

Boyle, Chandran, Gilboa, Gupta, Ishai, Kumar, Rathee: Function Secret Sharing for Mixed-Mode and
Fixed-Point Secure Computation, EUROCRYPT 2021, figure 1. A key pair for (alpha, beta) lets the
parties turn a public x into additive shares of beta * [x < alpha], each alone, without a message.

One generalisation: with `start` > 0, x and alpha must first agree in their top `start` bits. The
tree then gives shares of beta * [top(x) = top(alpha)] and of beta * [top(x) = top(alpha) and
x < alpha]: the window of the exponential (mpcache.protocols.softmax).

The length-doubling generator is s -> AES_k(s ^ c) ^ s ^ c with a public key k, the session's and phase's
own (`runtime.rng.TreeCipher`), and a constant c for each output (Matyas-Meyer-Oseas; Guo, Katz, Wang, Yu,
S&P 2020 for its use in such trees).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpcache.runtime.program import Work
from mpcache.runtime.rng import TreeCipher

Words = npt.NDArray[np.uint64]

# Public constants: one tweak for each output of the generator.
_LEFT, _RIGHT, _VALUE, _LEAF, _WINDOW = (np.array([c, c << 32], dtype=np.uint64) for c in range(5))
_CHILDREN = np.stack([_LEFT, _RIGHT, _VALUE])
_ONE = np.uint64(1)
_BLOCK = 16  # bytes


Prg = Callable[[Words, Words], Words]


def _generator(cipher: TreeCipher | None) -> Prg:
    """Return the generator: blocks (..., 2) with tweaks that broadcast, to blocks of the same shape.

    Raises RuntimeError where no phase has begun.
    """
    if cipher is None:
        raise RuntimeError("key trees before begin")
    encrypt = cipher.encrypt

    def prg(s: Words, tweak: Words) -> Words:
        x = s ^ tweak
        return np.frombuffer(encrypt(x.tobytes()), dtype=np.uint64).reshape(x.shape) ^ x

    return prg


@dataclass(frozen=True)
class KeyShape:
    """Public shape of n keys.

    depth: bits of a point.  start: from which level on comparisons count.
    width: bytes of an output, whose shares add up modulo 2^(8 width).

    A block of the generator holds several outputs: the tree ends where one block has an output for each
    point below a node (early termination).
    """

    n: int
    depth: int
    start: int = 0
    width: int = 8

    @cached_property
    def tail(self) -> int:
        """Bits of a point that no level is for."""
        most = self.depth - (self.start + 1 if self.start else 1)
        return max(0, min((_BLOCK // self.width).bit_length() - 1, most))

    @cached_property
    def levels(self) -> int:
        return self.depth - self.tail

    @cached_property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(f"u{self.width}")

    def work(self, points: int = 1) -> Work:
        """Count the evaluation of all keys at so many points: a child and a value for each level."""
        return Work(comparisons=self.n, key_blocks=2 * self.n * self.levels * points)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return (self.n, 2)

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Correction words of the seeds, two per level."""
        return (self.n, 2 * self.levels)

    @cached_property
    def values(self) -> int:
        """Correction words of the outputs: one per counting level, a leaf's, the window's."""
        return self.levels - self.start + (1 << self.tail) + (self.start > 0)

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bytes: correction bits, both children's in one per level; then the words of the outputs."""
        return (self.n, self.levels + self.width * self.values)


def dcf_keygen(
    shape: KeyShape,
    cipher: TreeCipher | None,
    seeds: tuple[torch.Tensor, torch.Tensor],
    alpha: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate correction words and bytes (the same for both parties) from both parties' root seeds.

    alpha: (n,) in [0, 2^depth).  beta: (n,) integers.  seeds: two (n, 2) int64 tensors.
    """
    if cipher is not None and cipher.compiled is not None:
        return _generate(shape, *cipher.compiled, seeds, alpha, beta)
    n, depth, dtype, prg = shape.n, shape.depth, shape.dtype, _generator(cipher)
    a = alpha.numpy().astype(np.uint64)
    payload = beta.numpy().astype(dtype)
    s = np.stack([x.numpy().view(np.uint64) for x in seeds])  # (party, n, 2)
    s[..., 0] &= ~_ONE
    t = np.stack([np.zeros(n, dtype=np.uint64), np.ones(n, dtype=np.uint64)])
    words = np.empty(shape.words, dtype=np.uint64)
    bits = np.empty((n, shape.levels), dtype=np.uint8)
    values = np.empty((n, shape.values), dtype=dtype)
    running = np.zeros(n, dtype=dtype)  # V_alpha: the shares' sum along alpha's path so far
    column = 0
    for level in range(shape.levels):
        counts = level >= shape.start
        if level == shape.start and shape.start:
            # The node itself as a payload: beta where the top bits agree.
            node = prg(s, _WINDOW).view(dtype)[..., 0]
            values[:, -1] = _signed(t[1], payload - node[0] + node[1])
        bit = (a >> np.uint64(depth - 1 - level)) & _ONE
        right = bit.astype(bool)
        out = prg(s, _CHILDREN[: 2 + counts, None, None])  # (left, right, values; party; n; 2)
        control = out[:2, ..., 0] & _ONE
        out[:2, ..., 0] ^= control
        lose = np.where(right[:, None], out[0], out[1])
        seed_cw = lose[0] ^ lose[1]
        left_cw = control[0, 0] ^ control[0, 1] ^ bit ^ _ONE
        right_cw = control[1, 0] ^ control[1, 1] ^ bit
        words[:, 2 * level : 2 * level + 2] = seed_cw
        bits[:, level] = (left_cw | (right_cw << _ONE)).astype(np.uint8)
        if counts:
            # output 0 of the block is the left child's value, output 1 the right child's
            left, other = (out[2].view(dtype)[..., i] for i in (0, 1))
            v_lose, v_keep = np.where(right, left, other), np.where(right, other, left)
            value_cw = _signed(t[1], v_lose[1] - v_lose[0] - running + payload * bit.astype(dtype))
            running = running - v_keep[1] + v_keep[0] + _signed(t[1], value_cw)
            values[:, column] = value_cw
            column += 1
        s = np.where(right[:, None], out[1], out[0]) ^ (seed_cw * t[..., None])
        t = np.where(right, control[1], control[0]) ^ (t & np.where(right, right_cw, left_cw))
    # What is left of a point chooses an output of the leaf.
    size = 1 << shape.tail
    leaf = prg(s, _LEAF).view(dtype)[..., :size]
    last = a & np.uint64(size - 1)
    below = (np.arange(size, dtype=np.uint64) < last[:, None]).astype(dtype) * payload[:, None]
    values[:, column : column + size] = _signed(t[1][:, None], below - running[:, None] - leaf[0] + leaf[1])
    packed = np.concatenate([bits, values.view(np.uint8)], axis=1)
    return torch.from_numpy(words.view(np.int64)), torch.from_numpy(packed)


def dcf_eval(
    shape: KeyShape,
    cipher: TreeCipher | None,
    party: int,
    seeds: torch.Tensor,
    words: torch.Tensor,
    bits: torch.Tensor,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate shares at public points x (n, points) in [0, 2^depth): (window, below), each (n, points).

    below: beta * [tops agree and x < alpha].  window: beta * [tops agree] (with start = 0: zeros).
    """
    n, points = x.shape
    if x.is_meta:
        return torch.empty_like(x), torch.empty_like(x)
    if cipher is not None and cipher.compiled is not None:
        return _evaluate(shape, *cipher.compiled, party, seeds, words, bits, x)
    dtype, prg = shape.dtype, _generator(cipher)
    path = x.numpy().astype(np.uint64).reshape(-1)
    w, b, s = words.numpy().view(np.uint64), bits.numpy(), seeds.numpy().view(np.uint64)
    v = np.ascontiguousarray(b[:, shape.levels :]).view(dtype)
    if points > 1:
        w, b, s, v = (np.repeat(array, points, axis=0) for array in (w, b, s, v))
    s = s & np.array([~_ONE, ~np.uint64(0)])
    t = np.full(n * points, party, dtype=np.uint64)
    total = np.zeros(n * points, dtype=dtype)
    window = np.zeros(n * points, dtype=dtype)
    column = 0
    for level in range(shape.levels):
        counts = level >= shape.start
        if level == shape.start and shape.start:
            window = prg(s, _WINDOW).view(dtype)[:, 0] + t.astype(dtype) * v[:, -1]
        bit = (path >> np.uint64(shape.depth - 1 - level)) & _ONE
        side = bit.astype(np.intp)
        tweaks = (
            _CHILDREN[side] if not counts else np.stack([_CHILDREN[side], np.broadcast_to(_VALUE, s.shape)])
        )
        out = prg(s, tweaks)
        child = out[0] if counts else out
        control = child[:, 0] & _ONE
        child[:, 0] ^= control
        if counts:
            value = out[1].view(dtype)
            total += np.where(bit == 1, value[:, 1], value[:, 0]) + t.astype(dtype) * v[:, column]
            column += 1
        s = child ^ (w[:, 2 * level : 2 * level + 2] * t[:, None])
        t = control ^ (t & ((b[:, level].astype(np.uint64) >> bit) & _ONE))
    last = (path & np.uint64((1 << shape.tail) - 1)).astype(np.intp)[:, None]
    leaf = np.take_along_axis(prg(s, _LEAF).view(dtype), last, 1)[:, 0]
    total += leaf + t.astype(dtype) * np.take_along_axis(v, column + last, 1)[:, 0]
    if party == 1:
        total, window = -total, -window
    return _integers(window, n, points), _integers(total, n, points)


def _integers(x: npt.NDArray[np.unsignedinteger], n: int, points: int) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.uint64).view(np.int64)).reshape(n, points)


def _signed(negative: Words, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """x, negated where `negative` is 1."""
    return np.where(negative == 1, -x, x)


def _unsigned(x: torch.Tensor) -> Words:
    """Take int64 as unsigned words that follow each other."""
    return x.contiguous().numpy().view(np.uint64)


def _generate(
    shape: KeyShape,
    loops: ModuleType,
    rounds: Words,
    seeds: tuple[torch.Tensor, torch.Tensor],
    alpha: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dcf_keygen` as one compiled loop (`mpcache.runtime.tree_loops`)."""
    words = np.empty(shape.words, dtype=np.uint64)
    bits = np.empty((shape.n, shape.levels), dtype=np.uint8)
    values = np.empty((shape.n, shape.values), dtype=np.uint64)
    loops.generate_trees(
        shape.depth, shape.start, shape.levels, shape.tail, 8 * shape.width,
        *map(_unsigned, seeds), _unsigned(alpha), _unsigned(beta), rounds, words, bits, values,
    )  # fmt: skip
    packed = np.concatenate([bits, values.astype(shape.dtype).view(np.uint8)], axis=1)
    return torch.from_numpy(words.view(np.int64)), torch.from_numpy(packed)


def _evaluate(
    shape: KeyShape,
    loops: ModuleType,
    rounds: Words,
    party: int,
    seeds: torch.Tensor,
    words: torch.Tensor,
    bits: torch.Tensor,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dcf_eval` as one compiled loop (`mpcache.runtime.tree_loops`)."""
    values = np.ascontiguousarray(bits.numpy()[:, shape.levels :]).view(shape.dtype).astype(np.uint64)
    window, below = (np.empty(tuple(x.shape), dtype=np.uint64) for _ in range(2))
    loops.evaluate_trees(
        party, shape.depth, shape.start, shape.levels, shape.tail, 8 * shape.width, _unsigned(seeds),
        _unsigned(words), bits.contiguous().numpy(), values, _unsigned(x), rounds, window, below,
    )  # fmt: skip
    return torch.from_numpy(window.view(np.int64)), torch.from_numpy(below.view(np.int64))
