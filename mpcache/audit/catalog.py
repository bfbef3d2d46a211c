"""The protocols by the correlated randomness that they draw: what each is, where, and from whom.

`mpcache audit --explain` prints these words, and docs/protocols.md is made of them (tools/docs.py).
Rounds and bytes are not here: they are read from the programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpcache.runtime.program import RequestKind


@dataclass(frozen=True)
class ProtocolEntry:
    """One protocol in words.

    says: in a few words.  code: the function that is its definition, under mpcache.protocols.  error: its
    bound.  source: the paper, or what it follows from.
    """

    says: str
    code: str
    error: str
    source: str

    def __str__(self) -> str:
        return f"{self.says} ({self.source})" if self.source else self.says


CATALOG: Mapping[RequestKind, ProtocolEntry] = {
    RequestKind.MASK: ProtocolEntry(
        "a permanent mask: opened once as W - B, used again and again", "linear.mask_operand", "exact", ""
    ),
    RequestKind.MASKED_OPERAND: ProtocolEntry(
        "product with a masked operand: only the activation is opened", "linear.matmul_masked_operand",
        "exact modulo the ring", "masks kept for weights and cache",
    ),
    RequestKind.TRUNCATION: ProtocolEntry(
        "exact truncation", "linear.truncate", "floor + {0, 1} units, never a wrap, for x below 2^(R-2)",
        "Escudero et al., eprint 2020/338",
    ),
    RequestKind.TRUNCATION_PRODUCT: ProtocolEntry(
        "exact truncation fused with a product", "linear.truncate_to_scale", "as the truncation",
        "Escudero et al., eprint 2020/338",
    ),
    RequestKind.TRUNCATIONS_PRODUCT: ProtocolEntry(
        "product of two values that the same opening truncates", "linear.truncate_product",
        "as the truncations", "Escudero et al., eprint 2020/338",
    ),
    RequestKind.LINE: ProtocolEntry(
        "reciprocal or inverse root: a line for each interval, by a rotated one-hot vector",
        "reciprocal.power", "2e-4, 3e-5 relative", "exponent and multiple from one opening, then lines",
    ),
    RequestKind.VERDICT: ProtocolEntry(
        "whether all values were in range, for the client alone", "verdict.start_verdict",
        "misses with 2^-63", "a digest of each party's side of all checks, compared under a random factor",
    ),
    RequestKind.BLUR: ProtocolEntry(
        "noise of the other party's on what one party learns", "linear.blur", "2^-9 standard deviation",
        "so that a secret factor's step does not show",
    ),
    RequestKind.COMPARE: ProtocolEntry(
        "comparison by a key tree", "compare.less", "exact", "Boyle et al., EUROCRYPT 2021"
    ),
    RequestKind.TOPK: ProtocolEntry(
        "oblivious top-k with one-hot slots: all pairs by key trees, then rotated ranks", "topk.topk",
        "ties to the lower index", "all pairs on one opening; Boyle et al., EUROCRYPT 2021",
    ),
    RequestKind.TOPK_DIGITS: ProtocolEntry(
        "oblivious top-k with one-hot slots: all pairs by the masks' digits, then rotated ranks",
        "topk.topk", "ties to the lower index",
        "all pairs on one opening; one-time truth tables, Ishai et al., TCC 2013",
    ),
    RequestKind.SCATTER: ProtocolEntry(
        "weights put back through the selection", "topk.HotSelection.scatter", "exact",
        "masks rotated with the slots",
    ),
    RequestKind.SHUFFLE: ProtocolEntry(
        "rows shuffled by a permutation that one party alone knows", "compaction.shuffle", "exact",
        "Chase et al., ASIACRYPT 2020",
    ),
    RequestKind.ONE_HOT: ProtocolEntry(
        "table lookup by a rotated one-hot vector", "lookup.lookup", "exact", "rotation"
    ),
    RequestKind.EXP: ProtocolEntry(
        "exponential by one key tree per element", "softmax.exp",
        "1.8e-4 relative and 1.2e-7, zero below e^-18.3 to e^-20.6", "one key tree with a payload",
    ),
    RequestKind.HIGHEST: ProtocolEntry(
        "the highest bucket of a row by XOR one-hots and random sums", "coins.Highest",
        "its number or one more, but for a row in 2^32", "40 public coins for each score; one-time truth "
        "tables, Ishai et al., TCC 2013",
    ),
    RequestKind.EXP_DIGITS: ProtocolEntry(
        "exponential by tables of the mask's digits", "exp_digits.ExpDigits",
        "1.8e-4 relative and 1.2e-7, zero below e^-18.3 to e^-20.6",
        "one-time truth tables, Ishai et al., TCC 2013",
    ),
    RequestKind.ACTIVATION: ProtocolEntry(
        "activation as a sum of sines, with its truncation", "activation.activate", "1.5e-4 abs(x up)",
        "sines of the opened value",
    ),
    RequestKind.NORM: ProtocolEntry(
        "the residual connection's sum and its squares, from one opening", "norm.norm_linear", "exact",
        "masks kept for the stream",
    ),
    RequestKind.SQUARE: ProtocolEntry("squares", "stock", "exact modulo the ring", "Beaver, CRYPTO 1991"),
    RequestKind.TRIPLE_MUL: ProtocolEntry(
        "elementwise products", "linear.product", "exact modulo the ring", "Beaver, CRYPTO 1991"
    ),
    RequestKind.TRIPLE_MATMUL: ProtocolEntry(
        "matrix product", "linear.product", "exact modulo the ring", "Beaver, CRYPTO 1991"
    ),
    RequestKind.AND: ProtocolEntry("bitwise products of XOR shares", "stock", "exact", "CrypTen"),
    RequestKind.BIT: ProtocolEntry("a shared bit from XOR to arithmetic shares", "stock", "exact", "CrypTen"),
}  # fmt: skip


def told_of(kind: RequestKind) -> str:
    """Tell a protocol in words, by the kind of its request."""
    return str(CATALOG[kind])
