"""Is it uniform? Can a secret be predicted from it? Fixed thresholds, a chance of error below 1e-6 each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]

SIGMAS = 6.5  # of bit means and of the byte histogram
KOLMOGOROV = 3.2  # D sqrt(n); 2 exp(-2 * 3.2^2) = 3e-9
CANDIDATES = 6  # bits that a classifier is trained on, per class
CHUNK = 1 << 16  # bytes of a row that are looked at together


@dataclass(frozen=True)
class Uniformity:
    """How far from uniform. bits, histogram: in standard deviations.  distance: D sqrt(n) of
    Kolmogorov and Smirnov's test."""

    bits: float
    histogram: float
    distance: float

    @property
    def fine(self) -> bool:
        return self.bits < SIGMAS and self.histogram < SIGMAS and self.distance < KOLMOGOROV


def uniformity(values: Bytes) -> Uniformity:
    """Of (n, width) bytes, little-endian numbers below 2^(8 width). Needs a few hundred."""
    n, width = values.shape
    bits = np.unpackbits(values, axis=1).mean(0)
    data = values.ravel()
    histogram = 0.0
    if len(data) >= 5 * 256:
        expected = len(data) / 256
        chi = ((np.bincount(data, minlength=256) - expected) ** 2 / expected).sum()
        histogram = (chi - 255) / math.sqrt(2 * 255)
    # The three top bytes say it all to a test of some 10^6 numbers; a byte alone gets a random fraction.
    scaled = np.random.default_rng(0).random(n)
    for column in range(max(0, width - 3), width):
        scaled = (scaled + values[:, column]) / 256
    scaled.sort()
    steps = np.arange(1, n + 1) / n
    distance = max((steps - scaled).max(), (scaled - steps + 1 / n).max())
    return Uniformity(float(abs(bits - 0.5).max() * 2 * math.sqrt(n)), histogram, distance * math.sqrt(n))


def worst_of_ring(values: Bytes, ring: int) -> float:
    """Return the largest deviation of (n, width) bytes as numbers of `ring` bits: what is above is no matter.

    In standard deviations: of the mean of each bit, of the whole bytes, and of what the last byte has.
    """
    bits = np.unpackbits(values, axis=1, bitorder="little")[:, :ring]
    worst = [float(abs(bits.mean(0) - 0.5).max() * 2 * math.sqrt(len(values)))]
    whole, rest = divmod(ring, 8)
    pieces: list[tuple[Any, int]] = [(values[:, :whole].ravel(), 8)]
    if rest:
        pieces.append((values[:, whole] & ((1 << rest) - 1), rest))
    for data, size in pieces:
        if size > 2 and len(data) >= 5 << size:
            expected, free = len(data) / (1 << size), (1 << size) - 1
            chi = ((np.bincount(data, minlength=1 << size) - expected) ** 2 / expected).sum()
            # Wilson and Hilferty: normal for few degrees of freedom, too
            worst.append(float(((chi / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free))))
    return max(worst)


def largest_deviation(data: Bytes) -> float:
    """Return the largest deviation, in standard deviations, of bit means and of the byte histogram."""
    bits = np.unpackbits(data.reshape(-1, 1), axis=1).mean(0)
    worst_bit = abs(bits - 0.5).max() * 2 * len(data) ** 0.5
    expected = len(data) / 256
    chi = ((np.bincount(data, minlength=256) - expected) ** 2 / expected).sum()
    return float(max(worst_bit, (chi - 255) / (2 * 255) ** 0.5))


def above_chance(n: int, classes: int, sigmas: float = 5.0) -> float:
    """Correct ones of n that guessing exceeds twice in a million at most: mean and 5 standard deviations."""
    p = 1 / classes
    return n * p + sigmas * math.sqrt(n * p * (1 - p))


def predicted(rows: Bytes, labels: Labels, train: int) -> int:
    """Correct predictions for rows[train:] by a classifier that learned from rows[:train].

    The bits that go with a class most clearly in the training rows, then logistic regression on them:
    one telling bit among millions is found.
    """
    classes = int(labels.max()) + 1
    centred = np.eye(classes)[labels[:train]]
    centred = (centred - centred.mean(0)).astype(np.float32)
    found: list[tuple[float, int]] = []
    for start in range(0, rows.shape[1], CHUNK):
        bits = np.unpackbits(rows[:train, start : start + CHUNK], axis=1).astype(np.float32)
        spread = bits.std(0) + 1e-9
        strength = abs(centred.T @ bits) / spread  # (classes, bits)
        for row in strength:
            best = np.argpartition(-row, min(CANDIDATES, len(row) - 1))[:CANDIDATES]
            found += [(float(row[i]), 8 * start + int(i)) for i in best]
    picked = np.array(sorted({place for _, place in sorted(found, reverse=True)[: CANDIDATES * classes]}))
    if not len(picked):
        return int((labels[train:] == np.bincount(labels[:train]).argmax()).sum())
    chosen = (rows[:, picked // 8] >> (7 - picked % 8)) & 1
    return _logistic(chosen.astype(np.float32), labels, train)


def _logistic(x: np.ndarray[Any, Any], labels: Labels, train: int) -> int:
    torch.manual_seed(0)
    features, wanted = torch.from_numpy(2 * x - 1), torch.from_numpy(labels)
    net = torch.nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.05, weight_decay=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(features[:train]), wanted[:train])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return int((net(features[train:]).argmax(-1) == wanted[train:]).sum())
