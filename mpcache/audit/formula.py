"""Formulas of sizes, found by reading the same program at several sizes.

A size that a program asks for (a dimension of what it opens, a number of key trees) is a list of
numbers, one per reading. `Names.of` finds the expression in the readings' own symbols that gives all of
them: a symbol, a product, a sum with whole coefficients, a number of pairs, or the power of two that
ranks are taken modulo. There is no second description of a protocol that could drift from the code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

from mpcache.argmax import GROUP
from mpcache.protocols.topk import size_for
from mpcache.runtime.side import bytes_for

Vector = tuple[int, ...]
PARTS = (2, 4, 8, 16, 32)  # that a size may be divided into
LARGEST_COEFFICIENT = 64  # of a coefficient or a summand: a larger one would be a coincidence


class Names:
    """Expressions for sizes. symbols: each name's value at every reading; the first of equals is used."""

    def __init__(self, symbols: Mapping[str, Vector]) -> None:
        self.symbols: dict[str, Vector] = {}
        for name, values in symbols.items():
            if len(set(values)) > 1 and values not in self.symbols.values():
                self.symbols[name] = values
        self.found: dict[Vector, str | None] = {}

    def of(self, values: Vector) -> str | None:
        """Find an expression that `evaluate_formula` takes; None where none was found."""
        if values not in self.found:
            self.found[values] = None  # while it is looked for
            self.found[values] = self._search(values)
        return self.found[values]

    def _search(self, values: Vector) -> str | None:
        if len(set(values)) == 1:
            return str(values[0])
        for name, mine in self.symbols.items():
            if mine == values:
                return name
        for name, mine in self.symbols.items():
            for function in (groups, eighths):
                if tuple(map(function, mine)) == values:
                    return f"{function.__name__}({name})"
            for parts in PARTS:
                if tuple(parts * value for value in values) == mine:
                    return f"{name}//{parts}"
        # Before products: over a few sizes it is 32 times a number of groups, too.
        if (found := self._of_another(values, (modulus,))) is not None:
            return found
        if (found := self._linear(values, 1) or self._pairs(values)) is not None:
            return found
        for name, mine in self.symbols.items():
            if all(v % s == 0 for v, s in zip(values, mine, strict=True)):
                rest = self.of(tuple(v // s for v, s in zip(values, mine, strict=True)))
                if rest is not None:
                    return f"{name}*{_bracket(rest)}"
        if (common := math.gcd(*values)) > 1 and (rest := self.of(tuple(v // common for v in values))):
            return f"{common}*{_bracket(rest)}"
        for terms in (2, 3):
            if (sum_of := self._linear(values, terms)) is not None:
                return sum_of
        return self._of_another(values, (rank_bytes, count_bytes, eighths))

    def _linear(self, values: Vector, terms: int) -> str | None:
        """Find a + b s + c t + ... with whole coefficients."""
        if len(values) < terms + 3:  # two more equations than unknowns
            return None
        for names in combinations(self.symbols, terms):
            columns = [(1,) * len(values), *(self.symbols[name] for name in names)]
            solved = solve(columns, values) if nearly_solved(columns, values) else None
            if solved is None or any(c.denominator > 1 or abs(c) > LARGEST_COEFFICIENT for c in solved):
                continue
            if all(solved[1:]):
                return _sum(int(solved[0]), list(zip(map(int, solved[1:]), names, strict=True)))
        return None

    def _pairs(self, values: Vector) -> str | None:
        roots = tuple((1 + math.isqrt(1 + 8 * v)) // 2 for v in values)
        if tuple(map(pairs, roots)) != values:
            return None
        n = self.of(roots)
        return None if n is None else f"pairs({n})"

    def _of_another(self, values: Vector, functions: Sequence[Callable[[int], int]]) -> str | None:
        """Find one of these functions of a size that was named before."""
        for mine, name in list(self.found.items()):
            for function in functions:
                if name is not None and tuple(map(function, mine)) == values:
                    return f"{function.__name__}({name})"
        return None


def pairs(n: int) -> int:
    """Count the comparisons of n items, each with each."""
    return n * (n - 1) // 2


def groups(n: int) -> int:
    """Count the groups of n items, the last of which may overlap the one before."""
    return -(-n // GROUP)


def eighths(n: int) -> int:
    """Count the words that n numbers fill, eight to a word."""
    return -(-n // 8)


def modulus(n: int) -> int:
    """Return the power of two that ranks of n items are opened modulo."""
    return size_for(n)


def rank_bytes(n: int) -> int:
    """Count the bytes of a rank of n items, as it is opened."""
    return bytes_for(modulus(n).bit_length() - 1)


def count_bytes(n: int) -> int:
    """Count the bytes of a count of up to n items, with its sign."""
    return bytes_for(1 + n.bit_length())


def nearly_solved(columns: Sequence[Sequence[int]], values: Sequence[int]) -> bool:
    """Tell whether `solve` may find something, in a hundredth of its time."""
    a, b = np.array(columns, float).T, np.array(values, float)
    off = a @ np.linalg.lstsq(a, b, rcond=None)[0] - b
    return bool(abs(off).max() <= 1e-6 * abs(b).max())


def solve(columns: Sequence[Sequence[int]], values: Sequence[int]) -> list[Fraction] | None:
    """Solve sum_j x_j columns[j] = values exactly; None where there is no solution, or more than one."""
    n = len(columns)
    rows = [[Fraction(c[i]) for c in columns] + [Fraction(values[i])] for i in range(len(values))]
    for j in range(n):
        pivot = next((i for i in range(j, len(rows)) if rows[i][j]), None)
        if pivot is None:
            return None
        rows[j], rows[pivot] = rows[pivot], rows[j]
        rows[j] = [x / rows[j][j] for x in rows[j]]
        for i in range(len(rows)):
            if i != j and rows[i][j]:
                rows[i] = [a - rows[i][j] * b for a, b in zip(rows[i], rows[j], strict=True)]
    return [rows[j][n] for j in range(n)] if not any(row[n] for row in rows[n:]) else None


def _sum(constant: int, terms: Sequence[tuple[int, str]]) -> str:
    parts = [f"{'-' if c < 0 else '+'} {'' if abs(c) == 1 else f'{abs(c)}*'}{name}" for c, name in terms]
    parts.sort(key=lambda part: part.startswith("-"))  # a sum does not begin with a minus
    if constant:
        parts.append(f"{'-' if constant < 0 else '+'} {abs(constant)}")
    return " ".join(parts).removeprefix("+ ")


def _bracket(text: str) -> str:
    return f"({text})" if len(list(_pieces(text, " "))) > 1 else text


def _pieces(text: str, mark: str) -> Iterator[str]:
    """Text between marks that stand outside of brackets."""
    depth, piece = 0, ""
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == mark and depth == 0:
            yield piece
            piece = ""
        else:
            piece += character
    yield piece


def _atoms(factors: Iterable[str]) -> tuple[int, list[str]]:
    """Split a product into its number and its other factors; KV heads times a group's heads are the heads."""
    number, names = 1, []
    for factor in factors:
        for atom in _pieces(_bracket(factor), "*"):
            if atom.isdigit():
                number *= int(atom)
            else:
                names.append(atom)
    if "KV" in names and "g" in names:
        names[names.index("KV")] = "H"
        names.remove("g")
    return number, names


def total(products: Iterable[Sequence[str]]) -> str:
    """Write a sum of products, with those of the same names added up: 3 * KV * g -> `3*H`."""
    by_names: dict[tuple[str, ...], int] = defaultdict(int)
    for factors in products:
        number, names = _atoms(factors)
        by_names[tuple(sorted(names, key=len))] += number
    terms = ("*".join([str(n)] * (n != 1 or not names) + list(names)) for names, n in by_names.items() if n)
    return " + ".join(terms) or "0"


def evaluate_formula(expression: str, sizes: Mapping[str, int]) -> int:
    """Compute what an expression gives; the expression comes from this module, never from outside."""
    functions = (pairs, groups, eighths, modulus, rank_bytes, count_bytes)
    known: dict[str, Any] = {"__builtins__": {}, **{function.__name__: function for function in functions}}
    return int(eval(expression, known, dict(sizes)))  # noqa: S307
