"""A party over several machines: equal to the bit, whatever is lost on the way, and one line if it cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.answer import TimedSession
from mpcache.cluster import ClusterError
from mpcache.config import PublicConfig
from mpcache.cost.sizing import PROCESS
from mpcache.errors import BadInput, PeerFailed
from mpcache.model import Model, load_model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.runtime.ring import matmul, narrow, wide
from mpcache.runtime.standing import OperandPlace, SeededMatrix
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from mpcache_parties.shard import cut
from mpcache_parties.sharding import Shards
from mpcache_parties.state.setups import DealerSetups, ServerSetups
from tests.support.cluster_here import ClusterHere
from tests.support.links import context_of, plain_ids, together
from tests.support.session import QUESTION

S, C, D = Rank
PUBLIC = PublicConfig(policy="full", max_new_tokens=2)
PLACE = OperandPlace("setup/layer0", (70, 45), 48, 16)


def spread(actors: int, me: Rank = S) -> Shards:
    return Shards(ClusterHere(), actors, me, lambda text: None)


def actors_of(shards: Shards) -> Any:
    return shards._cluster.started[0]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def stored(folder: Path) -> Model:
    return load_model(folder, keep=False)


def test_cuts_are_even_and_whole() -> None:
    assert cut(10, 4) == [(0, 2), (2, 5), (5, 7), (7, 10)] and cut(1, 3)[-1] == (0, 1)


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_weights_are_the_same_integers_and_products(stored: Model, actors: int) -> None:
    weights = spread(actors).weights(stored, 16)
    whole = torch.round(stored.weights.layers[1].w_down.double() * 2**16).long()
    matrix = weights.layer(1)("down")
    x = torch.arange(-3, 3 * whole.shape[0] - 3).reshape(3, -1) << 30
    assert torch.equal(wide(matrix), whole) and not matrix._fetched[1].numel()
    assert matrix.largest() == int(whole.abs().max())
    assert torch.equal(matmul(x, matrix), torch.matmul(x, whole))
    assert torch.equal(wide(weights.vocabulary("embed")), torch.round(stored.weights.embed.double() * 2**16))


@pytest.mark.parametrize("actors", [1, 2, 3])
@pytest.mark.parametrize("ring", [48, 64])
def test_v_is_the_same_by_rows(actors: int, ring: int) -> None:
    place = PLACE._replace(ring=ring)
    whole = SeededMatrix(bytes(32), 7, place)
    x = torch.arange(140).reshape(2, 70) << 40
    assert torch.equal(matmul(x, spread(actors, C).seeded(bytes(32), 7, place)), matmul(x, whole))


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_b_is_the_same(actors: int) -> None:
    shards = spread(actors, D)
    shards.room_for(PLACE.nbytes)
    whole = wide(SeededMatrix(bytes(32), 7, PLACE))
    matrix, x = shards.dealt(PLACE, narrow(whole, 48)), torch.arange(70).reshape(1, 70)
    assert torch.equal(wide(matrix), wide(narrow(whole, 48)))
    assert torch.equal(matmul(x, matrix) << 16, torch.matmul(x, whole) << 16)


def test_memory_is_asked_for_before_anything_is_loaded(stored: Model) -> None:
    one, two = spread(1), spread(2)
    one.weights(stored, 16), two.weights(stored, 16)
    asked = [shards._cluster.memory_asked for shards in (one, two)]  # type: ignore[attr-defined]
    assert asked[0][1] == 1 and asked[1][1] == 2 and PROCESS < asked[1][0] < asked[0][0]


def test_an_actor_that_was_lost_loads_its_part_again(stored: Model) -> None:
    shards = spread(2)
    matrix = shards.weights(stored, 16).layer(0)("qkv")
    x = torch.ones((1, matrix.shape[0]), dtype=torch.int64)
    before = matrix.times(x)
    actors_of(shards).lose(1)
    assert torch.equal(matrix.times(x), before)


def test_what_nobody_needs_is_dropped(stored: Model) -> None:
    shards = spread(2)
    matrix = shards.weights(stored, 16).layer(0)("o")
    matrix.largest()
    assert [len(shard._held) for shard in actors_of(shards).here] == [1, 1]
    del matrix
    assert [len(shard._held) for shard in actors_of(shards).here] == [0, 0]


# ------------------------------------------------------------------------------------------ sessions


def session(
    model: Model, tokens: list[int], shards: dict[Rank, Shards], timeout: float = 60
) -> dict[Rank, Any]:

    def resources(rank: Rank, links: Any, ledger: Any) -> SessionResources:
        setups = ServerSetups() if rank is S else DealerSetups() if rank is D else None
        return SessionResources(links, ledger, PUBLIC, setups=setups, shards=shards.get(rank))

    asked = Question(QUESTION, stop_at_eos=False)
    return together(
        {
            S: lambda links, ledger: serve(resources(S, links, ledger), Document(model, tokens)),
            C: lambda links, ledger: ask(resources(C, links, ledger), asked),
            D: lambda links, ledger: deal(resources(D, links, ledger)),
        },
        timeout,
    )


def test_a_session_over_actors_is_the_same_session(stored: Model, model: Model) -> None:
    """The answer, the rounds and the bytes; and no matrix is left in the driver."""
    tokens = context_of(model, 40)
    shards = {rank: spread(2 + (rank is C), rank) for rank in Rank}
    plain, over = session(stored, tokens, {}), session(stored, tokens, shards)
    assert all(isinstance(end, Report) for end in over.values()), over
    assert over[C].token_ids == plain[C].token_ids == plain_ids(model, PUBLIC, tokens, QUESTION)
    for rank in Rank:
        counts = [
            {name: (p.rounds, p.sent, p.received) for name, p in end.phases.items()}
            for end in (plain[rank], over[rank])
        ]
        assert counts[0] == counts[1]
    products = 4 * stored.shape.layers + 2
    assert len(actors_of(shards[S]).here[0]._held) == products
    assert all(actors_of(shards[rank]).calls >= products for rank in Rank)


def test_a_dealer_that_lost_an_actor_ends_the_session_with_one_line(
    stored: Model, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {D: spread(2, D)}
    chunk = TimedSession.chunk

    def losing(self: Any, *arguments: Any) -> Any:
        if self.party.rank is D or self.ops.side.device == "meta":
            actors_of(shards[D]).lose(0)
        return chunk(self, *arguments)

    monkeypatch.setattr(TimedSession, "chunk", losing)
    ends = session(stored, context_of(model, 40), shards)
    assert isinstance(ends[D], ClusterError) and "start the dealer anew" in str(ends[D])
    assert all(isinstance(ends[rank], PeerFailed) for rank in (S, C))
    assert all("machines of its own failed it" in str(ends[rank]) for rank in (S, C))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_ray_an_actor_that_is_killed_is_made_anew_and_the_answer_goes_on(
    stored: Model, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra `scale`")
    tokens, said = context_of(model, 40), list[str]()
    shards, chunk = Shards.open("local", 2, S, said.append), TimedSession.chunk

    def losing(self: Any, *arguments: Any) -> Any:
        if self.party is not None and self.ops.side.rank is S and self.ops.side.device != "meta":
            assert shards._actors is not None
            ray.kill(shards._actors._actors[0], no_restart=False)
        return chunk(self, *arguments)

    monkeypatch.setattr(TimedSession, "chunk", losing)
    try:
        ends = session(stored, tokens, {S: shards}, timeout=400)  # an actor takes as long as Python's start
    finally:
        shards.close()
    assert ends[C].token_ids == plain_ids(model, PUBLIC, tokens, QUESTION)
    assert re.fullmatch(r"server: 2 actors on local hold \d+ MB \d+ MB", said[0])


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(me=S, ray="local", offline_store="x"), "--offline-store"),
        (dict(me=S, ray="local", protocol="stock"), "--protocol stock"),
        (dict(me=D, ray="local", setup_dir=Path("x")), "--setup-dir"),
        (dict(me=S, ray="local", prepare_tokens=3, offline_store="x"), "belongs to the dealer"),
    ],
)
def test_what_cannot_go_with_ray_is_refused(options: dict[str, Any], said: str) -> None:
    given = PartyOptions(**options)
    with pytest.raises(BadInput, match=said):
        given.check_sharding(given.settings().public)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(me=S, ray_actors=2), "give --ray"), (dict(me=S, batches=2), "--batches"),
        (dict(me=D, batches=2), "--batches"),
    ],
)  # fmt: skip
def test_flags_that_stand_alone_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        PartyOptions(**options).check()
