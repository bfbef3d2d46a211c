"""A session that is cut off anywhere goes on where it was, with the same answer and with new masks."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpcache.config import PublicConfig
from mpcache.engines import fast
from mpcache.errors import BadInput, Desync, MpcacheError, StateError
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.runtime.rng import fresh_seed
from mpcache.sampling import Sampling
from mpcache.transport.local import local_pair
from mpcache_parties import facts
from mpcache_parties import seeds as session_seeds
from mpcache_parties.handshake import KeepMode
from mpcache_parties.operations.status import SessionStatus
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import AHEAD, ask, deal, serve
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.store import KEPT_STEPS, Files, Store
from tests.support.interrupted import Cut, Heard, die_at, differences, hear, repeated_keys
from tests.support.links import Job, Killed, context_of, plain_ids, together
from tests.support.uniformity import largest_deviation

S, C, D = Rank
QUESTION = Question("the gate of", stop_at_eos=False)
TOKENS = 6
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    """A context of 60 tokens."""
    return context_of(model, 60)


def play(
    public: PublicConfig,
    model: Model,
    tokens: list[int],
    state: Path | None,
    resume: bool = False,
    cut: Cut | None = None,
    question: Question = QUESTION,
    heard: Heard | None = None,
    shown: list[int] | None = None,
) -> dict[Rank, Any]:
    """The three parties as threads; what each ended with. A cut ends one, and so its links."""
    keepers = {rank: Checkpointer(Store(state, rank) if state else None, resume) for rank in Rank}

    def on_token(token: int, text: str) -> None:
        if shown is not None and token >= 0:  # not what was held back until the end
            shown.append(token)

    parties: dict[Rank, Any] = {
        S: partial(serve, own=Document(model, tokens)),
        C: partial(ask, own=question),
        D: deal,
    }

    def job(rank: Rank) -> Job:
        def run(links: dict[Rank, Any], ledger: Ledger) -> Report:
            if heard is not None:
                heard.ranks[threading.get_ident()] = rank
            if cut is not None and rank is cut.victim:
                die_at(links, cut)
            try:
                resources = SessionResources(
                    links, ledger, public, on_token=on_token, checkpointer=keepers[rank]
                )
                report: Report = parties[rank](resources)
                return report
            finally:
                keepers[rank].close()

        return run

    return together({rank: job(rank) for rank in Rank})


SHORT = "client-in-mid-token"
CUTS = {
    "server-at-the-question": Cut(S, "question", 30),
    "client-at-the-first-message": Cut(C, "decode1"),
    "server-in-mid-token": Cut(S, "decode2", 40),
    "client-in-mid-token": Cut(C, "decode4", 25),
    "dealer-ahead": Cut(D, "decode4", 20),
}


@pytest.mark.parametrize("case", [SHORT, *(pytest.param(c, marks=SLOW) for c in CUTS if c != SHORT)])
def test_the_answer_is_the_same_after_a_cut(
    case: str, model: Model, tokens: list[int], tmp_path: Path
) -> None:
    public = PublicConfig(policy="mpcache:coarse=8,fine=4,recent=4", max_new_tokens=TOKENS)
    first = play(public, model, tokens, tmp_path, cut=CUTS[case])
    assert isinstance(first[CUTS[case].victim], Killed)
    assert all(isinstance(end, Killed | MpcacheError) for end in first.values()), first
    held = {rank: len(list((tmp_path / rank.label).glob("*/0*.state"))) for rank in Rank}
    assert all(n <= KEPT_STEPS for n in held.values())
    sizes = [file.stat().st_size for file in tmp_path.glob("*/*/0*.state")]
    assert max(sizes, default=0) < 60_000  # what a step adds; the whole cache is more than twice that

    shown: list[int] = []
    reports = play(public, model, tokens, tmp_path, resume=True, shown=shown)
    assert all(isinstance(report, Report) for report in reports.values()), reports
    assert reports[C].token_ids == shown == plain_ids(model, public, tokens, QUESTION.text)
    names = ["setup", "context", "question", *(f"decode{i}" for i in range(1, TOKENS))]
    for rank in Rank:
        assert list(reports[rank].phases) == names  # the account is of the whole session
        assert not list((tmp_path / rank.label).glob("*/*"))  # and nothing of it stays
    for name in names:
        ours, theirs, tape = (reports[rank].phases[name] for rank in Rank)
        assert (ours.sent, ours.received) == (theirs.received, theirs.sent)
        assert tape.offline_sent == ours.offline_received + theirs.offline_received


POLICIES: dict[str, Any] = {
    "full": "fast", "snapkv": "fast", "h2o": "fast", "tova": "fast", "streaming": "fast", "quest": "fast",
    "mpcache:coarse=8,fine=4,recent=4,refresh=3": "fast", "mpcache:threshold=0.05": "fast",
    "mpcache:coarse=8,fine=4,recent=4,refresh=2": "stock", "compact:counts=joint": "fast",
    "compact:heads=9/12,counts=equal|quest:page=4,pages=2": "fast",
}  # fmt: skip


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, marks=() if "refresh=3" in spec else SLOW) for spec in POLICIES]
)
def test_every_policy_remembers(spec: str, model: Model, tokens: list[int], tmp_path: Path) -> None:
    """All that a policy keeps beside the cache comes back, at all three; no plain run has a near tie here."""
    public = PublicConfig(policy=spec, max_new_tokens=4, protocol=POLICIES[spec])
    first = play(public, model, tokens[:44], tmp_path, cut=Cut(S, "decode3"))
    assert isinstance(first[S], Killed), first
    reports = play(public, model, tokens[:44], tmp_path, resume=True)
    assert reports[C].token_ids == plain_ids(model, public, tokens[:44], QUESTION.text)


@SLOW
def test_cut_again_and_again(model: Model, tokens: list[int], tmp_path: Path) -> None:
    """Each run goes a little further; the dealer, ahead, goes back each time."""
    public = PublicConfig(policy="full", max_new_tokens=TOKENS)
    for i, victim in enumerate((S, C, D, S)):
        ends = play(public, model, tokens, tmp_path, resume=i > 0, cut=Cut(victim, f"decode{i + 1}", 3))
        assert isinstance(ends[victim], Killed), ends
    reports = play(public, model, tokens, tmp_path, resume=True)
    assert reports[C].token_ids == plain_ids(model, public, tokens, QUESTION.text)


@SLOW
def test_drawn_tokens_are_drawn_once(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut between the client's checkpoint and the server's: what was shown stays, and so do the draws.

    Three sessions draw the same from logits that are the same: with little of the noise that differs.
    """
    monkeypatch.setattr(fast, "BLUR_BITS", 15)
    public = PublicConfig(policy="full", max_new_tokens=TOKENS)
    question = Question(QUESTION.text, Sampling(temperature=1.0, seed=5), stop_at_eos=False)
    whole = play(public, model, tokens, None, question=question)[C].token_ids
    shown: list[int] = []
    play(public, model, tokens, tmp_path, cut=Cut(S, "decode3", 9), question=question, shown=shown)
    assert shown == whole[:3]
    newest = sorted((tmp_path / "server").glob("*/0*.state"))[-1]
    newest.unlink()  # as if the server had been killed before it wrote the last one
    again: list[int] = []
    reports = play(public, model, tokens, tmp_path, resume=True, question=question, shown=again)
    assert reports[C].token_ids == again == whole


