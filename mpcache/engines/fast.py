"""`--protocol fast`: `Ops` assembled from this package's protocols, with few rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from mpcache.errors import OutOfRange
from mpcache.model.rope import Rotation, rotate
from mpcache.ops import Engine, SelectionOf
from mpcache.protocols import suite
from mpcache.protocols.compare import Digits, Keys
from mpcache.protocols.ranges import (
    BLUR_BITS,
    BOUND_SLACK,
    LONG_BITS,
    LONGEST_ATTENDED,
    RELU_WIDTH,
    VALUE_BITS,
    WEIGHT_BITS,
    WEIGHTED_SUM_RING,
    weight_bits,
)
from mpcache.protocols.suite import Suite
from mpcache.protocols.verdict import finish_verdict, start_verdict
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import Call, Opening, Program, open_secret
from mpcache.runtime.ring import RemoteMatrix, largest_in, narrow_rows
from mpcache.runtime.shares import (
    KnownOperand,
    MaskedOperand,
    Share,
    cat,
    centred,
    decode,
    encode,
    is_known_matrix,
    zeros,
)
from mpcache.runtime.side import Side, drop_low_bits
from mpcache.runtime.standing import standing_masks

KEPT_BITS = 16  # of a score by which rows are kept for good


class FastOps(Engine[Share, MaskedOperand]):
    """Values carry up to `WEIGHT_BITS` fraction bits where an operation says so, else `bits`.

    A product keeps all its fraction bits; the next operation truncates what it needs (`rescale_to`): each
    party drops bits by itself until no more than the value's size is left of the ring, and what an
    opening brings back to the whole ring is then short.
    """

    name = "fast"
    do: Suite = suite  # or their meaning, `ideal`, in mpcache.engines.checked
    comparison: type[Keys] | type[Digits] = Keys  # of all pairs within a top-k, and within softmax

    def __init__(self, rank: Rank, bits: int = 16, device: str = "cpu") -> None:
        self.bits, self.side = bits, Side(rank, device)

    def secret(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None
    ) -> Share:
        bits = self.bits if bits is None else bits
        if self.side.device == "meta":
            return Share(MetaTensor(tuple(shape)), bits, owner)
        if value is None or self.side.rank is not owner:
            return Share(zeros(shape), bits, owner)
        return Share(encode(value.cpu(), bits).reshape(tuple(shape)), bits, owner)

    def rescale_to(self, x: Share, bits: int | None = None) -> Program[Share]:
        """X at `bits` fraction bits, exactly; free if it has no more."""
        bits = self.bits if bits is None else bits
        if (x.bits, x.ring) == (bits, 64):
            return x
        return (yield from self.do.truncate(self.side, self.do.truncate_local(self.side, x, bits), bits))

    def in_small_ring(self, x: Share) -> Share:
        """X at `bits` fraction bits in a ring for |x| < 2^14; no cost."""
        x = self.do.truncate_local(self.side, x, self.bits)
        return replace(x, ring=min(x.ring, x.bits + VALUE_BITS + 2))

    def rescale(self, x: Share) -> Program[Share]:
        return (yield from self.rescale_to(self.in_small_ring(x)))

    def prepare(self, x: Share, ring: int = 48) -> Program[MaskedOperand]:
        x = yield from self.rescale_to(x)
        self._check_own(x)
        operand: KnownOperand | MaskedOperand | None = yield Call(standing_masks(x, ring))
        if operand is None and is_known_matrix(x):
            operand = yield from self.do.mask_matrix(self.side, x, ring)
        elif operand is None:
            operand = yield from self.do.mask_operand(x, ring)
        return cast(MaskedOperand, operand)  # a matrix serves products alone, as weights do

    def prepare_own(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, ring: int = 48
    ) -> Program[MaskedOperand]:
        """Do so at the memory of the integers in few bytes, where it is a matrix."""
        if isinstance(value, RemoteMatrix):  # integers already, elsewhere
            return self.prepare(Share(value, self.bits, owner), ring)
        if value is None or len(shape) != 2 or self.side.rank is not owner or self.side.device == "meta":
            return self.prepare(self.secret(value, shape, owner), ring)
        real = value.cpu().reshape(tuple(shape))
        held = narrow_rows(tuple(real.shape), lambda rows: encode(real[rows], self.bits))
        return self.prepare(Share(held, self.bits, owner), ring)

    def start_prepare(self, x: Share, ring: int = 48) -> Program[MaskedOperand]:
        if (x.bits, x.ring) != (self.bits, 64):
            raise ValueError("only what is settled can be started: else a round comes first")
        return (yield from self.do.start_mask_operand(x, ring))

    def finish_prepare(
        self, x: Share, started: MaskedOperand, joined: MaskedOperand
    ) -> Program[MaskedOperand]:
        return (yield from self.do.finish_mask_operand(x, started, joined))

    def _check_own(self, x: Share) -> None:
        """Who knows a value sees whether it is in range. Raises OutOfRange."""
        if x.owner is not self.side.rank or isinstance(x.data, MetaTensor) or 0 in x.shape:
            return
        if (most := largest_in(x.data)) >= 1 << (x.bits + VALUE_BITS):
            raise OutOfRange(
                f"{x.owner.label}: a weight, key or value of {most / 2**x.bits:.6g} is out of "
                f"range; protocol fast holds less than {1 << VALUE_BITS}: the answer would be wrong"
            )

    def cat_operands(self, parts: Sequence[MaskedOperand], dim: int) -> MaskedOperand:
        first, *rest = parts
        for part in rest:
            first = first.append(part, dim)
        return first

    def cat(self, parts: Sequence[Share], dim: int) -> Share:
        return cat(parts, dim)

    def linear(self, x: Share, w: MaskedOperand, bias: Share | None = None) -> Program[Share]:
        if x.bits > WEIGHT_BITS:
            x = yield from self.rescale_to(x)
        y = yield from self.do.matmul_masked_operand(self.side, x, w)
        if bias is None:
            return y
        return replace(y, data=y.data + (bias.data << (y.bits - bias.bits)))

    def scores(self, q: Share, keys: MaskedOperand) -> Program[Share]:
        q = yield from self.rescale_to(q)
        return self.do.quantize_scores(
            (yield from self.do.matmul_masked_operand(self.side, q, keys.transpose(-1, -2)))
        )

    def as_scores(self, x: Share) -> Share:
        return self.do.quantize_scores(x)

    def norm_linear(
        self, x: MaskedOperand | None, change: Share, eps: float, w: MaskedOperand, bias: Share | None = None,
        turn: Rotation | None = None,
    ) -> Program[tuple[MaskedOperand, Share]]:  # fmt: skip
        def turned(y: Share) -> Share:
            return y if turn is None else Share(turn(y.data, self.bits), y.bits + self.bits, ring=y.ring)

        x, y = yield from self.do.norm_linear(self.side, x, self.in_small_ring(change), eps, w, turned)
        if bias is not None:
            bias = turned(replace(bias, data=bias.data.expand(*y.shape)))
            y = replace(y, data=y.data + (bias.data << (y.bits - bias.bits)))
        return x, y

    def rotate(self, x: Share, cos: torch.Tensor, sin: torch.Tensor) -> Program[Share]:
        angles = (encode(t, self.bits) for t in (cos, sin))
        turned = Share(rotate(x.data, *angles), x.bits + self.bits, ring=x.ring)
        return (yield from self.rescale_to(turned))

    def gate(self, kind: str, gate: Share, up: Share | None) -> Program[Share]:
        gate, up = self.in_small_ring(gate), None if up is None else self.in_small_ring(up)
        return self.do.truncate_local(
            self.side, (yield from self.do.activate(self.side, kind, gate, up)), self.bits
        )

    def softmax(self, scores: Share, visible: torch.Tensor | None) -> Program[tuple[Share, Share]]:
        bits = weight_bits(scores.shape[-1])
        return (yield from self.do.softmax(self.side, scores, visible, bits, self.comparison))

    def weighted_sum(self, weights: Share, values: MaskedOperand) -> Program[Share]:
        return (yield from self.do.matmul_masked_operand(self.side, weights, values, WEIGHTED_SUM_RING))

    def reciprocal(self, total: Share) -> Program[Share]:
        least = 2.0 ** -(2 * BOUND_SLACK)  # e^-slack, and some
        return (yield from self.do.reciprocal(self.side, total, least, LONGEST_ATTENDED))

    def mul(self, x: Share, y: Share) -> Program[Share]:
        if x.bits > WEIGHT_BITS:
            return (
                yield from self.do.truncate_times(
                    self.side, self.do.truncate_local(self.side, x, LONG_BITS), y
                )
            )
        return (yield from self.do.product(self.side, x, y))

    def relu(self, x: Share) -> Program[Share]:
        return (yield from self.do.relu(self.side, x, RELU_WIDTH))

    def scale(self, x: Share, factor: float) -> Share:
        return replace(x * round(factor * 2**16), bits=x.bits + 16)

    def value(self, x: MaskedOperand) -> Share:
        return Share(self.side.plus(x.mask, x.opened), x.bits, ring=x.ring)

    def ones(self, shape: Sequence[int]) -> Share:
        return self.secret(torch.ones(tuple(shape)), shape, Rank.SERVER, bits=0)

    def mask_scores(self, scores: Share, alive: Share, far: int) -> Share:
        away = (alive - self.ones(alive.shape)) * (far << scores.bits)
        return scores + replace(away, bits=scores.bits)

    def topk(
        self, scores: Share, k: int, values: Sequence[Share], limit: int = 512
    ) -> Program[tuple[SelectionOf[Share], list[Share]]]:
        width = scores.bits + (2 * limit - 1).bit_length() + 1  # differences stay below 2 limit
        chosen, gathered = yield from self.do.topk(self.side, scores, k, values, width, self.comparison)
        return chosen, gathered

    def compact(self, scores: Share, k: int, values: Sequence[Share], limit: int) -> Program[list[Share]]:
        scores = yield from self.rescale_to(scores)
        # The largest score has 16 bits; one that is zero may come out a little below it.
        raw = drop_low_bits(scores.data, scores.bits + limit.bit_length() - KEPT_BITS)
        whole = Share(self.side.plus(raw, 4), 0)
        return (yield from self.do.compact(self.side, whole, k, values))

    def reveal(self, x: Share, to: Rank, why: str) -> Program[torch.Tensor | None]:
        """Open to one party. One round.

        Products are blurred by the other party (`blur`): a logit is a whole number of 2^-18 / rms, so
        that exact logits would tell the last hidden state's root mean square, which is no public size. The
        blur hides it in one step of one session: docs/threat-model.md says what repeated questions tell.
        """
        # Whole bytes, all of them significant: the recipient sees a share that is uniform.
        spare = -(x.ring - max(0, x.bits - self.bits)) % 8
        if x.bits > self.bits + spare:
            x = self.do.truncate_local(self.side, x, self.bits + spare)
            x = replace(x, data=x.data + (yield from self.do.blur(self.side, x, to.peer, BLUR_BITS)))
        raw = yield from open_secret(Opening(x.data, why, to=to, ring=x.ring))
        if raw is None:
            return None
        return decode(centred(raw, x.ring), x.bits)

    def start_verdict(self, rounds: int) -> Program[Any]:
        return start_verdict(self.side, rounds)

    def finish_verdict(self, started: torch.Tensor) -> Program[torch.Tensor | None]:
        return finish_verdict(started)


class FastBitsOps(FastOps):
    """`--protocol fast-bits`: top-k and softmax compare the mask's digits instead of walking key trees.

    Each top-k takes one more round, and a thirteenth of its comparisons' offline bytes, or a fortieth and two
    more rounds where it compares many at once (`compare.levels_for`); each softmax two more rounds, and a
    fifth to a sixth of its offline bytes.
    """

    name = "fast-bits"
    comparison = Digits
