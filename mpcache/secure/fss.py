"""Function secret sharing: distributed comparison functions, vectorised over fixed-key AES.

Boyle, Chandran, Gilboa, Gupta, Ishai, Kumar, Rathee: Function Secret Sharing for Mixed-Mode and
Fixed-Point Secure Computation, EUROCRYPT 2021, figure 1. A key pair for (alpha, beta) lets the
parties turn a public x into additive shares of beta * [x < alpha], each alone, without a message.

One generalisation: with `start` > 0, x and alpha must first agree in their top `start` bits. The
tree then gives shares of beta * [top(x) = top(alpha)] and of beta * [top(x) = top(alpha) and
x < alpha]: the window of the exponential (mpcache.secure.softmax).

The length-doubling generator is s -> AES_k(s ^ c) ^ s ^ c with a public key k and a constant c for
each output (Matyas-Meyer-Oseas; Guo, Katz, Wang, Yu, S&P 2020 for its use in such trees).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

Words = npt.NDArray[np.uint64]

# Public constants: the first digits of pi as a key, and one tweak for each output of the generator.
_AES = Cipher(AES(bytes.fromhex("243f6a8885a308d313198a2e03707344")), ECB())
_LEFT, _RIGHT, _VALUE, _LEAF = (np.array([c, c << 32], dtype=np.uint64) for c in (0, 1, 2, 3))
_ONE = np.uint64(1)


def _prg(s: Words, tweak: Words) -> Words:
    """(N, 2) blocks to (N, 2) blocks."""
    x = s ^ tweak
    out = np.frombuffer(_AES.encryptor().update(x.tobytes()), dtype=np.uint64).reshape(x.shape)
    return out ^ x


def _child(s: Words, tweak: Words) -> tuple[Words, Words]:
    """A child's seed (lowest bit cleared) and its control bit."""
    block = _prg(s, tweak)
    bit = block[..., 0] & _ONE
    block[..., 0] ^= bit
    return block, bit


@dataclass(frozen=True)
class KeyShape:
    """Public shape of n keys: tree depth in bits, and from which level on comparisons count."""

    n: int
    depth: int
    start: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.n, 2)

    @property
    def words(self) -> tuple[int, ...]:
        """Correction words: 2 per level for seeds, one per counting level, leaf and window."""
        return (self.n, 2 * self.depth + (self.depth - self.start) + 1 + (self.start > 0))

    @property
    def bits(self) -> tuple[int, ...]:
        """Correction bits, both children's in one byte per level."""
        return (self.n, self.depth)


