"""Key trees: right at every point, and nothing but noise at one party."""

from typing import Any

import numpy as np
import pytest
import torch

from mpcache.policy import parse_policy
from mpcache.protocols.dcf import KeyShape, dcf_eval, dcf_keygen
from mpcache.protocols.relu import relu
from mpcache.rank import Rank
from mpcache.runtime.party import Party
from mpcache.runtime.program import run
from mpcache.runtime.rng import COMPILED, KeyStream, TreeCipher, fresh_seed
from mpcache.runtime.shares import Share
from mpcache.session import Session
from tests.support import tiny_policies as tiny
from tests.support.play import Played, play

CIPHER = TreeCipher("a session", "a phase")
PHASES = ("one", "two")


def keys(n: int, depth: int, start: int, width: int = 8):  # type: ignore[no-untyped-def]
    stream = KeyStream(fresh_seed(), "test")
    shape = KeyShape(n, depth, start, width)
    alpha = stream.tensor((n,)) & ((1 << depth) - 1)
    beta = stream.tensor((n,))
    seeds = stream.tensor((n, 2)), stream.tensor((n, 2))
    return shape, alpha, beta, seeds, stream, *dcf_keygen(shape, CIPHER, seeds, alpha, beta)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("depth", "start"), [(1, 0), (2, 0), (5, 0), (16, 0), (23, 6), (24, 0), (62, 0), (63, 0)]
)
def test_shares_of_the_comparison(depth: int, start: int, width: int) -> None:
    shape, alpha, beta, seeds, stream, words, bits = keys(400, depth, start, width)
    whole = -1 if width == 8 else (1 << 8 * width) - 1
    top = (1 << depth) - 1
    near = torch.stack([alpha, (alpha + 1) & top, (alpha - 1) & top], 1)
    low = (1 << (depth - start)) - 1
    same_top = (alpha.unsqueeze(1) & ~low & top) | (stream.tensor((400, 3)) & low)
    x = torch.cat([near, same_top, stream.tensor((400, 3)) & top], 1)
    (w0, b0), (w1, b1) = (dcf_eval(shape, CIPHER, p, seeds[p], words, bits, x) for p in (0, 1))
    agree = (x >> (depth - start)) == (alpha >> (depth - start)).unsqueeze(1)
    beta = beta.unsqueeze(1) & whole
    assert torch.equal((b0 + b1) & whole, beta * (agree & (x < alpha.unsqueeze(1))))
    if start:
        assert torch.equal((w0 + w1) & whole, beta * agree)


