"""Several turns in one session: the cache goes on, and each answer is the plain engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig
from mpcache.cost.reading import reading_plan
from mpcache.errors import BadInput, MpcacheError, PeerFailed
from mpcache.limits import bind_conversation
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Finish, Report, TurnReport
from mpcache.sampling import Sampling
from mpcache.transport import flow_control, frames, message
from mpcache.transport.frames import FrameLink
from mpcache_parties import asking
from mpcache_parties.private_inputs import Conversation, Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from tests.support.links import context_of, together
from tests.support.policy_specs import MORE, PRIVATE

S, C, D = Rank
QUESTIONS = ["the book of", " and the number", " is in"]
TOKENS = 4
NEAR = 0.02  # logits of the tiny model: two that are nearer than their errors may change places


@dataclass
class Scripted(Conversation):
    """Asks what a list says. stop_after: tokens of the first answer after which it has heard enough."""

    script: Sequence[Question]
    stop_after: int = 1000
    room: int = 0
    turns: list[TurnReport] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    shown: int = 0

    def opened(self, room: int) -> None:
        self.room = room

    def questions(self, look: Callable[[], None]) -> Iterator[Question]:
        for question in self.script:
            look()
            yield question

    def stopped(self) -> bool:
        return not self.turns and self.shown >= self.stop_after

    def answered(self, report: TurnReport) -> None:
        self.turns.append(report)

    def refused(self, why: BadInput) -> None:
        self.refusals.append(str(why))

    def token(self, token: int, text: str) -> None:
        self.shown += 1


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


def asked(*texts: str, **more: Any) -> list[Question]:
    return [Question(text, stop_at_eos=False, **more) for text in texts]


class Follows:
    """Sampling that chooses what was chosen in private, and notes how far that is from the likeliest."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.gaps = list(ids), list[float]()

    def chooser(self) -> Callable[[torch.Tensor], int]:
        def choose(logits: torch.Tensor) -> int:
            token = self.ids[len(self.gaps)]
            self.gaps.append(float(logits.max() - logits[token]))
            return token

        return choose


def check_turns(
    model: Model, public: PublicConfig, tokens: list[int], own: Scripted, limits: list[int]
) -> None:
    """Each answer has so many tokens, and each token is the plain engine's, or as likely but for the blur."""
    bound, _ = bind_conversation(model.shape, public, len(tokens))
    plain, pending = PlainConversation(model, bound, tokens), list[int]()
    assert [len(turn.token_ids) for turn in own.turns] == limits
    for text, turn in zip(QUESTIONS, own.turns, strict=False):
        follows, ids = Follows(turn.token_ids), turn.token_ids
        asked = pending + model.tokenizer.encode(text, bos=False)
        assert list(plain.ask(asked, len(ids), cast(Sampling, follows), ())) == ids
        assert max(follows.gaps) < NEAR
        pending = ids[-1:]  # chosen, and not taken in yet


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in PRIVATE.items()])
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
    plain, pending = PlainConversation(model, bound, tokens, "cpu", document, reading), list[int]()
    for turn, text in zip(own.turns, QUESTIONS, strict=False):
        question = pending + model.tokenizer.encode(text, bos=False)
        assert list(plain.ask(question, TOKENS, Sampling(), ())) == turn.token_ids
        pending = turn.token_ids[-1:]
