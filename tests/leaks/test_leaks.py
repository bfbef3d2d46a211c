"""What a party sees does not tell the question, the needle's depth or the answer; and the tests would see."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from mpcache.config import PublicConfig
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.runtime import party, rng
from mpcache.runtime.rows_ahead import RowsAhead
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from tests.support import needle, step_index
from tests.support.leak_sessions import LOGITS, MEANT, SELECTS, STEPS, Views, by_reason, sessions
from tests.support.links import free_settings, grpc_networks
from tests.support.record import recording
from tests.support.uniformity import Bytes, above_chance, predicted, uniformity

COMPUTING = (Rank.SERVER, Rank.CLIENT)
LEAST = 45  # values of a reason that a test of it needs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return needle.model(tmp_path_factory.mktemp("needle"))


def seen(model: Model, policy: str, n: int, seed: int = 1, protocol: str = "fast") -> list[Views]:
    return [views for views, _ in sessions(model, needle.secrets_for(n, seed), policy, protocol)]


def suspicious(views: list[Views], received: bool = False) -> set[str]:
    """The reasons whose values, of all these sessions together, are not uniform at some party."""
    found, tested = set(), 0
    for rank in COMPUTING:
        for (why, _, _), values in by_reason((v[rank] for v in views), received).items():
            if len(values) >= LEAST:
                tested += 1
                if not uniformity(values).fine:
                    found.add(why)
    assert tested > 8
    return found


# ------------------------------------------------------------------------------------ the instrument


def test_the_model_finds_its_needle(model: Model) -> None:
    """What the secrets are about really happens: the private answer is the needle's digit."""
    secrets = needle.secrets_for(6, seed=3)
    answers = [report.text for _, report in sessions(model, secrets, "mpcache" + SELECTS)]
    assert answers == [f"{word} {word}" for word in (("zero", "one")[s.answer] for s in secrets)]


def test_all_bytes_of_the_peer_are_looked_at(model: Model) -> None:
    """Every byte that a computing party gets from the other is a share of a recorded opening."""
    (views,) = seen(model, "mpcache" + SELECTS, 1)
    for rank in COMPUTING:
        came = sum(len(data) for step, _, data in views[rank].tensors[rank.peer] if "seeds/" not in step)
        came -= sum(len(d) for step, _, d in views[rank].tensors[rank.peer] if step == "facts/tokenizer")
        padding = 8 * sum(layout.count(")") for _, layout, _ in views[rank].tensors[rank.peer])
        shares = sum(s.values.size for s in views[rank].opened)
        assert shares <= came <= shares + padding


# --------------------------------------------------------------------- sizes, order and timing slots


def check_slots(views: list[Views]) -> None:
    first = views[0]
    for other in views[1:]:
        for rank in Rank:
            assert other[rank].slots == first[rank].slots
            assert other[rank].order == first[rank].order


@pytest.mark.parametrize("policy", ["mpcache" + SELECTS, "mpcache:score=bound" + SELECTS.replace(":", ",")])
def test_what_is_seen_is_uniform_and_in_the_same_slots(model: Model, policy: str) -> None:
    views = seen(model, policy, 23)  # as many as the rarest opening needs
    check_slots(views)
    assert len(views[0][Rank.SERVER].order) > 100
    assert all(v[rank].said() == views[0][rank].said() for v in views for rank in Rank)
    assert suspicious(views) == MEANT  # and the test sees what is not masked
    assert suspicious(views, received=True) == set()  # not even the logits' share tells without one's own


@pytest.mark.slow
def test_stock_is_uniform_and_in_the_same_slots(model: Model) -> None:
    views = seen(model, "mpcache" + SELECTS, 3, protocol="stock")
    check_slots(views)
    assert suspicious(views) == {LOGITS}
    # CrypTen divides each share by 2^16 to truncate, so the logits' share is a number of 48 bits. The
    # client knows it anyway: it is the logits less its own.
    assert suspicious(views, received=True) == {LOGITS}