@pytest.mark.skipif(COMPILED.wait() is None, reason="this CPU has no AES instructions that are known")
@pytest.mark.parametrize(
    ("depth", "start", "width"), [(1, 0, 8), (2, 0, 1), (9, 6, 8), (12, 3, 2), (20, 0, 4), (63, 0, 8)]
)
def test_compiled_trees_are_those_over_the_library(
    depth: int, start: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, alpha, beta, seeds, stream, words, bits = keys(7, depth, start, width)
    x = stream.tensor((7, 5)) & ((1 << depth) - 1)
    fast = [dcf_eval(shape, CIPHER, p, seeds[p], words, bits, x) for p in (0, 1)]
    monkeypatch.setattr(COMPILED, "module", None)
    slow_words, slow_bits = dcf_keygen(shape, CIPHER, seeds, alpha, beta)
    assert torch.equal(words, slow_words) and torch.equal(bits, slow_bits)
    for p, found in enumerate(fast):
        for one, other in zip(found, dcf_eval(shape, CIPHER, p, seeds[p], words, bits, x), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("width", [1, 8])
def test_every_point_of_a_small_domain(width: int) -> None:
    shape, alpha, beta, seeds, _, words, bits = keys(64, 6, 0, width)
    whole = -1 if width == 8 else 255
    x = torch.arange(64).expand(64, 64).contiguous()
    one, two = (dcf_eval(shape, CIPHER, p, seeds[p], words, bits, x)[1] for p in (0, 1))
    below = one + two
    assert torch.equal(below & whole, (beta & whole).unsqueeze(1) * (x < alpha.unsqueeze(1)))


def test_one_partys_outputs_do_not_tell_the_secret() -> None:
    """Same points, opposite secrets: one party's evaluations look uniform, bit by bit, both times."""
    n, depth = 4000, 12
    stream = KeyStream(fresh_seed(), "test")
    shape = KeyShape(n, depth)
    x = torch.full((n, 1), 1 << 11)
    for alpha in (0, (1 << depth) - 1):
        seeds = stream.tensor((n, 2)), stream.tensor((n, 2))
        words, bits = dcf_keygen(
            shape, CIPHER, seeds, torch.full((n,), alpha), torch.ones(n, dtype=torch.int64)
        )
        _, below = dcf_eval(shape, CIPHER, 0, seeds[0], words, bits, x)
        words[:, ::2] ^= stream.tensor((n, shape.levels)) & 1  # zero by construction: the control bit's place
        bits, values = bits[:, : shape.levels], bits[:, shape.levels :].contiguous()
        for tensor in (below, words, values):
            ones = np.unpackbits(tensor.numpy().view(np.uint8).reshape(n, -1), axis=1).mean(0)
            assert abs(ones - 0.5).max() < 6 / (2 * n**0.5)
        assert abs(bits.float().mean() - 1.5) < 6 * 1.12 / bits.numel() ** 0.5  # two uniform bits


# ------------------------------------------------------------------------------- the key of a phase


def two_phases(mix: bool = False) -> Played:
    """max(x, 0) in two phases of one session. mix: a planted bug, the client stays in the first phase's."""
    x = torch.arange(-50, 50)

    def program(ops: Any, party: Party, rank: Rank) -> Any:
        found = []
        for phase in PHASES:
            before = party.trees
            party.begin(phase)
            if mix and before is not None and rank is Rank.CLIENT:
                party.trees = before
            assert party.trees is not None
            share = Share(ops.secret(x if rank is Rank.SERVER else None, x.shape, Rank.SERVER, 0).data, 0)
            found.append((party.trees.key, run(relu(ops.side, share, 16), party)))
        return found

    return play(program)


def outcomes(played: Played) -> list[bool]:
    right = torch.arange(-50, 50).clamp(min=0)
    return [
        torch.equal(one.data + two.data, right)
        for (_, one), (_, two) in zip(played.server, played.client, strict=True)
    ]


def test_each_session_and_phase_has_a_key_of_its_own() -> None:
    sessions = [two_phases(), two_phases()]
    for played in sessions:
        keys = [[key for key, _ in found] for found in (played.server, played.client, played.dealer)]
        assert keys[0] == keys[1] == keys[2]
        assert outcomes(played) == [True, True]
    assert len({key for played in sessions for key, _ in played.server}) == 4


def test_trees_of_another_phase_are_of_no_use() -> None:
    """The check above would see a party that is in another phase: its outputs are noise."""
    assert outcomes(two_phases(mix=True)) == [True, False]


def test_all_phases_of_a_session_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode program's own phases, as a session begins them, at all three."""
    made: list[tuple[str, str]] = []
    init = TreeCipher.__init__

    def noting(cipher: TreeCipher, session: str, phase: str) -> None:
        init(cipher, session, phase)
        made.append((phase, cipher.key.hex()))

    monkeypatch.setattr(TreeCipher, "__init__", noting)
    shape, policy = tiny.shape(), parse_policy("full")

    def program(ops: Any, party: Party, rank: Rank) -> None:
        mine = rank is Rank.SERVER
        session = Session(ops, party, shape, policy.bind(8, shape))
        session.setup(tiny.model(shape).weights if mine else None)
        prefill = tiny.prefilled(policy, shape, tiny.tokens(8)) if mine else None
        session.context(prefill, tiny.KERNELS if mine else None)
        for chunk in ([1, 2], [3], [4]):
            session.chunk(chunk if rank is Rank.CLIENT else None, len(chunk))

    play(program)
    phases = {"setup", "context", "question", "decode1", "decode2"}
    assert {phase for phase, _ in made} == phases and len(made) == 3 * len(phases)
    assert len(set(made)) == len({key for _, key in made}) == len(phases)


def test_shapes_need_no_key() -> None:
    assert tiny.cost("full", tiny.shape(), 8, [2]).total().rounds > 0
    with pytest.raises(RuntimeError, match="key trees before begin"):
        dcf_keygen(
            KeyShape(1, 4), None, (torch.zeros(1, 2).long(),) * 2, torch.zeros(1).long(), torch.ones(1).long()
        )
