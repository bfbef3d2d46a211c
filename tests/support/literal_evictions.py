"""Policies that evict a document's tokens, read literally: loops over lists of floats.

Written from the papers' descriptions; nothing is shared with the code. Keys are keys[kv][t], queries
queries[head][i] of the last tokens; what comes out are positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = list[float]
INFINITE = math.inf


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(scores: list[float]) -> list[float]:
    e = [math.exp(s - max(scores)) for s in scores]
    return [x / sum(e) for x in e]


def highest(worth: Sequence[float], n: int) -> list[int]:
    """The places of the n highest, ascending; of equal ones the earlier."""
    return sorted(sorted(range(len(worth)), key=lambda t: (-worth[t], t))[:n])


def pooled(scores: list[float], pool: int) -> list[float]:
    """Means over `pool` neighbours, with zeros beyond the ends."""
    half = pool // 2
    padded = [0.0] * half + scores + [0.0] * half
    return [sum(padded[t : t + pool]) / pool for t in range(len(scores))]


def windowkv(
    queries: list[list[Vector]], keys: list[list[Vector]], kept: int, suffix: int, size: int, largest: bool
) -> list[int]:
    n, group = len(keys[0]), len(queries) // len(keys)
    votes = [0.0] * n
    for head, rows in enumerate(queries):
        for i, q in enumerate(rows):
            seen = n - len(rows) + i + 1
            for t, p in enumerate(softmax([dot(q, k) for k in keys[head // group][:seen]])):
                votes[t] += p / len(queries)
    last = min(suffix, kept)
    windows = [list(range(w * size, (w + 1) * size)) for w in range((n - last) // size)]

    def worth(window: list[int]) -> float:
        here = sorted((votes[t] for t in window), reverse=True)
        return sum(here[:4]) / min(4, size) if largest else sum(here) / size

    best = highest([worth(window) for window in windows], (kept - last) // size)
    stay = {t for w in best for t in windows[w]} | set(range(n - last, n))
    for t in reversed(range(n)):
        if len(stay) < kept:
            stay.add(t)
    return sorted(stay)


def sepllm(ids: Sequence[int], separators: set[int], initial: int, kept: int, recent: int) -> list[int]:
    n = len(ids)
    stay = [t for t in range(n) if t < initial or t >= n - min(recent, kept)][:]
    stay = stay if len(stay) <= kept else highest([1.0 if t in stay else 0.0 for t in range(n)], kept)
    others = [t for t in reversed(range(n)) if t not in stay]
    others = [t for t in others if ids[t] in separators] + [t for t in others if ids[t] not in separators]
    return sorted(stay + others[: kept - len(stay)])


def promptdistill(queries: list[Vector], keys: list[list[Vector]], kept: int, pool: int) -> list[int]:
    group, n = len(queries) // len(keys), len(keys[0])
    scores = [
        sum(dot(q, keys[h // group][t]) for h, q in enumerate(queries)) / len(queries) for t in range(n)
    ]
    worth = pooled(scores, pool)
    worth[-1] = INFINITE
    return highest(worth, kept)


def topv(source: list[Vector], target: list[Vector], far: float) -> list[float]:
    """The mass that leaves each source, after three rounds."""
    n = len(source)
    apart = [[dot([x - y for x, y in zip(s, t, strict=True)], [x - y for x, y in zip(s, t, strict=True)])
              for t in target] for s in source]  # fmt: skip
    mean = max(1e-9, sum(map(sum, apart)) / n**2)
    wide = max(1.0, n / 8)
    cost = [[apart[i][j] / mean + far * (1 - math.exp(-(((i - j) / wide) ** 2) / 2)) for j in range(n)]
            for i in range(n)]  # fmt: skip
    plan = [[math.exp(-(c - min(row)) / 0.1) for c in row] for row in cost]
    for _ in range(3):
        plan = [[x / sum(row) for x in row] for row in plan]
        columns = [sum(row[j] for row in plan) for j in range(n)]
        plan = [[x / columns[j] for j, x in enumerate(row)] for row in plan]
    return [sum(row) for row in plan]


def recovered(worth: list[float], kept: int, share: float, ends: int) -> list[int]:
    """The best, and some of the others, evenly spread."""
    n = len(worth)
    worth = [INFINITE if t < ends or t >= n - ends else w for t, w in enumerate(worth)]
    again = min(int(share * kept), n - kept)
    best = highest(worth, kept - again)
    others = [t for t in range(n) if t not in best]
    return sorted(best + [others[(2 * i + 1) * len(others) // (2 * again)] for i in range(again)])


def keyformer(queries: list[list[Vector]], keys: list[list[Vector]], noise: list[Vector], kept: int,
              recent: int, kv: int) -> list[int]:  # fmt: skip
    """What a KV head keeps of a context, with noise[kv][t]."""
    n, group = len(keys[0]), len(queries) // len(keys)
    paid = [0.0] * n
    for head in range(kv * group, (kv + 1) * group):
        for i, q in enumerate(queries[head]):
            scores = [dot(q, keys[kv][t]) + noise[kv][t] for t in range(i + 1)]
            for t, p in enumerate(softmax(scores)):
                paid[t] += p
    return highest([INFINITE if t >= n - recent else p for t, p in enumerate(paid)], kept)


def cascade(paid: list[float], sink: int, places: list[int], duel: bool) -> list[int]:
    """What is left of a context whose tokens come one after another: tiers from the first to the last."""
    n = len(paid)
    tiers: list[list[int]] = [[] for _ in places]
    arrived = [0] * len(places)
    for t in range(min(sink, n), n):
        coming: int | None = t
        for i, most in enumerate(places):
            assert coming is not None
            if i:
                arrived[i] += 1
                if arrived[i] % 2 == 0:
                    if duel and tiers[i] and paid[coming] >= paid[tiers[i][-1]]:
                        tiers[i][-1] = coming
                    coming = None
                    break
            tiers[i].append(coming)
            coming = tiers[i].pop(0) if len(tiers[i]) > most else None
            if coming is None:
                break
    return [*range(min(sink, n)), *(t for tier in reversed(tiers) for t in tier)]


def outliers(keys: list[Vector], size: int, clusters: int) -> list[float]:
    """For each chunk of one KV head: the smallest cosine of a key with the chunk's mean, negative."""
    found = []
    for c in range(clusters):
        members = keys[c * size : (c + 1) * size]
        mean = [sum(column) / size for column in zip(*members, strict=True)]
        found.append(-min(dot(k, mean) / math.sqrt(dot(k, k) * dot(mean, mean)) for k in members))
    return found


