"""Truncation and products, exact to the last bit that they promise."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mpcache.engines.fast import FastOps
from mpcache.errors import Reuse
from mpcache.protocols.linear import (
    finish_mask_operand,
    mask_matrix,
    mask_operand,
    matmul_masked_operand,
    product,
    start_mask_operand,
    truncate,
    truncate_to_scale,
)
from mpcache.rank import Rank
from mpcache.runtime.program import Opening, Part, Program, open_secret, together
from mpcache.runtime.ring import wide
from mpcache.runtime.rng import KeyStream, fresh_seed
from mpcache.runtime.shares import KnownOperand, Share, decode
from mpcache.runtime.side import Side
from tests.support.harness import secure
from tests.support.play import Played
from tests.support.uniformity import worst_of_ring


def raw(n: int, bound: int) -> torch.Tensor:
    """Uniform integers in [-bound, bound), with both ends."""
    x = (KeyStream(fresh_seed(), "test").tensor((n,)) & (2 * bound - 1)) - bound
    x[0], x[1], x[2] = -bound, bound - 1, 0
    return x


@pytest.mark.parametrize(
    ("ring", "n"),
    [(48, 20_000), (56, 20_000), pytest.param(64, 1_000_000, marks=pytest.mark.slow), (64, 20_000)],
)
def test_truncation_is_never_off_by_a_wrap(ring: int, n: int) -> None:
    """At the edge of its range: |x| near 2^(ring-2); the result is the floor or one more."""
    bound = 1 << (ring - 2)
    x = raw(n, bound)
    x[n // 2 :] = x[n // 2 :] % 4096 + bound - 4096  # the edge itself

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return (yield from truncate(ops.side, Share(share.data, 32, ring=ring), 16))

    played = secure(protocol, x, bits=0)
    y = played.server.data + played.client.data
    error = y - (x >> 16)
    assert error.min() >= 0 and error.max() <= 1
    assert played.ledgers[Rank.SERVER].total().sent == n * ring // 8


def test_products_are_exact_in_their_ring() -> None:
    x, w = raw(12, 1 << 20).reshape(3, 4), raw(20, 1 << 20).reshape(4, 5)
    for ring in (48, 56, 64):

        def protocol(ops, a, b, ring=ring):  # type: ignore[no-untyped-def]
            kept = yield from mask_operand(b, ring)
            return (yield from matmul_masked_operand(ops.side, a, kept, ring))

        played = secure(protocol, x, w, bits=0)
        y = (played.server.data + played.client.data) & ((1 << ring) - 1)
        assert torch.equal(y, (x @ w) & ((1 << ring) - 1))
        assert played.server.ring == ring

    def beaver(ops, a, b):  # type: ignore[no-untyped-def]
        return (yield from product(ops.side, a, b, torch.matmul))

    played = secure(beaver, x, w, bits=0)
    assert torch.equal(played.server.data + played.client.data, x @ w)


@pytest.mark.parametrize("owner", [Rank.SERVER, Rank.CLIENT])
def test_a_matrix_that_one_party_knows_multiplies_exactly(owner: Rank) -> None:
    """Each party holds one matrix in few bytes; what is opened of it is uniform, and the product is right."""
    x, w = raw(12, 1 << 20).reshape(3, 4), raw(24, 1 << 20).reshape(4, 6)
    held: list[tuple[Side, KnownOperand]] = []
    for ring in (48, 56, 64):

        def protocol(ops, a, ring=ring):  # type: ignore[no-untyped-def]
            known = ops.secret(w if ops.side.rank is owner else None, w.shape, owner, bits=0)
            kept = yield from mask_matrix(ops.side, known, ring)
            held.append((ops.side, kept))
            return (yield from matmul_masked_operand(ops.side, a, kept, ring))

        played = secure(protocol, x, bits=0)
        y = (played.server.data + played.client.data) & ((1 << ring) - 1)
        assert torch.equal(y, (x @ w) & ((1 << ring) - 1)) and played.server.ring == ring
    integers = {s.rank is owner: wide(k.held) for s, k in held[:3] if s.device == "cpu"}
    assert torch.equal(integers[True], w) and not torch.equal(integers[False], w)
    with pytest.raises(ValueError, match="nobody knows"):
        next(mask_matrix(Side(Rank.SERVER), Share(w, 0)))


def one_way(x: torch.Tensor, w: torch.Tensor) -> tuple[Played, list[torch.Tensor]]:
    """The client's x times the server's matrix w; and what the server sees: its share of c, and e."""
    seen: list[torch.Tensor] = []

    def protocol(ops: FastOps, _: Share) -> Program[Share]:
        server = ops.side.rank is Rank.SERVER
        known = ops.secret(w if server else None, w.shape, Rank.SERVER, bits=0)
        kept = yield from mask_matrix(ops.side, known, 48)
        mine = replace(ops.secret(None if server else x, x.shape, Rank.CLIENT, bits=0), owner=None)
        program: Program[Share] = matmul_masked_operand(ops.side, mine, kept, 48)
        reply: Any = None
        while True:
            try:
                ask = program.send(reply)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            reply = yield ask
            if server and ops.side.device == "cpu":
                seen.append(reply[-1] & ((1 << 48) - 1))

    return secure(protocol, x, bits=0), seen


def test_only_the_other_party_sends_for_a_matrix_that_one_knows() -> None:
    x, w = raw(24, 1 << 20).reshape(2, 12), raw(36, 1 << 20).reshape(12, 3)
    played, _ = one_way(x, w)
    assert not ((played.server.data + played.client.data - x @ w) & ((1 << 48) - 1)).any()
    sent = {rank: ledger.total().sent for rank, ledger in played.ledgers.items()}
    assert sent[Rank.CLIENT] == 6 * 24 and sent[Rank.SERVER] == 6 * 36  # V, once


def follows(c: torch.Tensor, e: torch.Tensor) -> bool:
    """Whether c is a factor times e, and a number: then the server solves for the mask."""
    c, e = c.ravel(), e.ravel()
    apart = (c[0] - c[2:]) * (e[1] - e[2:]) - (c[1] - c[2:]) * (e[0] - e[2:])
    return not (apart & ((1 << 48) - 1)).any()


def test_what_the_server_sees_of_a_one_way_product_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a constant: e, and c's share. A planted bug, c's other share as zero, gives the mask away."""
    x, w = torch.full((4096, 1), 7), torch.tensor([[12345]])
    _, (c, e) = one_way(x, w)
    for values in (c, e):
        data = values.contiguous().view(torch.uint8).reshape(-1, 8).numpy()[:, :6]
        assert worst_of_ring(data, 48) < 6
    assert not follows(c, e)
    correct = Part.correct
    monkeypatch.setattr(Part, "correct", lambda part, value, other: correct(part, value, 0 * other))
    assert follows(*one_way(x, w)[1])


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_that_the_server_knows_take_one_way_of_an_opening(rows: int) -> None:
    """Weights times values: the document's columns are sent by the client alone, and the sum is exact."""
    x, old, new = raw(24, 1 << 20).reshape(2, 3, 4), raw(40, 1 << 20).reshape(2, 4, 5), torch.ones(2, rows, 5)
    x = torch.cat([x, torch.ones(2, 3, rows, dtype=torch.int64)], -1)

    def protocol(ops, x, new):  # type: ignore[no-untyped-def]
        known = ops.secret(old if ops.side.rank is Rank.SERVER else None, old.shape, Rank.SERVER, bits=0)
        kept = yield from mask_operand(known, 56)
        if rows:
            kept = kept.append((yield from mask_operand(new, 56)), 1)
        assert kept.known == 4 and kept[:, :2].known == 0
        return (yield from matmul_masked_operand(ops.side, x, kept, 56))

    played = secure(protocol, x, new.long(), bits=0)
    y = (played.server.data + played.client.data) & ((1 << 56) - 1)
    expected = x @ torch.cat([old, new.long()], 1)
    assert torch.equal(y, expected & ((1 << 56) - 1))
    both = {rank: played.ledgers[rank].total().sent for rank in (Rank.SERVER, Rank.CLIENT)}
    new_rows = 7 * 2 * rows * 5 + 7 * 2 * 3 * rows
    assert both == {Rank.CLIENT: 7 * 24 + new_rows, Rank.SERVER: 7 * 40 + new_rows}


