"""Masks that outlive a session: what the seed of V is bound to, and what each party holds of W = V + B."""

from __future__ import annotations

import pytest
import torch

from mpcache.rank import Rank
from mpcache.runtime.shares import MaskedOperand, Share
from mpcache.runtime.standing import (
    ClientsMasks,
    DealersMasks,
    OperandPlace,
    OwnersMasks,
    StandingMasks,
    pack,
    unpack,
)
from tests.support.uniformity import uniformity

MASTER = bytes(range(32))


def weights(changed: int = 0, shape: tuple[int, ...] = (300, 40)) -> torch.Tensor:
    """Integers as a small weight has them; the last one differs by `changed`."""
    whole = torch.arange(300 * 40).reshape(shape) % 257 - 128
    whole.view(-1)[-1] += changed
    return whole


def split(
    whole: torch.Tensor, master: bytes = MASTER, step: str = "setup/layer0", ring: int = 48, bits: int = 16
) -> tuple[OwnersMasks, MaskedOperand]:
    masks = OwnersMasks()
    taken = masks.take(Share(whole.clone(), bits, Rank.SERVER), ring, step)
    masks.finish(master)
    return masks, taken


def looks_uniform(packed: torch.Tensor) -> bool:
    return uniformity(packed.reshape(-1, packed.shape[-1]).numpy()).fine


def low(x: torch.Tensor, ring: int = 48) -> torch.Tensor:
    return x & ((1 << ring) - 1)


def test_the_three_parts_fit() -> None:
    """V + B is W at the server; the client has that V and the dealer that B."""
    whole = weights()
    masks, mine = split(whole)
    sent = [packed for _, packed in masks.packed()]
    x = Share(torch.zeros_like(whole), 16, Rank.SERVER)
    client = ClientsMasks(masks.seed).take(x, 48, "setup/layer0")
    dealer = DealersMasks(lambda place: unpack(sent.pop(0))).take(x, 48, "setup/layer0")
    assert torch.equal(mine.public + mine.mask, whole)
    assert torch.equal(client.public, mine.public) and not client.mask.any()
    assert dealer.dealt is not None
    assert torch.equal(low(dealer.dealt + client.public), low(whole))


def test_what_the_dealer_holds_is_uniform() -> None:
    """So is V, of a weight whose own integers are anything but."""
    masks, mine = split(weights())
    ((_, packed),) = masks.packed()
    assert packed.shape[-1] == 6
    assert looks_uniform(packed)
    assert looks_uniform(pack(mine.public, 48))
    assert not looks_uniform(pack(weights(), 48))  # the check can see


def test_one_seed_hides_one_set_of_integers() -> None:
    """One weight, a ring, a name, a shape, the fraction bits or the master key: another of them, another V.

    Then B - B' has nothing to do with W - W'.
    """
    masks, mine = split(weights())
    others = [
        split(weights(changed=1)),
        split(weights(), ring=56),
        split(weights(), step="setup/layer1"),
        split(weights(shape=(40, 300))),
        split(weights(), bits=15),
        split(weights(), master=bytes(32)),
    ]
    seeds = {masks.seed, *(other.seed for other, _ in others)}
    assert len(seeds) == 1 + len(others)
    for _, other in others:
        apart = other.mask.reshape(-1) - mine.mask.reshape(-1)
        assert looks_uniform(pack(apart, 48))


def test_the_same_again_has_the_same_seed() -> None:
    """A server that starts anew with its key and its model needs no upload."""
    one, two = split(weights())[0], split(weights())[0]
    assert (one.seed, one.digest) == (two.seed, two.digest)


def test_a_copy_made_before_the_split_is_seen() -> None:
    masks = OwnersMasks()
    taken = masks.take(Share(weights(), 16, Rank.SERVER), 48, "setup")
    assert masks.splits([taken.mask.reshape(-1)[3:]])
    assert not masks.splits([taken.mask.clone()])


@pytest.mark.parametrize("ring", [24, 48, 56, 64])
def test_packing_keeps_what_the_ring_holds(ring: int) -> None:
    x = torch.randint(-(2**62), 2**62, (7, 3))
    assert torch.equal(unpack(pack(x, ring)), x if ring == 64 else low(x, ring))


def test_places_say_all_that_is_public() -> None:
    class Watching(StandingMasks):
        def _operand(self, x: Share, place: OperandPlace) -> MaskedOperand:
            return MaskedOperand(x.data, x.data, x.bits, ring=place.ring)

    masks = Watching()
    masks.take(Share(weights(), 16, Rank.SERVER), 56, "context/layer2")
    assert masks.places == [OperandPlace("context/layer2", (300, 40), 56, 16)]
    assert masks.places[0].nbytes == 300 * 40 * 7
