"""A conversation that is cut off in a turn, or between turns, goes on there: same answers, new masks."""

from __future__ import annotations

import threading
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpcache.config import PublicConfig
from mpcache.errors import Desync, MpcacheError, StateError
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Finish, Report
from mpcache_parties import turns
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.store import Store
from mpcache_parties.turns import TurnSizes
from tests.support.conversation import QUESTIONS, Scripted, asked, check_turns
from tests.support.interrupted import Cut, Heard, die_at, differences, hear, repeated_keys
from tests.support.links import Job, Killed, context_of, together
from tests.support.uniformity import largest_deviation

S, C, D = Rank
SLOW = pytest.mark.slow
PUBLIC = PublicConfig(policy="full", max_new_tokens=3)


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    """A context of 24 tokens."""
    return context_of(model, 24)


def play(
    model: Model, tokens: list[int], state: Path | None, own: Scripted | Question, resume: bool = False,
    cut: Cut | None = None, public: PublicConfig = PUBLIC, heard: Heard | None = None,
) -> dict[Rank, Any]:  # fmt: skip
    """The three parties as threads; what each ended with. A cut ends one, and so its links."""
    keepers = {rank: Checkpointer(Store(state, rank) if state else None, resume) for rank in Rank}
    show = own.token if isinstance(own, Scripted) else lambda token, text: None
    parties: dict[Rank, Any] = {
        S: partial(serve, own=Document(model, tokens)), C: partial(ask, own=own), D: deal,
    }  # fmt: skip

    def job(rank: Rank) -> Job:
        def run(links: dict[Rank, Any], ledger: Any) -> Any:
            if heard is not None:
                heard.ranks[threading.get_ident()] = rank
            if cut is not None and rank is cut.victim:
                die_at(links, cut)
            resources = SessionResources(links, ledger, public, on_token=show, checkpointer=keepers[rank])
            try:
                return parties[rank](resources)
            finally:
                keepers[rank].close()

        return run

    return together({rank: job(rank) for rank in Rank})


def check_whole(ends: dict[Rank, Any], state: Path) -> None:
    assert all(isinstance(end, Report) for end in ends.values()), ends
    assert not list(state.glob("*/*/*"))  # nothing of it stays


CUTS = {
    "client in the middle of a later answer": Cut(C, "turn2-decode1", 20),
    "server in the middle of a later question": Cut(S, "turn2-question", 20),
    "client in the first question": Cut(C, "question", 20),
    "client when it has an answer": Cut(C, "turn/2"),
    "dealer when it has dealt a turn": Cut(D, "dealt/1"),
    "dealer ahead in a later answer": Cut(D, "turn2-decode2", 3),
    "server in the last answer": Cut(S, "turn3-decode2", 5),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == next(iter(CUTS)) else SLOW) for case in CUTS]
)
def test_it_goes_on_at_the_turn_where_it_was(
    case: str, model: Model, tokens: list[int], tmp_path: Path
) -> None:
    cut = CUTS[case]
    first = Scripted(asked(*QUESTIONS))
    ends = play(model, tokens, tmp_path, first, cut=cut)
    assert isinstance(ends[cut.victim], Killed), ends
    own = Scripted(asked(*QUESTIONS))
    check_whole(ends := play(model, tokens, tmp_path, own, resume=True), tmp_path)
    check_turns(model, PUBLIC, tokens, own, [3] * 3)
    assert own.turns[: len(first.turns)] == first.turns  # accounts, too
    told = [token for turn in own.turns[len(first.turns) :] for token in turn.token_ids]
    assert own.ids == told  # the interrupted answer from its beginning, and none of the complete ones
    assert [turn.question for turn in own.turns] == QUESTIONS
    shown = first.ids[3 * len(first.turns) :]
    assert told[: len(shown)] == shown  # what was shown stays
    for name, phase in ends[C].phases.items():
        assert phase.sent == ends[S].phases[name].received
    question, one, two = (ends[C].phases[f"turn2-{name}"] for name in ("question", "decode1", "decode2"))
    assert own.turns[1].rounds == question.rounds + one.rounds + two.rounds


@SLOW
@pytest.mark.parametrize(
    "spec", ["h2o", "mpcache:coarse=8,fine=4,recent=4,refresh=3", "compact:counts=joint"]
)
def test_policies_remember_earlier_turns(spec: str, model: Model, tokens: list[int], tmp_path: Path) -> None:
    public = PublicConfig(policy=spec, max_new_tokens=3)
    ends = play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)), False, Cut(S, "turn2-decode2"), public)
    assert isinstance(ends[S], Killed), ends
    own = Scripted(asked(*QUESTIONS))
    check_whole(play(model, tokens, tmp_path, own, resume=True, public=public), tmp_path)
    check_turns(model, public, tokens, own, [3] * 3)


@pytest.mark.parametrize(
    "cut", [Cut(C, "turn/2"), pytest.param(Cut(D, "turn2-question", 5), marks=SLOW)], ids=str
)
def test_what_the_dealer_was_ahead_is_forgotten(
    cut: Cut, model: Model, tokens: list[int], tmp_path: Path
) -> None:
    """An answer that was stopped: no step of what was dealt beyond it may pass for one of the next turn."""
    public = PUBLIC.model_copy(update={"max_new_tokens": 8})
    ends = play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS), stop_after=2), cut=cut, public=public)
    assert isinstance(ends[cut.victim], Killed), ends
    own = Scripted(asked(*QUESTIONS))
    check_whole(play(model, tokens, tmp_path, own, resume=True, public=public), tmp_path)
    check_turns(model, public, tokens, own, [2, 8, 8])
    assert own.turns[0].finish is Finish.STOPPED


