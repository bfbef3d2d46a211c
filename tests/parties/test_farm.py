"""Batches that a farm deals: one by several workers is the one that one dealer deals, to the bit."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.cluster import Cluster, ClusterError
from mpcache.config import PublicConfig
from mpcache.errors import BadInput
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.runtime.party import COMPUTING, DealerParty, PortionDealer
from mpcache.runtime.rng import KeyStream, fresh_seed
from mpcache_parties.facts import Facts, facts_of
from mpcache_parties.farm import BatchOrder, Farm, deal_portion
from mpcache_parties.portions import ALL_LAYERS, Portion, portions_of, worker_bytes
from mpcache_parties.prepare import price_batch, read_by_shapes
from mpcache_parties.state.spool import Spool
from tests.support.cluster_here import ClusterHere

Dealt = list[tuple[str, Rank, str, list[torch.Tensor]]]  # of each message its phase, to whom, its step

PUBLIC = PublicConfig(policy="full", max_new_tokens=3)
MPCACHE = "mpcache:coarse=8,fine=4,recent=4"
SESSIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "selection": ({"policy": MPCACHE}, {}),
    "selection shared by layers": ({"policy": "tidal:k=4"}, {}),
    "by bits": ({"policy": "full", "protocol": "fast-bits"}, {}),
    "CrypTen": ({"policy": "full", "protocol": "stock"}, {}),
    "tokens alone, padded": ({"policy": "full", "reveal": "token", "length_grid": 4}, {}),
    "a document of the client's": (
        {"private_policy": "snapkv:cap=0.5,queries=4", "document_chunk": 8},
        {"private": 20},
    ),
    "a conversation": ({"policy": MPCACHE}, {"question": 0, "turns": [4, 5]}),
    "a long question": ({"policy": "full"}, {"question": 70}),
}


def asked(model: Model, session: str) -> tuple[Facts, PublicConfig]:
    public, about = SESSIONS[session]
    config = PublicConfig.model_validate(PUBLIC.model_dump() | public)
    told = {"shape": model.shape.to_dict(), "context_tokens": about.get("context", 40)}
    question = {"question_tokens": about.get("question", 4), "new_tokens": 3, "turns": about.get("turns", [])}
    question["private_tokens"] = about.get("private", 0)
    return facts_of({"model": told, "question": question}, config), config


class Heard:
    """Stands for a link: notes what is sent in the phase under way."""

    def __init__(self, rank: Rank, heard: Dealt) -> None:
        self.rank, self.heard = rank, heard

    def send(self, step: str, tensors: list[torch.Tensor]) -> None:
        self.heard.append((step.partition("/")[0], self.rank, step, tensors))


def dealt_by_one(facts: Facts, public: PublicConfig, name: str, seeds: dict[Rank, bytes]) -> Dealt:
    heard: Dealt = []
    links: Any = {rank: Heard(rank, heard) for rank in COMPUTING}
    list(read_by_shapes(facts, public, DealerParty(links, name, seeds, Ledger())))
    return heard


def taken(phases: Iterator[tuple[str, list[dict[str, Any]]]]) -> Dealt:
    return [(phase, m["to"], m["step"], m["tensors"]) for phase, dealt in phases for m in dealt]


def assert_same(some: Dealt, others: Dealt) -> None:
    assert [row[:3] for row in some] == [row[:3] for row in others]
    for (*_, step, mine), (*_, theirs) in zip(some, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), step


@pytest.mark.parametrize(
    "session", [pytest.param(s, marks=[pytest.mark.slow] * (s == "CrypTen")) for s in SESSIONS]
)
def test_what_several_workers_deal_is_what_one_dealer_deals(
    session: str, model: Model, tmp_path: Path
) -> None:
    facts, public = asked(model, session)
    cluster = ClusterHere(workers=3)
    farm = Farm(cluster, Spool.at(str(tmp_path)))
    ((order, phases),) = farm.batches(1, facts, public, read_by_shapes, price_batch(facts, public))
    found = taken(phases)
    assert_same(found, dealt_by_one(facts, public, order.name, dict(order.seeds)))
    assert order.portion.layers is not None and not list(tmp_path.iterdir())


def test_each_layer_belongs_to_one_portion_and_portions_are_alike(model: Model) -> None:
    cost = price_batch(*asked(model, "full"))
    assert portions_of(cost, 0) == portions_of(cost, 1) == [ALL_LAYERS]
    everything = {*range(model.shape.layers), None}
    for count in (2, 3, 100):
        portions = portions_of(cost, count)
        assert len(portions) == min(count, len(everything))
        layers = [layer for portion in portions for layer in portion.layers or ()]
        assert len(layers) == len(everything) and set(layers) == everything
    two = [sum(len(p.layers or ()) for p in portions_of(cost, 2)[i : i + 1]) for i in range(2)]
    assert abs(two[0] - two[1]) <= 2
    assert worker_bytes(cost, portions_of(cost, 3)) < worker_bytes(cost, [ALL_LAYERS])


def test_a_batch_is_divided_where_workers_would_be_idle(model: Model, tmp_path: Path) -> None:
    facts, public = asked(model, "full")
    cost, cluster = price_batch(facts, public), ClusterHere(workers=4)
    for batches, portions in ((1, 4), (2, 2), (3, 1), (9, 1)):
        farm = Farm(cluster, Spool.at(str(tmp_path)))
        next(farm.batches(batches, facts, public, read_by_shapes, cost))
        assert cluster.memory_asked == (worker_bytes(cost, portions_of(cost, portions)), 1)


def test_a_step_is_not_dealt_without_the_masks_it_is_made_for(model: Model) -> None:
    """A plan that tears a layer from its weights ends; it does not deal what fits nothing."""
    facts, public = asked(model, "full")
    links: Any = {rank: Heard(rank, []) for rank in COMPUTING}
    seeds = {rank: fresh_seed() for rank in COMPUTING}
    torn = PortionDealer(
        links, "x", seeds, Ledger(), mine=lambda step: step.startswith("question/"), needed=ALL_LAYERS.needs
    )
    with pytest.raises(RuntimeError, match="only the dealer derives"):
        list(read_by_shapes(facts, public, torn))


@pytest.mark.parametrize("skipped", [0, 1, 15, 16, 1000])
def test_a_stream_that_skips_goes_on_where_one_that_reads_does(skipped: int) -> None:
    seed = fresh_seed()
    one, other = KeyStream(seed, "a", 5), KeyStream(seed, "a", 5)
    assert one.read(7) == other.read(7)
    one.read(skipped)
    other.skip(skipped)
    room = bytearray(40)
    other.fill(memoryview(room))
    assert one.read(40) == room and one.read(3) == other.read(3)


def test_a_farm_removes_its_own_files_alone(model: Model, tmp_path: Path) -> None:
    facts, public = asked(model, "full")
    other = tmp_path / f"{secrets.token_hex(16)}-setup-0.dealt"
    other.write_text("another dealer's")
    farm = Farm(ClusterHere(), Spool.at(str(tmp_path)))
    _, phases = next(farm.batches(2, facts, public, read_by_shapes, price_batch(facts, public)))
    next(phases)
    assert len(list(tmp_path.iterdir())) > 1
    farm.close()
    assert list(tmp_path.iterdir()) == [other]


def test_one_place_for_several_machines_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClusterHere, "nodes", [{}, {}])
    monkeypatch.setattr(Cluster, "join", lambda address: ClusterHere())
    with pytest.raises(BadInput, match="its 2 machines deal into one place; give --offline-store"):
        Farm.open("auto", None)


# ------------------------------------------------------------------------------------------- on Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="Ray is not installed: the extra `scale`")
    with Cluster.join("local", workers=2) as joined:
        yield joined


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_two_workers_deal_one_batch_to_the_bit_into_a_url(
    cluster: Cluster, model: Model, tmp_path: Path
) -> None:
    facts, public = asked(model, "selection")
    farm = Farm(cluster, Spool.at(tmp_path.as_uri()))
    ((order, phases),) = farm.batches(1, facts, public, read_by_shapes, price_batch(facts, public))
    found = taken(phases)
    assert_same(found, dealt_by_one(facts, public, order.name, dict(order.seeds)))
    assert order.portion.layers is not None and not list(tmp_path.iterdir())


def dying(facts: Facts, public: PublicConfig, party: Any) -> Iterator[str]:
    for phase in read_by_shapes(facts, public, party):
        yield phase
        if phase == "question" and party._mine("question/layer0/qkv"):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_a_worker_that_is_killed_is_one_line(cluster: Cluster, model: Model, tmp_path: Path) -> None:
    facts, public = asked(model, "full")
    farm = Farm(cluster, Spool.at(str(tmp_path)))
    ((_, phases),) = farm.batches(1, facts, public, dying, price_batch(facts, public))
    with pytest.raises(ClusterError, match="batch 1 of 1 is lost: its worker died"):
        taken(phases)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_too_little_memory_is_said_before_anything_is_dealt(
    cluster: Cluster, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, public = asked(model, "full")
    monkeypatch.setattr("mpcache_parties.portions.PROCESS", 10**15)
    farm = Farm(cluster, Spool.at(str(tmp_path)))
    with pytest.raises(BadInput, match=r"workers need 1000000\.\d GB each, 1 at once; the machines offer"):
        next(farm.batches(1, facts, public, read_by_shapes, price_batch(facts, public)))
    assert not list(tmp_path.iterdir())


def test_orders_are_pickled_with_their_place(model: Model, tmp_path: Path) -> None:
    facts, public = asked(model, "full")
    seeds = {rank: fresh_seed() for rank in COMPUTING}
    spool = Spool.at(tmp_path.as_uri())
    order = BatchOrder(
        facts, public, read_by_shapes, "x", seeds, spool, bytes(32), Portion(1, frozenset({0}))
    )
    ((_, phase),) = list(ClusterHere().stream(deal_portion, [(order,)]))[:1]
    assert phase == "setup" and [file.name for file in tmp_path.iterdir()][0].startswith("x-")
