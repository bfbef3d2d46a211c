"""SETUP and CONTEXT with masks that outlive a session: cold, warm, kept on disk, and wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.config import PublicConfig
from mpcache.errors import Mismatch, MpcacheError
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.runtime.rng import SEED_BYTES
from mpcache.runtime.standing import OwnersMasks
from mpcache.transport.frames import FrameLink
from mpcache_parties.masking import Progress, mask_ahead
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from mpcache_parties.set_up import SEED_STEP
from mpcache_parties.state.setups import DealerSetups, ServerSetups
from tests.support.links import context_of, plain_ids, together
from tests.support.session import QUESTION

S, C, D = Rank
PUBLIC = PublicConfig(policy="mpcache", max_new_tokens=2)
ASKED = Question(QUESTION, stop_at_eos=False)


def session(
    server: ServerSetups, dealer: DealerSetups, model: Model, tokens: list[int], said: list[str] | None = None
) -> dict[Rank, Any]:
    lines = [] if said is None else said
    return together(
        {
            S: lambda links, ledger: serve(
                SessionResources(links, ledger, PUBLIC, lines.append, setups=server), Document(model, tokens)
            ),
            C: lambda links, ledger: ask(SessionResources(links, ledger, PUBLIC, lines.append), ASKED),
            D: lambda links, ledger: deal(
                SessionResources(links, ledger, PUBLIC, lines.append, setups=dealer)
            ),
        }
    )


def uploaded(ends: dict[Rank, Any], phase: str) -> int:
    """Bytes that the server sent to the dealer; the answer is right, and the client got its seeds alone."""
    assert all(isinstance(end, Report) for end in ends.values()), ends
    assert ends[C].setup_bytes == 2 * SEED_BYTES
    assert ends[C].phases[phase].received == ends[C].phases[phase].offline_received == 0
    return int(ends[S].phases[phase].offline_sent)


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    return context_of(model, 40)


def test_the_second_session_sends_nothing(model: Model, tokens: list[int]) -> None:
    """Nor does another document's send the weights again."""
    server, dealer, right = ServerSetups(), DealerSetups(), plain_ids(model, PUBLIC, tokens, QUESTION)
    cold, warm = (session(server, dealer, model, tokens) for _ in range(2))
    other = session(server, dealer, model, tokens[:30])
    assert cold[C].token_ids == warm[C].token_ids == right
    assert [uploaded(ends, "setup") > 0 for ends in (cold, warm, other)] == [True, False, False]
    assert [uploaded(ends, "context") > 0 for ends in (cold, warm, other)] == [True, False, True]
    assert other[C].token_ids == plain_ids(model, PUBLIC, tokens[:30], QUESTION)


def test_processes_that_start_anew_find_it_again(model: Model, tokens: list[int], tmp_path: Path) -> None:
    first = session(ServerSetups(tmp_path), DealerSetups(tmp_path), model, tokens)
    again = session(ServerSetups(tmp_path), DealerSetups(tmp_path), model, tokens)
    assert again[C].token_ids == first[C].token_ids
    assert [uploaded(again, phase) for phase in ("setup", "context")] == [0, 0]
    (tmp_path / "server" / "masks.key").unlink()  # rotation: the old masks go
    old = set((tmp_path / "dealer").glob("*.masks"))
    rotated = session(ServerSetups(tmp_path), DealerSetups(tmp_path), model, tokens)
    assert uploaded(rotated, "setup") == uploaded(first, "setup") > 0
    assert len(old) == 2 and not old & set((tmp_path / "dealer").glob("*.masks"))


def test_a_fresh_document_has_a_name_of_its_own_each_time(
    model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str]] = []
    honest = FrameLink.send_facts

    def send(link: FrameLink, step: str, facts: dict[str, Any]) -> None:
        if link.me is S and link.peer is D and "identifier" in facts:
            said.append((facts["identifier"], facts["family"]))
        honest(link, step, facts)

    monkeypatch.setattr(FrameLink, "send_facts", send)
    server, dealer = ServerSetups(fresh_documents=True), DealerSetups()
    one, two = (session(server, dealer, model, tokens) for _ in range(2))
    assert one[C].token_ids == two[C].token_ids
    assert uploaded(one, "context") == uploaded(two, "context") > 0
    assert uploaded(two, "setup") == 0
    weights, documents = said[0::2], said[1::2]
    assert len(set(weights)) == 1 and len(set(documents)) == 2


