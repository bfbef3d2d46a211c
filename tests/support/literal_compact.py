"""What `compact` keeps, read literally: loops over lists of floats, nothing shared with the code."""

from __future__ import annotations

import math

from tests.support.literal_clusters import Vector, dot


def repeated(
    queries: list[list[Vector]], keys: list[list[Vector]], first: int, count: int, group: int,
    rows: list[float], columns: list[list[float]],
) -> tuple[list[list[float]], list[list[int]]]:  # fmt: skip
    """queries[head][i], the last of keys[kv] their own. By KV head: the most of each token, and whose."""
    best, whose = [], []
    for kv, mine in enumerate(keys):
        most, who = [-1.0] * count, [0] * count
        before = len(mine) - len(queries[0])
        for j in range(group):
            head = kv * group + j
            for i, q in enumerate(queries[head]):
                scores = [dot(q, k) for k in mine[: before + i + 1]]
                top = max(scores)
                total = sum(math.exp(s - top) for s in scores)
                for t in range(count):
                    seen = math.exp(scores[first + t] - top) / total if first + t < len(scores) else 0.0
                    value = seen * rows[i] * columns[head][t]
                    if value > most[t]:
                        most[t], who[t] = value, j * len(queries[head]) + i
        best.append(most)
        whose.append(who)
    return best, whose


def best_positions(scores: list[float], n: int, sink: int, recent: int) -> list[int]:
    """The n positions with the highest scores, first and last ones first; ascending."""
    forced = [math.inf if t < sink or t >= len(scores) - recent else s for t, s in enumerate(scores)]
    return sorted(sorted(range(len(scores)), key=lambda t: (-forced[t], t))[:n])


def joint_counts(scores: list[list[float]], budget: int, own: int) -> list[int]:
    """Of all heads together the best, each head's own best ones first. scores[head][t]."""
    ranked = []
    for head, mine in enumerate(scores):
        order = sorted(range(len(mine)), key=lambda t: (-mine[t], t))
        ranked += [(-math.inf if place < own else -mine[t], head, place) for place, t in enumerate(order)]
    counts = [0] * len(scores)
    for _, head, _ in sorted(ranked)[: budget * len(scores)]:
        counts[head] += 1
    return counts


def dealt(levels: list[float], errors: list[list[float]], ratio: float) -> list[float]:
    """Deal shares in small steps, each to the head whose hull falls the most there. errors[head][level]."""
    steps = 2000

    def hull(curve: list[float], x: float) -> float:
        """The lower convex hull at x: the least of all chords over it."""
        least = math.inf
        for i, a in enumerate(levels):
            for j in range(i, len(levels)):
                b = levels[j]
                if a <= x <= b:
                    part = 0.0 if a == b else (x - a) / (b - a)
                    least = min(least, curve[i] + part * (curve[j] - curve[i]))
        return least

    shares = [0] * len(errors)
    for _ in range(round(ratio * len(errors) * steps)):
        falls = [
            hull(curve, n / steps) - hull(curve, (n + 1) / steps) if n < steps else -math.inf
            for curve, n in zip(errors, shares, strict=True)
        ]
        shares[falls.index(max(falls))] += 1
    return [n / steps for n in shares]
