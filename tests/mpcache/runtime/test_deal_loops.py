"""What the dealer derives in compiled loops, against the plain expressions."""

import numpy as np
import pytest
import torch

from mpcache.protocols.activation import _MOST_BITS, _waves, series
from mpcache.protocols.coins import _DIGITS, _LOW, Highest
from mpcache.protocols.exp_digits import _ENTRIES, _REST, ExpDigits, dealt_factor
from mpcache.protocols.fence import Fence
from mpcache.protocols.lookup import apart, one_hot
from mpcache.protocols.ranges import BUCKETS, COMPARED_BITS, WINDOW_BITS, WINDOWS_BITS
from mpcache.runtime import deal_loops
from mpcache.runtime.correlations import mask_parts
from mpcache.runtime.program import Part
from mpcache.runtime.ring import pack, unpack
from mpcache.runtime.rng import KeyStream, fresh_seed


@pytest.fixture
def words() -> KeyStream:
    return KeyStream(fresh_seed(), "test")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("xor", [False, True])
def test_a_correction_is_packed_as_it_is_made(words: KeyStream, dtype: torch.dtype, xor: bool) -> None:
    value, other = words.tensor((2, 3, 7), dtype), words.tensor((2, 3, 7), dtype)
    for width in range(1, dtype.itemsize + 1):
        part = Part((2, 3, 7), dtype, xor=xor, ring=8 * width)
        share = part.correct(value, other)
        assert (share.dtype, tuple(share.shape)) == part.spec
        whole = value ^ other if xor else value - other
        assert torch.equal(share, pack(whole.long(), width) if part.packed else whole)
        back = unpack(share).to(dtype) if part.packed else share
        mask = torch.tensor(-1 if width == 8 else (1 << 8 * width) - 1).to(dtype)
        together = back ^ other if xor else back + other
        assert torch.equal(together & mask, value & mask)


@pytest.mark.parametrize(("bits", "ring"), [(0, 64), (0, 40), (16, 48), (7, 9)])
def test_a_mask_is_split(words: KeyStream, bits: int, ring: int) -> None:
    r = words.tensor((3, 8)).T
    rc, rb = mask_parts(r, bits, ring)
    assert torch.equal(rc, (r & ((1 << (ring - 1)) - 1)) >> bits)
    assert torch.equal(rb, (r >> (ring - 1)) & 1)


@pytest.mark.parametrize("fence", [Fence(40, 3, 0, 4), Fence(64, 3, 0, 4), Fence(33, 7, 0, 11)])
def test_a_fence_has_the_bits_of_its_digit(words: KeyStream, fence: Fence) -> None:
    r, size = words.tensor((2, 9)), 1 << fence.lead
    digit = ((r >> (fence.ring - fence.lead)) & (size - 1)).unsqueeze(-1)
    apart_by = (torch.arange(size) - digit) & (size - 1)
    bits = ((apart_by < fence.first) | (apart_by > fence.last)).numpy()
    expected = torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little"))
    assert torch.equal(fence.tables(r), expected)


def test_trees_of_exponents(words: KeyStream) -> None:
    r, depth = words.tensor((5,)), 37
    made = [np.empty(10, np.int64) for _ in range(3)]
    deal_loops.carried_masks(r.numpy(), depth, *made)
    top = ((r >> depth) & 1).repeat(2)
    carried = torch.cat([torch.ones_like(r), r])
    expected = (r & ((1 << depth) - 1)).repeat(2), carried * (1 - 2 * top), carried * top
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(made, expected, strict=True))


def test_lines(words: KeyStream) -> None:
    r, b, fine, ring, size = words.tensor((4,)), words.tensor((4,)), 7, 19, 16
    out = np.zeros((6, 4, size), np.int64)
    deal_loops.line_parts(r.numpy(), b.numpy(), fine, ring, out)
    hot = one_hot(r >> fine, size)
    rc, rb = (part.unsqueeze(-1) * hot for part in mask_parts(r, 0, ring))
    expected = torch.stack([hot, rb, rc, *(b.unsqueeze(-1) * part for part in (hot, rb, rc))])
    assert torch.equal(torch.from_numpy(out), expected)


def test_waves_are_rounded_term_by_term(words: KeyStream) -> None:
    wave, raw, bits = series("silu"), words.tensor((2, 9)), 22
    terms = torch.arange(1, len(wave.b) + 1)
    angle = (raw.unsqueeze(-1) & ((1 << bits) - 1)).double() * terms * (2 * np.pi / 2.0**bits)
    less = torch.tensor([_MOST_BITS - b for b in wave.shared_bits])
    pieces = _waves(raw, bits, wave)
    for fn, pair in ((torch.sin, pieces[:2]), (torch.cos, pieces[2:])):
        assert [p.dtype for p in pair] == [torch.int32] * 2 and pair[0].shape == (2, 9, wave.large)
        off = (torch.cat(pair, -1) << less) - fn(angle) * 2.0**_MOST_BITS
        assert (off.abs() <= 0.501 + ((1 << less) >> 1)).all()


def test_one_hot_bits_and_products_of_bits(words: KeyStream) -> None:
    highest = Highest((2, 11))
    r, sums, entries = words.tensor((2, 11)), words.tensor((2, BUCKETS - 1)), words.tensor((2, 32))
    hot, above, tables, products = highest.derive(r, sums, entries)
    derived = zip(highest.derived, (hot, above, tables, products), strict=True)
    assert all((p.dtype, p.shape) == (t.dtype, tuple(t.shape)) for p, t in derived)
    places = torch.arange(256, dtype=torch.uint8)
    rows = [(hot, r >> _LOW), *((tables[..., j, :], sums >> 8 * j) for j in range(_DIGITS))]
    for bits, digit in rows:
        expanded = np.unpackbits(bits.numpy(), axis=-1, bitorder="little")
        assert torch.equal(torch.from_numpy(expanded) == 1, (digit & 255).unsqueeze(-1) == places)
    assert torch.equal(above, ((r >> (_LOW + 8)) & 3).to(torch.uint8))
    each = apart(entries, _DIGITS, BUCKETS - 1)
    sets = torch.arange(1, 1 << _DIGITS)
    assert torch.equal(products, ((each.unsqueeze(-1) & sets) == sets).to(torch.int16))


def test_windows_of_exponentials(words: KeyStream) -> None:
    digits = ExpDigits((3, 10))
    r, masks = words.tensor((3, 10)), words.tensor((3, 2), torch.int32)
    windows, below, products = digits.derive(r, masks)
    one = torch.ones_like(r)
    assert torch.equal(windows, one << ((r >> WINDOW_BITS) & ((1 << WINDOWS_BITS) - 1)))
    assert torch.equal(below, ((one << ((r >> _REST) & ((1 << COMPARED_BITS) - 1))) - 1).to(torch.uint8))
    a, b, last = ((apart(masks, _ENTRIES, 10) >> i) & 1 for i in range(_ENTRIES))
    e = dealt_factor(r)
    assert torch.equal(products, torch.stack([e, e * a, e * b, e * last, e * b * last], -1))