def test_a_small_ring_returns_to_the_whole_with_truncation() -> None:
    x, y = torch.randn(50, 8), torch.randn(8, 6)

    def protocol(ops, a, b):  # type: ignore[no-untyped-def]
        kept = yield from ops.prepare(b)
        return (yield from ops.rescale((yield from ops.linear(a, kept))))

    played = secure(protocol, x, y)
    assert played.server.ring == 64
    assert (played.value() - x @ y).abs().max() < 3e-4


def test_a_share_is_no_truth_value() -> None:
    with pytest.raises(TypeError, match="truth value"):
        bool(Share(torch.ones(1, dtype=torch.int64), 16))
    with pytest.raises(ValueError, match="fraction bits"):
        Share(torch.ones(1, dtype=torch.int64), 16) + Share(torch.ones(1, dtype=torch.int64), 17)
    assert decode(torch.tensor([-(3 << 15)]), 16).item() == -1.5


def test_new_rows_and_a_product_with_them_share_a_round() -> None:
    """As the cache grows: the product is drawn for, and opened, before the rows are known."""
    x, old, new = torch.randn(3, 4), torch.randn(4, 5), torch.randn(4, 2)

    def protocol(ops, x, old, new):  # type: ignore[no-untyped-def]
        kept = yield from mask_operand(old)
        announced = yield from start_mask_operand(new)
        joined = kept.append(announced, 1)
        grown = joined.transpose(0, 1)
        with pytest.raises(RuntimeError, match="before the round that opens it"):
            _ = grown.public
        multiplied = matmul_masked_operand(ops.side, x, grown.transpose(0, 1))
        delivered, y = yield from together(finish_mask_operand(new, announced, joined), multiplied)
        again = yield from matmul_masked_operand(ops.side, x, delivered)
        return Share(torch.cat([y.data, again.data]), y.bits)

    played = secure(protocol, x, old, new)
    expected = x.double() @ torch.cat([old, new], 1).double()
    torch.testing.assert_close(played.value(), torch.cat([expected, expected]), atol=1e-3, rtol=0)
    assert played.ledgers[Rank.SERVER].total().rounds == 3


