"""What is really opened, by whom it is seen, and that nothing of it follows from a secret."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import pytest
import torch

from mpcache.ledger import Ledger
from mpcache.ops import Ops, Value
from mpcache.policy import POLICIES, LayerView, ReadingPlan, parse_policy
from mpcache.policy.full import Full
from mpcache.protocols import compaction
from mpcache.rank import Rank
from mpcache.runtime.party import ComputingParty, Party
from mpcache.runtime.program import Open, Opening, Program, local
from mpcache.session import Session
from tests.support.play import play
from tests.support.policy_specs import CONTEXT, MORE, PRIVATE, marked
from tests.support.tiny_policies import KERNELS, chunks, model, plain, prefilled, shape, tokens

SPECS = [
    *[pytest.param(spec, id=name, marks=marked(name)) for name, spec in PRIVATE.items()],
    *[pytest.param(spec, id=name, marks=pytest.mark.slow) for name, spec in MORE.items()],
]
OWN = 14  # tokens of the client's document
LOGITS, VERDICT = "logits for the client", "whether all was in range"
RANKS, ORDER = "ranks of shuffled rows", "order of shuffled rows"


@dataclass
class TensorTrace:
    """One session. values: what a computing party learns from openings, by its rank and the reason.
    reasons: of all openings, with the recipient (None: both).  logits: at the client."""

    values: dict[tuple[Rank, str], torch.Tensor]
    reasons: set[tuple[str, Rank | None]]
    logits: list[torch.Tensor]
    ledgers: dict[Rank, Ledger]


@cache
def watch(spec: str, secrets: int = 0, run: int = 0, private: str = "", padded: bool = False) -> TensorTrace:
    """A session whose weights, documents and question come from `secrets`; `run` tells repetitions apart.

    private: the policy by which a document of the client's is evicted; none: it has none.  padded: how long
    that document is comes from `secrets`, too.
    """
    s, own = shape(), tokens(OWN, 7 + secrets)[2 + secrets if padded else 0 :]
    context, ask = tokens(CONTEXT, 1 + secrets), chunks(2, 1, 1, seed=2 + secrets)
    values: dict[tuple[Rank, str], list[torch.Tensor]] = defaultdict(list)
    reasons: set[tuple[str, Rank | None]] = set()

    def program(ops: Ops, party: Party, rank: Rank) -> list[Any]:
        policy = parse_policy(spec)
        if isinstance(party, ComputingParty):
            opening = party.open

            def note(items: Sequence[Opening], step: str) -> list[Any]:
                opened = opening(items, step)
                for item, value in zip(items, opened, strict=True):
                    reasons.add((item.why, item.to))
                    if value is not None:
                        values[rank, item.why].append(value.flatten().clone())
                return opened

            party.open = note  # type: ignore[method-assign]
        session = Session(ops, party, s, policy.bind(CONTEXT, s), grid=OWN if padded else 1)
        mine = rank is Rank.SERVER
        session.setup(model(s, secrets).weights if mine else None)
        known = prefilled(policy, s, context, secrets) if mine else None
        session.context(known, KERNELS if mine else None)
        if private:
            reading = ReadingPlan((5, OWN - 5), parse_policy(private).on_shares(OWN, s))
            for _ in session.read_document(reading, own if rank is Rank.CLIENT else None):
                pass
        return [session.chunk(chunk if rank is Rank.CLIENT else None, len(chunk)) for chunk in ask]

    played = play(program)
    joined = {key: torch.cat(parts) for key, parts in values.items()}
    return TensorTrace(joined, reasons, played.client, played.ledgers)


def assert_masked(one: TensorTrace, two: TensorTrace) -> None:
    """Two runs on the same secrets open values that are as unlike as fresh draws; the logits apart."""
    assert one.values.keys() == two.values.keys()
    for key, first in one.values.items():
        if key == (Rank.CLIENT, LOGITS):
            continue
        if key == (Rank.CLIENT, VERDICT):
            assert not first.any(), "all was in range: nothing but that is told"
            continue
        equal = float((first == two.values[key]).double().mean())
        chance = 1 / min(256, max(2, len(torch.unique(first)) // 2))  # a bit's, or less for wider values
        limit = chance + 6 * (chance * (1 - chance) / len(first)) ** 0.5
        assert equal <= limit, (*key, equal, limit, len(first))


@pytest.mark.parametrize("spec", SPECS)
def test_openings_are_those_declared(spec: str) -> None:
    """Leak class none: the client sees its logits, and that all was in range; the rest is masked afresh."""
    assert parse_policy(spec).leak == "none"
    one, two = watch(spec), watch(spec, run=1)
    assert one.reasons == two.reasons
    assert {(why, to) for why, to in one.reasons if to is not None} == {
        (LOGITS, Rank.CLIENT),
        (VERDICT, Rank.CLIENT),
    }
    assert (Rank.SERVER, LOGITS) not in one.values
    want, _ = plain(spec, shape(), tokens(CONTEXT), chunks(2, 1, 1))
    assert all((a - b).abs().max() < 0.02 for a, b in zip(one.logits, want, strict=True))
    assert_masked(one, two)


@pytest.mark.parametrize("spec", SPECS)
def test_ledgers_do_not_depend_on_secrets(spec: str) -> None:
    """Weights, document and question differ; each step of each party's ledger is equal."""
    one, two = watch(spec), watch(spec, secrets=5)
    for rank in Rank:
        ours, theirs = ({k: asdict(e) for k, e in seen.ledgers[rank].steps.items()} for seen in (one, two))
        assert ours == theirs


