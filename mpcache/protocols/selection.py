"""A selection prepared for repeated use: its slot matrix as a masked operand.

Where `topk.HotSelection` shares a mask for each item and place, n N c words for c columns, a matrix
that was opened once under a mask of its own needs n c or k c words per use: what layers that share a
selection, and steps between two refreshes, are made of.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

from mpcache.ops import SelectionOf
from mpcache.protocols.linear import mask_operand, matmul_masked_operand, product
from mpcache.protocols.ranges import SELECTION_RING
from mpcache.runtime.program import Program, local
from mpcache.runtime.ring import matmul
from mpcache.runtime.shares import MaskedOperand, Share
from mpcache.runtime.side import Side


class SlotSelection(SelectionOf[Share]):
    """A selection whose slot matrix H (*rows, k, n), H[j, i] = [item i is chosen j-th], is held in shares."""

    side: Side

    @abstractmethod
    def slots(self) -> Share:
        """Return H, integers."""

    def refine(self, finer: SlotSelection, children: int) -> Program[SlotSelection]:
        """Join coarse and finer choice to one. Two rounds, and one for the preparation."""
        return refine_selection(self.side, self.slots(), finer.slots(), children)

    def marks(self) -> Share:
        """Mark what is chosen: the slots' sum."""
        return self.slots().sum(-2)


@dataclass(frozen=True)
class PreparedSelection(SlotSelection):
    """hot: the slot matrix (*rows, k, n), integers.  share: the same, as shares."""

    side: Side
    share: Share
    hot: MaskedOperand

    def gather(self, values: Share) -> Program[Share]:
        """Gather values. One round: only they are opened."""
        columns = values.transpose(-1, -2)
        return (yield from matmul_masked_operand(self.side, columns, self.hot.transpose(-1, -2))).transpose(
            -1, -2
        )

    def scatter(self, weights: Share) -> Program[Share]:
        """Scatter weights. One round: only they are opened."""
        return (yield from matmul_masked_operand(self.side, weights.transpose(-1, -2), self.hot)).transpose(
            -1, -2
        )

    def prepare(self) -> Program[SlotSelection]:
        return local(self)

    def slots(self) -> Share:
        return self.share


def prepare_selection(side: Side, hot: Share) -> Program[SlotSelection]:
    """Open the slot matrix (*rows, k, n) under a mask that stays. One round."""
    return PreparedSelection(side, hot, (yield from mask_operand(hot, SELECTION_RING)))


def refine_selection(side: Side, coarse: Share, fine: Share, children: int) -> Program[SlotSelection]:
    """Join coarse (*rows, k, n) and fine (*rows, k2, k children) to (*rows, k2, n children). Two rounds."""
    *rows, k2, _ = fine.shape
    k, n = coarse.shape[-2:]
    by_child = fine.reshape(*rows, k2, k, children).transpose(-1, -2).transpose(-2, -3)
    hot = yield from product(side, by_child.reshape(*rows, children * k2, k), coarse, matmul, SELECTION_RING)
    hot = hot.reshape(*rows, children, k2, n).transpose(-3, -2).transpose(-2, -1)
    return (
        yield from prepare_selection(side, replace(hot.reshape(*rows, k2, n * children), ring=SELECTION_RING))
    )