def test_only_what_is_settled_is_announced() -> None:
    """Else a truncation's round would come first, and what reads the rows beside it would be ahead."""
    ops = FastOps(Rank.SERVER)
    with pytest.raises(ValueError, match="settled"):
        next(ops.start_prepare(Share(torch.zeros(2, 3, dtype=torch.int64), 32, ring=48)))


def test_a_mask_that_waits_serves_once() -> None:
    """What opens later, under a mask that was drawn before, refuses to open a second value under it."""
    x = torch.randn(4, 3)

    def twice_scaled(ops, x):  # type: ignore[no-untyped-def]
        times = yield from truncate_to_scale(ops.side, x, (4, 1))
        y = yield from times(x[:, :1])
        if ops.side.device == "cpu":
            with pytest.raises(Reuse, match="serves one factor"):
                yield from times(x[:, 1:2])
        return y

    def twice_opened(ops, x):  # type: ignore[no-untyped-def]
        started = yield from ops.start_prepare(x)
        yield from ops.finish_prepare(x, started, started)
        if ops.side.device == "cpu":
            with pytest.raises(Reuse, match="each operand is opened once"):
                yield from ops.finish_prepare(x + x, started, started)
        return x

    for protocol in (twice_scaled, twice_opened):
        assert secure(protocol, x).ledgers[Rank.SERVER].total().rounds == (
            2 if protocol is twice_scaled else 1
        )


def test_a_secret_is_opened_in_whole_bytes() -> None:
    """A ring of 20 bits takes three bytes, and no mask would hide the noise in the last four bits."""
    with pytest.raises(ValueError, match="logits has a ring of 20 bits"):
        next(open_secret(Opening(torch.zeros(3, dtype=torch.int64), "logits", Rank.CLIENT, ring=20)))
