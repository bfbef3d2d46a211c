"""Tapes of a whole conversation: turn by turn where they fit, without a dealer, each batch once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig
from mpcache.cost.reading import reading_plan
from mpcache.errors import BadInput, Desync, MpcacheError, StateError
from mpcache.limits import bind_conversation
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Finish, Report
from mpcache_parties import turns as turns_module
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.prepare import prepare
from mpcache_parties.private_inputs import DeclaredTurns, Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, serve
from mpcache_parties.state.tapes import SEED, TapeStore
from tests.support.conversation import QUESTIONS, Follows, Scripted, asked
from tests.support.links import Job, context_of, together

S, C, D = Rank
PUBLIC = PublicConfig(policy="full", max_new_tokens=3)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    """A context of 24 tokens."""
    return context_of(model, 24)


def lengths(model: Model, questions: list[str] = QUESTIONS) -> tuple[int, ...]:
    return tuple(len(model.tokenizer.encode(text, bos=False)) for text in questions)


def prepared(
    model: Model, tokens: list[int], place: Path, turns: tuple[int, ...], public: PublicConfig = PUBLIC,
    document: str | None = None,
) -> list[str]:  # fmt: skip
    """What the three have said when a batch is there."""
    said: list[str] = []
    owns: dict[Rank, Any] = {S: Document(model, tokens), C: DeclaredTurns(turns, document), D: None}
    stores = {rank: None if rank is D else TapeStore(place, rank) for rank in Rank}

    def job(rank: Rank) -> Job:
        return lambda links, ledger: prepare(
            rank, SessionResources(links, ledger, public, say=said.append, tapes=stores[rank]), owns[rank]
        )

    ends = together({rank: job(rank) for rank in Rank})
    for store in stores.values():
        if store is not None:
            store.close()
    assert ends == dict.fromkeys(Rank), ends
    return said


def converse(
    model: Model, tokens: list[int], place: Path, own: Scripted | Question, said: list[str] | None = None,
    public: PublicConfig = PUBLIC,
) -> dict[Rank, Any]:  # fmt: skip
    """Server and client alone, with what they have in store."""
    stores = {rank: TapeStore(place, rank) for rank in (S, C)}
    notes = [] if said is None else said
    show = own.token if isinstance(own, Scripted) else lambda token, text: None
    try:
        return together(
            {
                S: lambda links, ledger: serve(
                    SessionResources(links, ledger, public, say=notes.append, tapes=stores[S]),
                    Document(model, tokens),
                ),
                C: lambda links, ledger: ask(
                    SessionResources(links, ledger, public, say=notes.append, on_token=show, tapes=stores[C]),
                    own,
                ),
            }
        )
    finally:
        for store in stores.values():
            store.close()


def check_filled(model: Model, tokens: list[int], own: Scripted) -> None:
    """Each answer is the plain engine's, which takes all tokens of the answer before in, filled up alike."""
    blank = model.tokenizer.encode("\n", bos=False)[-1]
    bound, _ = bind_conversation(model.shape, PUBLIC, len(tokens))
    plain, before = PlainConversation(model, bound, tokens), list[int]()
    for text, turn in zip(QUESTIONS, own.turns, strict=False):
        encoded = before + model.tokenizer.encode(text, bos=False)
        sampling: Any = Follows(turn.token_ids)
        assert list(plain.ask(encoded, len(turn.token_ids), sampling, ())) == turn.token_ids
        assert max(sampling.gaps) < 0.02
        # All but the last of these were taken in with the answer.
        filled = turn.token_ids + [blank] * (PUBLIC.max_new_tokens - len(turn.token_ids))
        before = filled[len(turn.token_ids) - 1 :]


def test_a_conversation_uses_its_tapes_turn_by_turn(model: Model, tokens: list[int], tmp_path: Path) -> None:
    """An answer that is stopped is filled up; what does not fit is told, and the conversation goes on."""
    turns = lengths(model)
    said = prepared(model, tokens, tmp_path, turns)
    about = f"3 turns, questions of {', '.join(map(str, turns))} tokens, answers of up to 3"
    foretold, dealt = (next(t for t in said if t.startswith(f"dealer: {w}")) for w in ("dealing", "dealt"))
    assert about in foretold
    (one, unit), (other, same) = (line.split()[2:4] for line in (foretold, dealt))
    assert unit == same and float(one) == pytest.approx(float(other), rel=0.01)
    (batch,) = (tmp_path / "client").glob(f"*/{SEED}.tape")
    names = {file.name.removesuffix(".tape") for file in batch.parent.iterdir()}
    assert {"question", "decode3", "turn2-question", "turn3-decode3"} < names

    heard: list[str] = []
    script = asked(*QUESTIONS)
    script.insert(1, Question("the gate of the city and the number", stop_at_eos=False))
    own = Scripted([*script, *asked("one more")], stop_after=2)
    ends = converse(model, tokens, tmp_path, own, heard)
    assert all(isinstance(end, Report) for end in ends.values()), ends
    assert {f"{rank.label}: prepared: {about}" for rank in (S, C)} < set(heard)
    assert [len(turn.token_ids) for turn in own.turns] == [2, 3, 3]
    assert [turn.finish for turn in own.turns] == [Finish.STOPPED, Finish.LENGTH, Finish.LENGTH]
    check_filled(model, tokens, own)
    wrong, over = own.refusals
    assert f"the tapes of turn 2 are for {turns[1]}; ask one of {turns[1]}, or" in wrong
    assert f"the tapes were for {about}, and are used up" in over

    again = converse(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)))
    with pytest.raises(StateError, match=r"context, a conversation and 3 tokens .*refused: 1\)"):
        raise again[S]