class Leaky(Full):
    """Opens each query without a mask."""

    name = "leaky"

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        secret: Any = q
        yield Open((Opening(secret.data, "queries, masked"),))
        return (yield from super().attend(view, q))


def test_an_opening_without_a_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "leaky", Leaky)
    with pytest.raises(AssertionError, match="queries, masked"):
        assert_masked(watch("leaky"), watch("leaky", run=1))


SNAPKV = "snapkv:cap=7,queries=3,pool=3"
EVICTED: list[dict[str, Any]] = [
    {"spec": "full", "private": "full"},
    {"spec": "full", "private": SNAPKV},
    {"spec": "full", "private": "mpcache:n_keep=8,sink=1,recent=2", "padded": True},
    {"spec": "mpcache:coarse=4,fine=2,sink=0,recent=2", "private": "h2o:heavy=3,recent=3"},  # by position
]


@pytest.mark.parametrize("case", EVICTED, ids=lambda case: str(case["private"]).partition(":")[0])
def test_a_document_of_the_clients_opens_nothing(case: dict[str, Any]) -> None:
    """Neither its reading nor its eviction tells anything to anybody: ranks of shuffled rows are as new."""
    one, two, private = watch(**case), watch(run=1, **case), case["private"]
    assert {(why, to) for why, to in one.reasons if to is not None} == {
        (LOGITS, Rank.CLIENT),
        (VERDICT, Rank.CLIENT),
    }
    assert ((Rank.SERVER, RANKS) in one.values) == (private != "full")
    assert_masked(one, two)


@pytest.mark.parametrize("case", EVICTED, ids=lambda case: str(case["private"]).partition(":")[0])
def test_ledgers_do_not_depend_on_the_clients_document(case: dict[str, Any]) -> None:
    one, two = watch(**case), watch(secrets=5, **case)
    for rank in Rank:
        ours, theirs = ({k: asdict(e) for k, e in seen.ledgers[rank].steps.items()} for seen in (one, two))
        assert ours == theirs


def test_ranks_of_rows_that_nobody_shuffled_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "shuffle", lambda side, rows, knows: local(list(rows)))
    one, two = (watch("full", run=run, private=SNAPKV) for run in (2, 3))
    with pytest.raises(AssertionError, match=RANKS):
        assert_masked(one, two)


def test_of_a_document_of_many_tokens_the_order_of_shuffled_rows_alone_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is as new each time, and sizes do not depend on secrets; without the shuffle that is seen."""
    monkeypatch.setattr(compaction, "LONG", 3)
    one, two = (watch("full", run=run, private=SNAPKV) for run in (4, 5))
    other = watch("full", secrets=6, private=SNAPKV)
    assert (Rank.SERVER, ORDER) in one.values and (Rank.SERVER, RANKS) not in one.values
    assert_masked(one, two)
    for rank in Rank:
        ours, theirs = ({k: asdict(e) for k, e in seen.ledgers[rank].steps.items()} for seen in (one, other))
        assert ours == theirs
    monkeypatch.setattr(compaction, "shuffle", lambda side, rows, knows: local(list(rows)))
    with pytest.raises(AssertionError, match=ORDER):
        assert_masked(*(watch("full", run=run, private=SNAPKV) for run in (6, 7)))
