"""Masks that outlive a session: what the seed of V is bound to, and what each party holds of W = V + B."""

from __future__ import annotations

import pytest
import torch

from mpcache.rank import Rank
from mpcache.runtime.ring import Matrix, matmul, unpack, wide
from mpcache.runtime.shares import KnownOperand, MaskedOperand, Share, known_rows
from mpcache.runtime.standing import (
    _IN_CACHE,
    ClientsMasks,
    DealersMasks,
    OperandPlace,
    OwnersMasks,
    StandingMasks,
    dealt_of,
    pack_modulo,
)
from tests.support.uniformity import uniformity

MASTER = bytes(range(32))
MATRIX, LARGER = (300, 40), (3, 100, 40)  # each party holds another part of the one than of the other
SHAPES = pytest.mark.parametrize("shape", [MATRIX, LARGER], ids=["matrix", "larger"])


def weights(changed: int = 0, shape: tuple[int, ...] = MATRIX) -> torch.Tensor:
    """Integers as a small weight has them; the last one differs by `changed`."""
    whole = torch.arange(300 * 40).reshape(shape) % 257 - 128
    whole.view(-1)[-1] += changed
    return whole


def split(
    whole: torch.Tensor, master: bytes = MASTER, step: str = "setup/layer0", ring: int = 48, bits: int = 16
) -> tuple[OwnersMasks, KnownOperand | MaskedOperand]:
    masks = OwnersMasks()
    taken = masks.take(Share(whole.clone(), bits, Rank.SERVER), ring, step)
    masks.finish(master)
    return masks, taken


def looks_uniform(packed: torch.Tensor) -> bool:
    return uniformity(packed.reshape(-1, packed.shape[-1]).numpy()).fine


def low(x: torch.Tensor, ring: int = 48) -> torch.Tensor:
    return x & ((1 << ring) - 1)


def sent_of(masks: OwnersMasks) -> torch.Tensor:
    """B as the dealer gets it."""
    ((place, sent),) = masks.sent()
    return wide(dealt_of(place, sent))


@SHAPES
@pytest.mark.parametrize("ring", [48, 56, 64])
def test_the_three_parts_fit(shape: tuple[int, ...], ring: int) -> None:
    """V + B is W; the server knows W, the client has that V and no part of B, the dealer that B."""
    whole = weights(shape=shape)
    masks, mine = split(whole, ring=ring)
    ((place, sent),) = masks.sent()
    assert [(part.dtype, tuple(part.shape)) for part in sent] == place.specs
    assert sum(part.nbytes for part in sent) == place.nbytes
    x = Share(torch.zeros_like(whole), 16, Rank.SERVER)
    client = ClientsMasks(masks.seed).take(x, ring, place.step)
    dealer = DealersMasks(lambda place: dealt_of(place, sent)).take(x, ring, place.step)
    assert dealer.dealt is not None
    if isinstance(mine, KnownOperand):
        assert isinstance(client, KnownOperand) and isinstance(dealer, KnownOperand)
        known, opened = wide(mine.held), wide(client.held)
        assert mine.held.low.dtype == torch.int16 and mine.held.high is None  # 2 bytes each
        assert mine.owner is client.owner is dealer.owner is Rank.SERVER
        assert mine.dealt is client.dealt is None and dealer.held.low.is_meta
    else:
        assert isinstance(client, MaskedOperand)
        known, opened = mine.public + mine.mask, client.public
        assert torch.equal(opened, mine.public) and not client.mask.any()
    assert isinstance(mine, KnownOperand) == (shape == MATRIX)
    assert torch.equal(known, whole)
    assert torch.equal(low(wide(dealer.dealt) + opened, ring), low(whole, ring))