@SLOW
def test_with_padding_tapes_are_for_any_question_within_a_length(
    model: Model, tokens: list[int], tmp_path: Path
) -> None:
    public = PUBLIC.model_copy(update={"length_grid": 8})
    said = prepared(model, tokens, tmp_path, (6, 8, 1), public)
    foretold, dealt = (next(t for t in said if t.startswith(f"dealer: {w}")) for w in ("dealing", "dealt"))
    assert "3 turns, questions of 8, 8, 8 tokens" in foretold
    assert float(foretold.split()[2]) == pytest.approx(float(dealt.split()[2]), rel=0.01)
    script = asked(*QUESTIONS)
    script.insert(1, Question("the gate of the city and the number", stop_at_eos=False))
    assert lengths(model)[0] < lengths(model, [script[1].text])[0] and len({*lengths(model)}) > 1
    own = Scripted(script, stop_after=2)
    ends = converse(model, tokens, tmp_path, own, public=public)
    assert all(isinstance(end, Report) for end in ends.values()), ends
    assert [turn.question_tokens for turn in own.turns] == [8, 8, 8]
    assert [len(turn.token_ids) for turn in own.turns] == [2, 3, 3]
    check_filled(model, tokens, own)
    (wrong,) = own.refusals
    assert "16 tokens with what stands around it, the tapes of turn 2 are for 8; ask one of 1 to 8" in wrong


@SLOW
def test_tapes_are_for_a_document_of_the_clients_own_too(
    model: Model, tokens: list[int], tmp_path: Path
) -> None:
    """Any document of that length, evicted as they were dealt for; none of another length."""
    rule = {"private_policy": "snapkv:cap=0.5,queries=4", "document_chunk": 8}
    public, own = PUBLIC.model_copy(update=rule), "the book of the gate"
    prepared(model, tokens, tmp_path, lengths(model)[:1], public, own)
    longer = Scripted(asked(QUESTIONS[0]))
    longer.document = f"{own} of the city"
    assert all(isinstance(end, MpcacheError)
               for end in converse(model, tokens, tmp_path, longer, public=public).values())  # fmt: skip
    other = Scripted(asked(QUESTIONS[0]))
    other.document = "the gate of the book"
    ends = converse(model, tokens, tmp_path, other, public=public)
    assert all(isinstance(end, Report) for end in ends.values()), ends
    assert ends[C].private_kept < ends[C].private_tokens and "eviction" in ends[C].phases
    private, asking = (model.tokenizer.encode(text, bos=False) for text in (other.document, QUESTIONS[0]))
    bound, _ = bind_conversation(model.shape, public, len(tokens), len(private))
    reading = reading_plan(model.shape, public, len(tokens), len(private), "fast")
    plain = PlainConversation(model, bound, tokens, private=private, reading=reading)
    sampling: Any = Follows(other.turns[0].token_ids)
    assert list(plain.ask(asking, 3, sampling, ())) == other.turns[0].token_ids
    assert max(sampling.gaps) < 0.02


@SLOW
def test_tapes_of_one_answer_and_of_a_conversation_are_not_mixed(
    model: Model, tokens: list[int], tmp_path: Path
) -> None:
    prepared(model, tokens, tmp_path, lengths(model))
    for end in converse(model, tokens, tmp_path, Question(QUESTIONS[0], stop_at_eos=False)).values():
        assert isinstance(end, MpcacheError)
    assert list((tmp_path / "server").glob(f"*/{SEED}.tape"))  # nothing of it was used


@SLOW
def test_a_turn_that_is_not_the_tapes_is_refused_by_the_server(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = turns_module.announce_turn

    def other(links: Any, number: int, turn: Any) -> None:
        announce(links, number, turns_module.TurnSizes(7, 2))

    monkeypatch.setattr("mpcache_parties.asking.announce_turn", other)
    prepared(model, tokens, tmp_path, lengths(model))
    end = converse(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)))[S]
    with pytest.raises(Desync, match=r"begins turn 1 as .*question=7.*, the tapes are for .*question="):
        raise end


@pytest.mark.parametrize(
    "flags", [{"turns": "3"}, *({"turns": turns, "prepare_tokens": 2} for turns in ("3,x", "", "0"))], ids=str
)
def test_turns_that_say_nothing(flags: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="--turns"):
        PartyOptions(C, **flags).check()
    with pytest.raises(BadInput, match="--turns belongs to the client"):
        PartyOptions(S, turns="3", prepare_tokens=2).check()