def generate(
    shape: KeyShape, seeds: tuple[torch.Tensor, torch.Tensor], alpha: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correction words and bits (the same for both parties) from both parties' root seeds.

    alpha: (n,) in [0, 2^depth).  beta: (n,) in Z_2^64.  seeds: two (n, 2) int64 tensors.
    """
    n, depth = shape.n, shape.depth
    a = alpha.numpy().astype(np.uint64)
    payload = beta.numpy().astype(np.uint64)
    s = [x.numpy().view(np.uint64).copy() for x in seeds]
    for x in s:
        x[:, 0] &= ~_ONE
    t = [np.zeros(n, dtype=np.uint64), np.ones(n, dtype=np.uint64)]
    words = np.empty(shape.words, dtype=np.uint64)
    bits = np.empty(shape.bits, dtype=np.uint8)
    running = np.zeros(n, dtype=np.uint64)  # V_alpha: the shares' sum along alpha's path so far
    window: Words | None = None
    column = 0
    for level in range(depth):
        if level == shape.start and shape.start:
            # The node itself as a payload: beta where the top bits agree.
            leaf = [_prg(x, _LEAF)[:, 0] for x in s]
            window = _signed(t[1], payload - leaf[0] + leaf[1])
        bit = (a >> np.uint64(depth - 1 - level)) & _ONE
        right = bit.astype(bool)
        left_children = [_child(x, _LEFT) for x in s]
        right_children = [_child(x, _RIGHT) for x in s]
        lose = [np.where(right[:, None], left_children[p][0], right_children[p][0]) for p in (0, 1)]
        keep = [np.where(right[:, None], right_children[p][0], left_children[p][0]) for p in (0, 1)]
        seed_cw = lose[0] ^ lose[1]
        left_cw = left_children[0][1] ^ left_children[1][1] ^ bit ^ _ONE
        right_cw = right_children[0][1] ^ right_children[1][1] ^ bit
        words[:, column], words[:, column + 1] = seed_cw[:, 0], seed_cw[:, 1]
        column += 2
        bits[:, level] = (left_cw | (right_cw << _ONE)).astype(np.uint8)
        if level >= shape.start:
            values = [_prg(x, _VALUE) for x in s]  # word 0: left child's value, word 1: right child's
            v_lose = [np.where(right, v[:, 0], v[:, 1]) for v in values]
            v_keep = [np.where(right, v[:, 1], v[:, 0]) for v in values]
            value_cw = _signed(t[1], v_lose[1] - v_lose[0] - running + payload * bit)
            running = running - v_keep[1] + v_keep[0] + _signed(t[1], value_cw)
            words[:, column] = value_cw
            column += 1
        keep_cw = np.where(right, right_cw, left_cw)
        for p in (0, 1):
            keep_bit = np.where(right, right_children[p][1], left_children[p][1])
            s[p] = keep[p] ^ (seed_cw * t[p][:, None])
            t[p] = keep_bit ^ (t[p] & keep_cw)
    leaf = [_prg(x, _LEAF)[:, 0] for x in s]
    words[:, column] = _signed(t[1], leaf[1] - leaf[0] - running)
    if window is not None:
        words[:, column + 1] = window
    return torch.from_numpy(words.view(np.int64)), torch.from_numpy(bits)


def evaluate(
    shape: KeyShape,
    party: int,
    seeds: torch.Tensor,
    words: torch.Tensor,
    bits: torch.Tensor,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares at public points x (n, points) in [0, 2^depth): (window, below), each (n, points).

    below: beta * [tops agree and x < alpha].  window: beta * [tops agree] (with start = 0: zeros).
    """
    n, points = x.shape
    if x.is_meta:
        return torch.empty_like(x), torch.empty_like(x)
    path = x.numpy().astype(np.uint64).reshape(-1)
    w = np.repeat(words.numpy().view(np.uint64), points, axis=0) if points > 1 else words.numpy().view(np.uint64)
    b = np.repeat(bits.numpy(), points, axis=0) if points > 1 else bits.numpy()
    s = np.repeat(seeds.numpy().view(np.uint64), points, axis=0)
    s[:, 0] &= ~_ONE
    t = np.full(n * points, party, dtype=np.uint64)
    total = np.zeros(n * points, dtype=np.uint64)
    window = np.zeros(n * points, dtype=np.uint64)
    column = 0
    tweaks = np.stack([_LEFT, _RIGHT])
    for level in range(shape.depth):
        if level == shape.start and shape.start:
            window = _prg(s, _LEAF)[:, 0] + t * w[:, -1]
        bit = ((path >> np.uint64(shape.depth - 1 - level)) & _ONE).astype(np.int64)
        seed_cw = w[:, column : column + 2]
        column += 2
        if level >= shape.start:
            value = _prg(s, _VALUE)
            total += np.where(bit == 1, value[:, 1], value[:, 0]) + t * w[:, column]
            column += 1
        child, control = _child(s, tweaks[bit])
        s = child ^ (seed_cw * t[:, None])
        t = control ^ (t & ((b[:, level].astype(np.uint64) >> bit.astype(np.uint64)) & _ONE))
    total += _prg(s, _LEAF)[:, 0] + t * w[:, column]
    if party == 1:
        total, window = -total, -window
    return (
        torch.from_numpy(window.view(np.int64)).reshape(n, points),
        torch.from_numpy(total.view(np.int64)).reshape(n, points),
    )


def _signed(negative: Words, x: Words) -> Words:
    """x, negated where `negative` is 1."""
    return np.where(negative == 1, -x, x)