def test_the_dealer_hears_the_same_in_every_session(model: Model) -> None:
    """Not a byte differs but what is random: the nonce of the introduction, the names of set-ups, and B of
    what the server knows. No other tensor comes, and none from the client."""
    views = seen(model, "mpcache" + SELECTS, 3)
    for view in (v[Rank.DEALER] for v in views):
        assert view.said() == views[0][Rank.DEALER].said() and view.slots == views[0][Rank.DEALER].slots
        kinds = {kind for kind, *_ in view.slots[Rank.CLIENT]}
        assert kinds <= {"hello", "facts", "bye"} and not view.tensors[Rank.CLIENT]
        assert {step.partition("/")[0] for step, *_ in view.tensors[Rank.SERVER]} == {"setup", "context"}
    for width in {layout[:-1].rpartition(" ")[2] for _, layout, _ in masks_of(views)}:
        uploaded = b"".join(data for _, layout, data in masks_of(views) if layout.endswith(f" {width})"))
        assert uniformity(np.frombuffer(uploaded, np.uint8).reshape(-1, int(width))).fine


def masks_of(views: list[Views]) -> list[tuple[str, str, bytes]]:
    """What the server uploads to the dealer, of all these sessions."""
    return [tensor for v in views for tensor in v[Rank.DEALER].tensors[Rank.SERVER]]


# ------------------------------------------------------------------------------------- planted bugs


def plant(monkeypatch: pytest.MonkeyPatch, worse: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let all three expand other masks than they should; seeds stay as they are."""
    expand = party._expand

    def expanding(
        tape: Any, request: Any, rank: Rank, row: torch.Tensor | None = None
    ) -> tuple[list[Any], Iterator[torch.Tensor]]:
        values, shares = expand(tape, request, rank, row)
        masks = zip(values, request.random, strict=True)
        return [value if part.own else worse(value) for value, part in masks], shares

    monkeypatch.setattr(party, "_expand", expanding)
    rows = RowsAhead._rows
    monkeypatch.setattr(RowsAhead, "_rows", lambda *about: worse(rows(*about)))


def test_a_mask_of_zeros_is_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocols stay right without masks, so only such a test can tell. What arrives is uniform
    even then, being a share: what is opened is not."""
    plant(monkeypatch, torch.zeros_like)
    found = suspicious(seen(model, "mpcache" + SELECTS, 4))
    assert {"operand, masked", "activation, masked", "masked for truncation"} <= found


def test_a_mask_that_is_too_short_is_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda value: value & ((1 << 44) - 1) if value.dtype == torch.int64 else value)
    assert {"operand, masked", "activation, masked", "stream, masked"} <= suspicious(seen(model, "full", 4))


def repeated_words(views: list[Views]) -> int:
    """Opened words that come twice, in one session or in two. Of n random ones n^2 / 2^65 do."""
    opened: dict[Rank, list[Bytes]] = {rank: [] for rank in COMPUTING}
    for v in views:
        for rank in COMPUTING:
            opened[rank] += [s.values for s in v[rank].opened if s.width == 8 and s.why not in MEANT]
    repeated = 0
    for pieces in opened.values():
        words = np.concatenate(pieces).view(np.int64).ravel()
        assert len(words) > 1000
        repeated += len(words) - len(np.unique(words))
    return repeated