@SHAPES
def test_what_the_dealer_holds_is_uniform(shape: tuple[int, ...]) -> None:
    """So is V, of a weight whose own integers are anything but."""
    masks, _ = split(weights(shape=shape))
    assert looks_uniform(pack_modulo(sent_of(masks), 48))
    ((place, _),) = masks.sent()
    opened = ClientsMasks(masks.seed).take(Share(weights(shape=shape), 16, Rank.SERVER), 48, place.step)
    seen = wide(opened.held) if isinstance(opened, KnownOperand) else opened.public
    assert looks_uniform(pack_modulo(seen, 48))
    assert not looks_uniform(pack_modulo(weights(), 48))  # the check can see


@SHAPES
def test_one_seed_hides_one_set_of_integers(shape: tuple[int, ...]) -> None:
    """One weight, a ring, a name, a shape, the fraction bits or the master key: another of them, another V.

    Then B - B' has nothing to do with W - W'.
    """
    masks, _ = split(weights(shape=shape))
    others = [
        split(weights(1, shape)),
        split(weights(shape=shape), ring=56),
        split(weights(shape=shape), step="setup/layer1"),
        split(weights(shape=shape[::-1])),
        split(weights(shape=shape), bits=15),
        split(weights(shape=shape), master=bytes(32)),
    ]
    seeds = {masks.seed, *(other.seed for other, _ in others)}
    assert len(seeds) == 1 + len(others)
    for other, _ in others:
        apart = sent_of(other).reshape(-1) - sent_of(masks).reshape(-1)
        assert looks_uniform(pack_modulo(apart, 48))


@pytest.mark.parametrize(("k", "n"), [(1, 3), (2 * _IN_CACHE // 40 + 3, 40), (5, _IN_CACHE)])
@pytest.mark.parametrize("ring", [48, 64])
def test_a_product_with_what_a_seed_makes_is_the_whole_matrixs(k: int, n: int, ring: int) -> None:
    """V comes a few rows at a time, and each product makes it anew."""
    blank = Share(torch.zeros(k, n, dtype=torch.int64), 16, Rank.SERVER)
    opened = ClientsMasks(MASTER).take(blank, ring, "setup")
    assert isinstance(opened, KnownOperand) and not isinstance(opened.held, Matrix)
    x, whole = torch.arange(-k, k).reshape(2, k), wide(opened.held)
    assert whole.shape == (k, n) and torch.equal(wide(opened.held), whole)
    assert torch.equal(matmul(x, opened.held), torch.matmul(x, whole))
    assert len(list(opened.held.blocks())) == (1 if k == 1 else 2 if k == 5 else 3)


def test_the_same_again_has_the_same_seed() -> None:
    """A server that starts anew with its key and its model needs no upload."""
    one, two = split(weights())[0], split(weights())[0]
    assert (one.seed, one.digest) == (two.seed, two.digest)


def test_a_copy_made_before_the_split_is_seen() -> None:
    masks = OwnersMasks()
    taken = masks.take(Share(weights(shape=LARGER), 16, Rank.SERVER), 48, "setup")
    assert isinstance(taken, MaskedOperand)
    assert masks.splits([taken.mask.reshape(-1)[3:]])
    assert not masks.splits([taken.mask.clone()])


@pytest.mark.parametrize("ring", [24, 48, 56, 64])
def test_packing_keeps_what_the_ring_holds(ring: int) -> None:
    x = torch.randint(-(2**62), 2**62, (7, 3))
    assert torch.equal(unpack(pack_modulo(x, ring)), x if ring == 64 else low(x, ring))


def test_places_say_all_that_is_public() -> None:
    class Watching(StandingMasks):
        def _operand(self, x: Share, place: OperandPlace) -> MaskedOperand:
            return MaskedOperand(x.data, x.data, x.bits, ring=place.ring, known=known_rows(x))

        def _matrix(self, x: Share, place: OperandPlace) -> KnownOperand:
            raise AssertionError("not a matrix")

    masks = Watching()
    masks.take(Share(weights(shape=LARGER), 16, Rank.SERVER), 56, "context/layer2")
    assert masks.places == [OperandPlace("context/layer2", LARGER, 56, 16)]
    assert masks.places[0].nbytes == 300 * 40 * 7