# ---------------------------------------------------------------------------------- nothing comes twice


def twice(public: PublicConfig, model: Model, tokens: list[int], state: Path, heard: Heard) -> None:
    """A run that is cut in decode step 2, and the one that goes on with it."""
    cuts = [Cut(C, "decode2", 60), None]
    for i, cut in enumerate(cuts):
        heard.opened.append(defaultdict(list))
        play(public, model, tokens, state, resume=i > 0, cut=cut, heard=heard)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    return hear(monkeypatch)


PUBLIC = PublicConfig(policy="mpcache:coarse=8,fine=4,recent=4", max_new_tokens=4)


def test_no_mask_is_used_twice(model: Model, tokens: list[int], tmp_path: Path, heard: Heard) -> None:
    """Every stream of the resumed run has a key that no stream had before it, at each party; so no
    position of any stream is read again. What the redone step opens is independent of what it opened
    before: the difference is uniform, though the secrets are the same."""
    twice(PUBLIC, model, tokens, tmp_path, heard)
    assert len(heard.keys) > 2 * 3 * TOKENS
    assert repeated_keys(heard) == 0
    data = np.concatenate(list(differences(heard, "decode2")))
    assert len(data) > 20_000
    assert largest_deviation(data) < 6


def test_a_planted_bug_is_seen(
    model: Model, tokens: list[int], tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If seeds were kept in the checkpoint, the redone step would open the same masks: both checks see it."""
    kept: dict[tuple[Rank, int], bytes] = {}
    calls: dict[tuple[int, Rank], int] = defaultdict(int)

    def restored() -> bytes:
        rank = heard.ranks[threading.get_ident()]
        calls[len(heard.opened), rank] += 1
        return kept.setdefault((rank, calls[len(heard.opened), rank]), fresh_seed())

    monkeypatch.setattr(session_seeds, "fresh_seed", restored)
    twice(PUBLIC, model, tokens, tmp_path, heard)
    assert repeated_keys(heard) > 0
    assert largest_deviation(np.concatenate(list(differences(heard, "decode2")))) > 6


@SLOW
def test_no_seed_and_no_open_mask_is_on_disk(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint is made of, before it is sealed, holds none of the session's seeds."""
    from mpcache_parties.state import sealed

    seeds: list[bytes] = []
    bodies: list[bytes] = []
    write = sealed.seal

    def noted() -> bytes:
        seeds.append(fresh_seed())
        return seeds[-1]

    def spied(file: Path, key: bytes, header: Any, body: Any) -> int:
        bodies.append(b"".join(map(bytes, body)))
        return write(file, key, header, [bodies[-1]])

    monkeypatch.setattr(session_seeds, "fresh_seed", noted)
    monkeypatch.setattr(sealed, "seal", spied)
    play(PUBLIC, model, tokens, tmp_path)
    assert len(seeds) == 6 and len(bodies) == 3 * 5
    assert not any(seed in body for seed in seeds for body in bodies)


# ------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def cut_off(model: Model, tokens: list[int], tmp_path: Path) -> Path:
    """The state of a session that was cut in its third decode step."""
    play(
        PublicConfig(policy="full", max_new_tokens=TOKENS), model, tokens, tmp_path, cut=Cut(S, "decode3", 3)
    )
    return tmp_path


OTHERS: dict[str, tuple[Rank, Callable[[], dict[str, Any]], str]] = {
    "config": (S, lambda: {"public": PublicConfig(policy="full", max_new_tokens=7)}, r"_tokens \(6 then, 7"),
    "document": (S, lambda: {"shift": 1}, "begun with another document; resume with what"),
    "question": (C, lambda: {"question": Question("the book", stop_at_eos=False)}, "with another question;"),
    "sampling": (C, lambda: {"question": Question("the gate of", Sampling(0.5), False)}, "another sampling"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", ["document", *(pytest.param(c, marks=SLOW) for c in OTHERS if c != "document")]
)
def test_what_differs_from_the_first_run_is_named(
    case: str, model: Model, tokens: list[int], cut_off: Path
) -> None:
    rank, changes, words = OTHERS[case]
    given: dict[str, Any] = {"public": PublicConfig(policy="full", max_new_tokens=TOKENS), **changes()}
    if given.pop("shift", 0):
        tokens = [*tokens[:-1], tokens[0]]
    ends = play(given.pop("public"), model, tokens, cut_off, resume=True, **given)
    assert all(isinstance(end, MpcacheError) for end in ends.values())
    # A config is the same at all three: the first to compare tells the others.
    own = ends.values() if case == "config" else [ends[rank]]
    assert any(isinstance(end, StateError) and re.search(words, str(end)) for end in own), ends


def test_another_model_is_refused(model: Model, tokens: list[int], cut_off: Path) -> None:
    public = PublicConfig(policy="full", max_new_tokens=TOKENS)
    model = replace(model, digest="0" * 64)
    with pytest.raises(StateError, match="begun with another model"):
        raise play(public, model, tokens, cut_off, resume=True)[S]


def test_files_that_are_not_the_party_s(model: Model, tokens: list[int], cut_off: Path) -> None:
    """Truncated, changed, of another rank, of another key: one line that says which file and what to do."""
    public = PublicConfig(policy="full", max_new_tokens=TOKENS)
    mine = sorted((cut_off / "client").glob("*/0*.state"))
    content, other = mine[-1].read_bytes(), sorted((cut_off / "server").glob("*/0*.state"))[-1].read_bytes()
    middle = len(content) // 2
    changes = {
        "damaged, was changed": content[:-1],
        "is damaged, was changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "its rank is 0, this party's is 1": other,
        "is of format 1": content[:7] + b"\x01" + content[8:],
        "is not a file that mpcache wrote": b"PK" + content[2:],
        "is damaged": content[:40],
    }
    for words, bad in changes.items():
        mine[-1].write_bytes(bad)
        end = play(public, model, tokens, cut_off, resume=True)[C]
        assert isinstance(end, StateError) and "\n" not in str(end)
        assert words in str(end) and str(mine[-1]) in str(end) and "remove it to go back" in str(end)
    mine[-1].unlink()  # the advice works
    reports = play(public, model, tokens, cut_off, resume=True)
    assert reports[C].token_ids == plain_ids(model, public, tokens, QUESTION.text)


@SLOW
def test_old_files_put_back_are_not_mixed_with_new_ones(
    model: Model, tokens: list[int], cut_off: Path
) -> None:
    """A dealer's files from before a resumed run fit no step of that run: wrong masks would give a wrong
    answer in silence, so steps carry the run that they are of."""
    public = PublicConfig(policy="full", max_new_tokens=TOKENS)
    dealer = next((cut_off / "dealer").glob("*/"))
    old = {file: file.read_bytes() for file in dealer.glob("0*.state")}
    assert len(old) > AHEAD
    play(public, model, tokens, cut_off, resume=True, cut=Cut(S, "decode5"))
    for file in dealer.glob("0*.state"):
        file.unlink()
    for file, content in old.items():
        file.write_bytes(content)
    reports = play(public, model, tokens, cut_off, resume=True)
    assert reports[C].token_ids == plain_ids(model, public, tokens, QUESTION.text)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="client: no session to resume in .*: start without --resume"):
        Checkpointer(Store(tmp_path, C), resume=True).check()


def test_a_session_that_runs_is_not_resumed(model: Model, tokens: list[int], cut_off: Path) -> None:
    """One line, which peers get to read too; the one that runs keeps its files."""
    store = Store(cut_off, S)
    running = Files(store, store.sessions()[0])
    before = running.steps()
    ends = play(PublicConfig(policy="full", max_new_tokens=TOKENS), model, tokens, cut_off, resume=True)
    for rank in Rank:
        assert re.search("server: the session kept as .* still runs; end that run first", str(ends[rank]))
    assert running.steps() == before
    running.close()


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    """A client can be back before the others know that it was gone."""
    name = "0" * 32
    (server, one), (client, other) = (local_pair(Ledger(), Ledger(), rank, D) for rank in (S, C))
    store = Store(tmp_path, D)
    running = Files(store, name)
    running.write(0, name, {})
    for patience, words in ((0.0, "still runs"), (60.0, "no step in common")):
        keeper = Checkpointer(store, serving=1, patience=patience)
        keeper.heard({S: KeepMode.AS_CLIENT, C: KeepMode.RESUMED})
        client.send_facts("resume/session", {"session": name, "run": "1" * 32})
        if patience:
            threading.Timer(0.5, running.close).start()
            for link in (server, client):
                link.send_facts("resume/steps", {"steps": []})
        with pytest.raises(StateError, match=words):
            keeper.meet({S: one, C: other}, {})
        assert keeper.last is None


def test_a_new_session_takes_nobody_s_name(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is not written over, whatever a server calls its session."""
    monkeypatch.setattr(facts, "secrets", SimpleNamespace(token_hex=lambda n: "ab" * n))
    public = PublicConfig(policy="full", max_new_tokens=TOKENS)
    play(public, model, tokens, tmp_path, cut=Cut(S, "decode3", 3))
    files = {file: file.read_bytes() for file in tmp_path.glob("*/*/*.state")}
    ends = play(public, model, tokens, tmp_path)
    assert all("a new session abababab, which is kept already" in str(end) for end in ends.values())
    assert {file: file.read_bytes() for file in tmp_path.glob("*/*/*.state")} == files


@pytest.mark.parametrize("name", ["session", "run"])
def test_a_client_s_names_are_names(name: str, tmp_path: Path) -> None:
    """No path, and not more than a file's header holds. A party that serves takes them from strangers."""
    client, dealer = local_pair(Ledger(), Ledger(), C, D)
    store = Store(tmp_path, D)
    Files(store, "0" * 32).write(0, "0" * 32, {})
    names = {"session": "0" * 32, "run": "0" * 32}
    keeper = Checkpointer(store, serving=1)
    keeper.heard({S: KeepMode.AS_CLIENT, C: KeepMode.RESUMED})
    client.send_facts("resume/session", names | {name: "../" + "0" * 40_000})
    with pytest.raises(Desync, match="is not a session's name"):
        keeper.meet({C: dealer}, {})


# ---------------------------------------------------------------------- a document of the client's own

OWN_DOCUMENT = "the gate of the city was shut and the number is in the book of the guard"
EVICTED = PublicConfig(
    policy="full", private_policy="snapkv:cap=0.5,queries=4", max_new_tokens=4, document_chunk=8
)
READING_CUTS = {
    "behind it": (EVICTED, Cut(C, "decode2", 5)),
    "in its third chunk": (EVICTED, Cut(S, "private3", 20)),
    "in its first chunk": (EVICTED, Cut(C, "private1", 20)),
    "in its eviction": (EVICTED, Cut(C, "eviction", 3)),
    "the dealer's": (EVICTED, Cut(D, "private4", 20)),
    "padded": (EVICTED.model_copy(update={"length_grid": 8}), Cut(S, "private4", 20)),
    "not evicted": (EVICTED.model_copy(update={"private_policy": "full"}), Cut(C, "private3", 20)),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "in its third chunk" else SLOW) for c in READING_CUTS]
)
def test_a_session_goes_on_in_the_middle_of_the_clients_document(
    case: str, model: Model, tmp_path: Path
) -> None:
    """No chunk of it is read a second time, nor is it evicted twice; another document is refused.

    Each chunk's file holds what that chunk added.
    """
    public, cut = READING_CUTS[case]
    question, context = replace(QUESTION, document=OWN_DOCUMENT), context_of(model, 8)
    whole = play(public, model, context, None, question=question)[C]
    first = play(public, model, context, tmp_path, cut=cut, question=question)
    assert isinstance(first[cut.victim], Killed), first
    sizes = [file.stat().st_size for file in sorted((tmp_path / "server").glob("*/0*.state"))]
    if cut.phase.startswith("private"):
        assert max(sizes, default=0) < 1.2 * min(sizes, default=1)
    other = replace(question, document=OWN_DOCUMENT.replace("guard", "gate"))
    refused = play(public, model, context, tmp_path, resume=True, question=other)[C]
    assert isinstance(refused, StateError) and "another document" in str(refused)
    begun: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionStatus, "began", lambda self, phase: begun.append(phase))
        ends = play(public, model, context, tmp_path, resume=True, question=question)
    assert isinstance(ends[C], Report) and ends[C].token_ids == whole.token_ids, ends
    assert list(ends[C].phases) == list(whole.phases)
    if cut.phase.startswith("private") and cut.victim is not D:  # who may be ahead of both
        reached = int(cut.phase.removeprefix("private"))
        assert f"private{reached}" in begun and f"private{reached - 1}" not in begun
    assert not list(tmp_path.glob("*/*/*"))