def fronted(worth: list[float], size: int, picked: int, n: int) -> list[int]:
    """All positions, those of the picked chunks first."""
    first = highest(worth, picked)
    order = first + [c for c in range(len(worth)) if c not in first]
    return [c * size + i for c in order for i in range(size)] + list(range(len(worth) * size, n))


def pact(
    keys: list[Vector],
    values: list[Vector],
    worth: list[float],
    spared: int,
    centres: int,
    reach: float,
    ends: int,
) -> tuple[list[int], list[Vector], list[float]]:
    """Centres of one KV head, with the mean values and the sizes of their clusters."""
    n = len(keys)
    alone = {t for t in range(n) if t < ends or t >= n - ends}
    important = set(highest([INFINITE if t in alone else w for t, w in enumerate(worth)], spared))
    apart = [[1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for b in keys] for a in keys]
    density = [sum(math.exp(-((apart[i][j] / 2) ** 2)) for j in important) for i in range(n)]
    far = []
    for i in range(n):
        denser = [j for j in important if (density[j], -j) > (density[i], -i)]
        far.append(INFINITE if i in alone or not denser else min(apart[i][j] for j in denser))
        far[-1] = far[-1] if i in important or i in alone else -1.0
    picked = highest(far, centres)
    members: dict[int, list[int]] = {c: [c] for c in picked}
    for i in range(n):
        nearest = min(picked, key=lambda c: apart[i][c])
        near = i in important or apart[i][nearest] <= reach
        if i not in members and i not in alone and nearest not in alone and near:
            members[nearest].append(i)
    means = [
        [sum(values[i][d] for i in members[c]) / len(members[c]) for d in range(len(values[0]))]
        for c in picked
    ]
    return picked, means, [float(len(members[c])) for c in picked]
