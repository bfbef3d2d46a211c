"""Masks of several tokens' rows, multiplied by a standing matrix in one pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.runtime.program import NO_WORK, Part, Request, RequestKind
from mpcache.runtime.ring import Matrix, matmul
from mpcache.runtime.rows_ahead import TOKENS, RowsAhead
from mpcache.runtime.shares import KnownOperand
from tests.support.uniformity import uniformity

SEED, K, N = bytes(range(32)), 40, 24
V, B = (Matrix(torch.randint(-(1 << 40), 1 << 40, (K, N))) for _ in range(2))


def known(number: int = 3, name: str = "setup/layer0/3") -> KnownOperand:
    return KnownOperand(V, Rank.SERVER, 16, 48, B, name, number)


def product_of(w: KnownOperand, shape: tuple[int, ...] = (1, K)) -> Request:
    """Ask for what a product of the server's own needs."""
    random = Part(shape, owner=Rank.SERVER), Part(shape, owner=Rank.CLIENT)
    derived = (Part((*shape[:-1], N), ring=48),)
    return Request(RequestKind.MASKED_OPERAND, random, derived, lambda *a: a, NO_WORK, matrix=w)


def taken(ahead: RowsAhead, place: ChunkPlace, request: Request) -> torch.Tensor:
    """Take a token's row, and check its product."""
    ahead.begin(place.phase)
    mask = ahead.mask(request, V)
    assert mask is not None and mask.shape == request.random[-1].shape
    product = ahead.product(mask)
    assert product is not None and torch.equal(product, matmul(mask, V))
    assert ahead.product(mask) is None  # it is taken once
    return mask


@pytest.mark.parametrize("first", [1, 2, TOKENS + 1])
def test_each_token_has_a_row_of_its_own_and_both_have_it(first: int) -> None:
    """Whichever token they begin at: the dealer is ahead, and a session may be resumed."""
    client, dealer = RowsAhead(SEED), RowsAhead(SEED)
    request = product_of(known())
    every = [taken(client, ChunkPlace(1, step), request) for step in range(1, 3 * TOKENS)]
    later = [taken(dealer, ChunkPlace(1, step), request) for step in range(first, 3 * TOKENS)]
    assert all(torch.equal(a, b) for a, b in zip(every[first - 1 :], later, strict=True))
    rows = torch.cat(every)
    assert len({tuple(row) for row in rows.tolist()}) == len(every)
    assert uniformity(rows.view(-1, 1).view(torch.uint8).numpy()).fine


def test_another_turn_matrix_or_seed_is_another_row() -> None:
    places = [ChunkPlace(turn, 1) for turn in (1, 2)]
    operands = [known(), known(name="setup/layer1/3"), known(3 + TOKENS, "setup/layer1/11")]
    rows = [
        taken(RowsAhead(seed), place, product_of(w))
        for seed in (SEED, bytes(32)) for place in places for w in operands
    ]  # fmt: skip
    assert len({tuple(row.reshape(-1).tolist()) for row in rows}) == len(rows)


def test_passes_of_different_matrices_begin_at_different_tokens() -> None:
    """So that no token pays for all."""
    ahead = RowsAhead(SEED)
    made: list[int] = []
    for step in range(1, 1 + TOKENS):
        before = dict(ahead._passes)
        for number in range(2 * TOKENS):
            ahead.begin(ChunkPlace(1, step).phase)
            ahead.mask(product_of(known(number, str(number))), V)
        made.append(sum(before.get(name) is not each for name, each in ahead._passes.items()))
    assert made == [2 * TOKENS] + [2] * (TOKENS - 1)


def test_all_else_is_of_the_tape() -> None:
    """A question, several rows, a matrix that is met again, one that is masked for a session alone."""
    ahead, request = RowsAhead(SEED), product_of(known())
    for phase in ("setup", "question", "private1", "turn2-question"):
        ahead.begin(phase)
        assert ahead.mask(request, V) is None
    ahead.begin("decode1")
    assert ahead.mask(product_of(known(), (2, K)), V) is None
    assert ahead.mask(product_of(replace(known(), name="")), V) is None
    assert ahead.mask(replace(request, matrix=None), V) is None
    assert ahead.mask(request, V) is not None
    assert ahead.mask(request, V) is None
    assert ahead.product(torch.zeros(1, K)) is None


def test_a_questions_products_come_with_the_first_rows_of_the_answer() -> None:
    """The same rows as without; a second part of the question makes none."""
    client, dealer, w = RowsAhead(SEED), RowsAhead(SEED), known()
    client.begin("question")
    for rows in (3, 2):
        mask = torch.randint(-(1 << 62), 1 << 62, (rows, K))
        assert torch.equal(client.times(mask, w), matmul(mask, V))
        passes = dict(client._passes)
    assert passes == client._passes and len(passes) == 1
    rows_of = [taken(each, ChunkPlace(1, 1), product_of(w)) for each in (client, dealer)]
    assert client._passes == passes and torch.equal(*rows_of)
    client.begin("private1")
    assert torch.equal(client.times(mask, w), matmul(mask, V)) and client._passes == passes