def test_a_dealer_with_wrong_masks_is_found_before_the_question(model: Model, tokens: list[int]) -> None:
    server, dealer = ServerSetups(), DealerSetups()
    session(server, dealer, model, tokens)
    for name, held in dealer._held.items():
        dealer._held[name] = replace(held, digest="0" * 64)
    ends = session(server, dealer, model, tokens)
    assert isinstance(ends[S], Mismatch), ends
    assert "the dealer holds other masked weights than the server made" in str(ends[S])
    assert all(isinstance(end, MpcacheError) for end in ends.values())


def test_a_client_with_a_wrong_seed_is_found_before_its_question(
    model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FrameLink.recv

    def receive(link: FrameLink, step: str, *rest: Any) -> list[torch.Tensor]:
        tensors = honest(link, step, *rest)
        return [tensor ^ 1 for tensor in tensors] if step == SEED_STEP else tensors

    monkeypatch.setattr(FrameLink, "recv", receive)
    ends = session(ServerSetups(), DealerSetups(), model, tokens)
    assert isinstance(ends[S], Mismatch), ends
    assert "the client holds another seed of the masked weights" in str(ends[S])
    assert all(isinstance(end, MpcacheError) for end in ends.values())


def test_digests_and_seeds_go_where_they_belong(
    model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dealer gets neither seed nor digest of one; the server alone hears the digests of the two."""
    facts: list[tuple[Rank, Rank, str, set[str]]] = []
    tensors: list[tuple[Rank, Rank, str]] = []
    say, send = FrameLink.send_facts, FrameLink.send

    def said(link: FrameLink, step: str, what: dict[str, Any]) -> None:
        facts.append((link.me, link.peer, step, set(what)))
        say(link, step, what)

    def sent(link: FrameLink, step: str, what: Any, *rest: Any) -> None:
        tensors.append((link.me, link.peer, step))
        send(link, step, what, *rest)

    monkeypatch.setattr(FrameLink, "send_facts", said)
    monkeypatch.setattr(FrameLink, "send", sent)
    session(ServerSetups(), DealerSetups(), model, tokens)
    assert {(me, to) for me, to, _, names in facts if "digest" in names} == {(C, S), (D, S)}
    assert {(me, to) for me, to, step in tensors if step == SEED_STEP} == {(S, C)}
    to_dealer = {step.partition("/")[0] for _, to, step in tensors if to is D}
    assert to_dealer == {"setup", "context"}


def test_progress_tells_bytes_share_and_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 100.0, list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress(said.append, "dealer: weights received")
    assert not progress.at(0, 4000)
    now = 101.0
    assert not progress.at(500, 4000)
    now = 104.0
    assert progress.at(1000, 4000)
    now = 108.0
    assert not progress.at(4000, 4000)
    assert said == ["dealer: weights received: 1 kB of 4 kB (25 %), about 12 s left"]


def test_masks_made_before_a_session_are_those_it_uses(
    model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, said = ServerSetups(), list[str]()
    mask_ahead([Document(model, tokens)], PUBLIC, server, said.append)
    assert said[-1].startswith("server: ready: weights and document masked in")

    def again(*arguments: object) -> None:
        raise AssertionError("masked or read a second time")

    monkeypatch.setattr(OwnersMasks, "finish", again)
    monkeypatch.setattr("mpcache_parties.masking.prefill", again)
    ends = session(server, DealerSetups(), model, tokens)
    assert uploaded(ends, "setup") > 0
    assert ends[C].token_ids == plain_ids(model, PUBLIC, tokens, QUESTION)


def test_what_cannot_be_masked_ahead_is_said_and_the_server_goes_on(model: Model, tokens: list[int]) -> None:
    said: list[str] = []
    public = PUBLIC.model_copy(update={"policy": "mpcache:n_keep=5000"})
    mask_ahead([Document(model, tokens)], public, ServerSetups(), said.append)
    assert len(said) == 1 and said[0].startswith("server: nothing is masked ahead: policy mpcache")
