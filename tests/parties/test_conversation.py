"""Several turns in one session: the cache goes on, and each answer is the plain engine's."""

from __future__ import annotations

from typing import Any

import pytest

from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig
from mpcache.cost.reading import reading_plan
from mpcache.errors import MpcacheError, PeerFailed
from mpcache.limits import bind_conversation
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Finish, Report
from mpcache.sampling import Sampling
from mpcache.transport import flow_control, frames, message
from mpcache.transport.frames import FrameLink
from mpcache_parties import asking
from mpcache_parties.private_inputs import Document
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from tests.support.conversation import QUESTIONS, Scripted, asked, check_turns
from tests.support.links import context_of, together
from tests.support.policy_specs import MORE, PRIVATE

S, C, D = Rank
TOKENS = 4
OFTEN = ("full", "streaming", "snapkv", "h2o", "quest", "mpcache", "compact", "delta")


def converse(
    public: PublicConfig, model: Model, tokens: list[int], own: Scripted, wanted: int | None = None
) -> dict[Rank, Any]:
    """The three parties as threads; what each ended with. wanted: new tokens, by the client's own config."""
    less = public if wanted is None else public.model_copy(update={"max_new_tokens": wanted})
    return together(
        {
            S: lambda links, ledger: serve(SessionResources(links, ledger, public), Document(model, tokens)),
            C: lambda links, ledger: ask(SessionResources(links, ledger, less, on_token=own.token), own),
            D: lambda links, ledger: deal(SessionResources(links, ledger, public)),
        }
    )


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=name, marks=() if name in OFTEN else pytest.mark.slow)
        for name, spec in PRIVATE.items()
    ],
)
def test_each_turn_is_answered_as_in_plaintext(spec: str, model: Model) -> None:
    public, tokens = PublicConfig(policy=spec, max_new_tokens=TOKENS), context_of(model, 24)
    own = Scripted(asked(*QUESTIONS))
    reports = converse(public, model, tokens, own)
    assert all(isinstance(report, Report) for report in reports.values()), reports
    check_turns(model, public, tokens, own, [TOKENS] * 3)
    assert [turn.finish for turn in own.turns] == [Finish.LENGTH] * 3
    assert own.room - own.turns[-1].room == sum(turn.question_tokens + TOKENS - 1 for turn in own.turns)
    turns = [["question", "decode1", "decode2", "decode3"]] + [
        [f"turn{n}-{name}" for name in ("question", "decode1", "decode2", "decode3")] for n in (2, 3)
    ]
    for report in reports.values():
        assert list(report.phases) == ["setup", "context", *sum(turns, [])]
    assert sum(turn.rounds for turn in own.turns) == sum(
        phase.rounds for name, phase in reports[C].phases.items() if name not in ("setup", "context")
    )


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dealer that may be ahead by a part of a token only."""

    def room(sender: Rank, receiver: Rank, agreed: bool) -> int:
        return 64 << 10 if sender is D else flow_control.queue_room(sender, receiver, agreed)

    monkeypatch.setattr(frames, "queue_room", room)
    monkeypatch.setattr(message, "CHUNK_BYTES", 4 << 10)


@pytest.mark.parametrize("spec", ["full", MORE["mpcache, shared, summed, refreshed"], PRIVATE["h2o"]])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_answer_that_is_stopped_leaves_the_cache_as_it_was(
    spec: str, stop_after: int, model: Model, little_room: None
) -> None:
    """What the dealer was ahead is undone: in the middle of a tape, or after it."""
    public, tokens = PublicConfig(policy=spec, max_new_tokens=8), context_of(model, 24)
    own = Scripted(asked(*QUESTIONS), stop_after)
    reports = converse(public, model, tokens, own)
    assert all(isinstance(report, Report) for report in reports.values()), reports
    check_turns(model, public, tokens, own, [stop_after, 8, 8])
    assert own.turns[0].finish is Finish.STOPPED


def test_an_answer_that_is_stopped_when_the_dealer_is_far_ahead(model: Model) -> None:
    public, tokens = PublicConfig(policy="full", max_new_tokens=8), context_of(model, 24)
    own = Scripted(asked(*QUESTIONS), 3)
    converse(public, model, tokens, own)
    check_turns(model, public, tokens, own, [3, 8, 8])


def test_a_client_may_ask_for_fewer_tokens_than_agreed(model: Model) -> None:
    public, tokens = PublicConfig(policy="full", max_new_tokens=8), context_of(model, 24)
    own = Scripted([*asked(QUESTIONS[0], new_tokens=2), *asked(QUESTIONS[1], new_tokens=100)])
    converse(public, model, tokens, own)
    check_turns(model, public, tokens, own, [2, 8])
    own = Scripted(asked(QUESTIONS[0]))
    converse(public, model, tokens, own, wanted=3)
    check_turns(model, public, tokens, own, [3])


def test_a_question_without_room_is_refused_and_the_session_goes_on(model: Model) -> None:
    public = PublicConfig(policy="full", max_new_tokens=4, conversation_tokens=24)
    own = Scripted(asked(QUESTIONS[0], "the gate " * 20, QUESTIONS[1]))
    reports = converse(public, model, context_of(model, 24), own)
    assert all(isinstance(report, Report) for report in reports.values()), reports
    (line,) = own.refusals
    assert "the session has room for" in line and "begin a new conversation" in line
    assert [turn.number for turn in own.turns] == [1, 2]
    assert own.turns[1].room >= 0 and own.room == 24


def test_a_turn_without_room_is_refused_by_the_others(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def announce(links: dict[Rank, FrameLink], number: int, turn: Any) -> None:
        for link in links.values():
            link.send_facts(f"turn/{number}", {"question_tokens": 5000, "new_tokens": 4})

    monkeypatch.setattr(asking, "announce_turn", announce)
    public = PublicConfig(policy="full", max_new_tokens=4)
    ends = converse(public, model, context_of(model, 24), Scripted(asked(QUESTIONS[0])))
    assert "asks 5000 tokens and wants up to 4; the session has room for 104," in str(ends[S])
    assert all(isinstance(end, MpcacheError) for end in ends.values())
    assert isinstance(ends[C], PeerFailed)


def test_no_question_at_all(model: Model) -> None:
    reports = converse(PublicConfig(policy="full"), model, context_of(model, 24), Scripted([]))
    assert all(isinstance(report, Report) for report in reports.values()), reports
    assert reports[C].token_ids == [] and list(reports[C].phases) == ["setup", "context"]


def test_a_conversation_about_the_clients_own_document(model: Model) -> None:
    public = PublicConfig(policy="full", max_new_tokens=TOKENS, document_chunk=8)
    tokens, own = context_of(model, 24), Scripted(asked(*QUESTIONS[:2]))
    own.document = "the gate of the city was shut and the number is in the book"
    document = model.tokenizer.encode(own.document, bos=False)
    reading = reading_plan(model.shape, public, len(tokens), len(document), "fast")
    reports = converse(public, model, tokens, own)
    assert all(isinstance(report, Report) for report in reports.values()), reports
    bound, room = bind_conversation(model.shape, public, len(tokens), len(document))
    assert own.room == room == model.shape.max_positions - len(tokens) - len(document)
    plain, pending = PlainConversation(model, bound, tokens, private=document, reading=reading), list[int]()
    for turn, text in zip(own.turns, QUESTIONS, strict=False):
        question = pending + model.tokenizer.encode(text, bos=False)
        assert list(plain.ask(question, TOKENS, Sampling(), ())) == turn.token_ids
        pending = turn.token_ids[-1:]