def test_no_mask_comes_twice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, document and question, six times over: nothing that is opened repeats. With
    the same seeds each time, all of it does."""
    same = needle.secrets_for(1, 5) * 6
    policy = "mpcache" + SELECTS
    assert repeated_words([views for views, _ in sessions(model, same, policy)]) == 0
    monkeypatch.setattr("mpcache_parties.seeds.fresh_seed", lambda: bytes(rng.SEED_BYTES))
    assert repeated_words([views for views, _ in sessions(model, same[:5], policy)]) > 1000


# --------------------------------------------------------------------------------------- classifiers


SESSIONS, TRAIN = 180, 110
QUESTIONS = {"question": 2, "depth": 4, "answer": 2}  # and their classes


def rows_of(model: Model, policy: str) -> tuple[dict[Rank, Bytes], dict[str, Any]]:
    """For each party a row of bytes per session; and what was secret in each."""
    secrets = needle.secrets_for(SESSIONS, seed=7)
    rows: dict[Rank, list[Bytes]] = {rank: [] for rank in COMPUTING}
    for views, _ in sessions(model, secrets, policy):
        for rank in COMPUTING:
            rows[rank].append(views[rank].words(STEPS))
    labels = {name: np.array([getattr(s, name) for s in secrets]) for name in QUESTIONS}
    return {rank: np.stack(r) for rank, r in rows.items()}, labels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_classifier_learns_nothing(model: Model) -> None:
    rows, labels = rows_of(model, "mpcache" + SELECTS)
    for rank in COMPUTING:
        for name, classes in QUESTIONS.items():
            right = predicted(rows[rank], labels[name], TRAIN)
            assert right < above_chance(SESSIONS - TRAIN, classes), (rank.label, name, right)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_classifier_learns_from_a_policy_that_leaks(model: Model) -> None:
    """step-index opens which clusters it chose: on each side of the document a needle, so the index
    tells question and depth; the answer it does not tell."""
    with step_index.registered():
        rows, labels = rows_of(model, "step-index" + SELECTS)
    for rank in COMPUTING:
        right = {name: predicted(rows[rank], labels[name], TRAIN) for name in QUESTIONS}
        assert right["question"] > 0.9 * (SESSIONS - TRAIN), (rank.label, right)
        assert right["depth"] > above_chance(SESSIONS - TRAIN, 4, sigmas=8), (rank.label, right)
        assert right["answer"] < above_chance(SESSIONS - TRAIN, 2), (rank.label, right)


def test_a_leak_is_declared_and_opened_with_its_reason(model: Model) -> None:
    """The declared leak is seen as such: its reason is the one suspicious opening beside the logits."""
    with step_index.registered():
        views = seen(model, "step-index" + SELECTS, 23)
    check_slots(views)
    assert suspicious(views) == {*MEANT, step_index.WHY}


def test_the_tokenizer_and_the_facts_are_all_that_is_said_in_the_clear(model: Model) -> None:
    """Names of facts, by who hears them, against what docs/threat-model.md says is public."""
    (views,) = seen(model, "mpcache" + SELECTS, 1)
    model_facts = {
        "shape", "model_digest", "tokenizer_bytes", "tokenizer_digest", "context_tokens", "kernels",
        "session", "template_bytes", "template_digest", "document",
    }  # fmt: skip
    question = {"question_tokens", "new_tokens", "private_tokens"}
    allowed = {"facts/model": model_facts, "facts/question": question, "more/decode1": {"more"}}
    allowed |= {step: {"digest"} for step in ("facts/held", "facts/seed")}
    masks = {"identifier", "layout", "bytes"}
    set_up = {
        (Rank.CLIENT, Rank.SERVER): masks,
        (Rank.DEALER, Rank.SERVER): masks | {"family", "keep"},
        (Rank.DEALER, Rank.CLIENT): {"identifier"},
    }
    heard = {Rank.SERVER: 10, Rank.CLIENT: 5, Rank.DEALER: 9}
    agreed = (
        r"(shape|plan\.layer\d+)\.\w+|(context|question|new|private)_tokens|document_chunks|eviction\.\w+|room|turns"
        r"|kernels|policy|protocol|session|document(_name)?|(model|tokenizer|template)_digest"
    )
    for rank, view in views.items():
        assert len(view.facts) == heard[rank]
        for peer, step, text in view.facts:
            if step == "facts/masks":
                assert set(json.loads(text)) == set_up[rank, peer]
            elif step == "facts/agreed":
                assert all(re.fullmatch(agreed, name) for name in json.loads(text))
            else:
                assert set(json.loads(text)) == allowed[step]


@pytest.mark.slow
def test_the_wire_carries_the_same(model: Model) -> None:
    """One session over real gRPC: the slots, openings and facts of one over local links, as uniform."""
    policy, (secret,) = "mpcache" + SELECTS, needle.secrets_for(1, 3)
    public = PublicConfig(policy=policy, max_new_tokens=2)

    def resources(links: Any) -> SessionResources:
        return SessionResources(links, Ledger(), public)

    jobs: dict[Rank, Any] = {
        Rank.SERVER: lambda links: serve(resources(links), Document(model, secret.document())),
        Rank.CLIENT: lambda links: ask(resources(links), Question(secret.text, stop_at_eos=False)),
        Rank.DEALER: lambda links: deal(resources(links)),
    }
    with (
        recording() as views,
        grpc_networks(free_settings(), *Rank) as networks,
        ThreadPoolExecutor(3) as pool,
    ):
        reports = pool.map(lambda network: jobs[network.rank](network.links), networks)
        assert [report.rank for report in reports] == [int(rank) for rank in Rank]
    (local,) = seen(model, policy, 1)
    for rank in Rank:
        assert views[rank].order == local[rank].order
        for peer in Rank:
            wired, here = ([s for s in v[rank].slots[peer] if len(s) > 1] for v in (views, local))
            assert wired == here