def test_no_mask_is_used_twice_in_a_later_turn(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of single answers: new keys for all streams, and what the redone step opens is independent."""
    heard = hear(monkeypatch)
    for cut in (Cut(C, "turn2-decode1", 60), None):
        heard.opened.append(defaultdict(list))
        play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)), cut is None, cut, heard=heard)
    assert len(heard.keys) > 50 and repeated_keys(heard) == 0
    data = np.concatenate(list(differences(heard, "turn2-decode1")))
    assert len(data) > 10_000
    assert largest_deviation(data) < 6


@pytest.fixture
def cut_off(model: Model, tokens: list[int], tmp_path: Path) -> Path:
    """The state of a conversation that was cut in its second answer."""
    play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)), cut=Cut(S, "turn2-decode2", 3))
    return tmp_path


def test_another_turn_in_place_of_the_one_that_was_begun_is_refused(
    model: Model, tokens: list[int], cut_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it cost the conversation: the next run goes on."""
    announce = turns.announce_turn

    def longer(links: Any, number: int, turn: TurnSizes | None) -> None:
        announce(links, number, None if turn is None else TurnSizes(turn.question + 1, turn.limit))

    with monkeypatch.context() as patch:
        patch.setattr("mpcache_parties.asking.announce_turn", longer)
        ends = play(model, tokens, cut_off, Scripted(asked(*QUESTIONS)), resume=True)
    assert any(isinstance(ends[rank], Desync) for rank in (S, D))
    assert any("which is not the turn 2 that it began" in str(ends[rank]) for rank in (S, D))
    own = Scripted(asked(*QUESTIONS))
    check_whole(play(model, tokens, cut_off, own, resume=True), cut_off)
    check_turns(model, PUBLIC, tokens, own, [3] * 3)


@SLOW
def test_a_single_answer_does_not_go_on_with_a_conversation(
    model: Model, tokens: list[int], cut_off: Path
) -> None:
    ends = play(model, tokens, cut_off, Question("the gate of"), resume=True)
    with pytest.raises(StateError, match="begun with another kind of session .a conversation then"):
        raise ends[C]
    assert all(isinstance(end, MpcacheError) for end in ends.values())


@SLOW
def test_foreign_and_damaged_files_of_a_conversation(model: Model, tokens: list[int], cut_off: Path) -> None:
    """A note of another step is not used; a damaged one, and one of another party, is named."""
    note = next((cut_off / "client").glob("*/note.state"))
    content = note.read_bytes()
    step = sorted((cut_off / "client").glob("*/0*.state"))[-1]
    server = sorted((cut_off / "server").glob("*/0*.state"))[-1].read_bytes()
    good = step.read_bytes()
    for words, bad in {"its rank is 0": server, "is damaged": good[:-1]}.items():
        step.write_bytes(bad)
        end = play(model, tokens, cut_off, Scripted(asked(*QUESTIONS)), resume=True)[C]
        assert isinstance(end, StateError) and words in str(end) and str(step) in str(end)
    step.write_bytes(good)
    note.write_bytes(content[: len(content) // 2])  # it is of an earlier step: its header is enough
    own = Scripted(asked(*QUESTIONS))
    check_whole(play(model, tokens, cut_off, own, resume=True), cut_off)


@SLOW
def test_a_damaged_note_is_named(model: Model, tokens: list[int], tmp_path: Path) -> None:
    play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)), cut=Cut(C, "turn/2"))
    (note,) = (tmp_path / "client").glob("*/note.state")
    content = note.read_bytes()
    note.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    end = play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)), resume=True)[C]
    with pytest.raises(StateError, match="note.state: is damaged.*; remove it to go on without it"):
        raise end
    note.write_bytes(content)
    check_whole(play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)), resume=True), tmp_path)


def test_steps_do_not_grow_with_the_conversation(model: Model, tokens: list[int], tmp_path: Path) -> None:
    """Each holds what was added to the last step of the turn before, which stays as long as the session."""
    texts = [QUESTIONS[0]] * 3
    cut = Cut(C, "turn3-decode2", 5)
    first = Scripted(asked(*texts))
    play(model, tokens, tmp_path, first, cut=cut)
    for rank in Rank:
        (folder,) = (tmp_path / rank.label).glob("*/")
        sizes = {int(f.stem): f.stat().st_size for f in folder.glob("0*.state")}
        assert {3, 6, 7, 8} <= set(sizes)  # one and two are too old
        assert max(sizes[6], sizes[8]) < 1.5 * sizes[3]
    own = Scripted(asked(*texts))
    check_whole(play(model, tokens, tmp_path, own, resume=True), tmp_path)
    check_turns(model, PUBLIC, tokens, own, [3] * 3, texts)


@SLOW
def test_padded_turns_go_on(model: Model, tokens: list[int], tmp_path: Path) -> None:
    public = PUBLIC.model_copy(update={"length_grid": 8})
    ends = play(model, tokens, tmp_path, Scripted(asked(*QUESTIONS)), False, Cut(S, "turn2-decode2"), public)
    assert isinstance(ends[S], Killed), ends
    own = Scripted(asked(*QUESTIONS))
    check_whole(play(model, tokens, tmp_path, own, resume=True, public=public), tmp_path)
    check_turns(model, PUBLIC, tokens, own, [3] * 3)
    assert [turn.question_tokens for turn in own.turns] == [8] * 3
