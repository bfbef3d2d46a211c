"""An answer that ends while a tape is dealt: it is reported, and nobody waits for what nobody will read."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mpcache.config import PublicConfig
from mpcache.console.signals import Stopped
from mpcache.errors import LinkError, PeerFailed, PeerLost
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.transport import flow_control, frames, message
from mpcache.transport.frames import FrameLink
from mpcache.transport.local import local_pair
from mpcache_parties import launch
from mpcache_parties.client_pace import ClientPace, NoMoreTapes, more_step
from mpcache_parties.operations.output import EventKind
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import OnToken, SessionResources, show_no_token
from mpcache_parties.roles import AHEAD, ask, deal, serve
from mpcache_parties.say import quiet
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.store import Store
from tests.support.links import Job, context_of, free_settings, plain_ids, together
from tests.support.processes import CLI, PARTY, SOON_S, start, started, write_config
from tests.support.tiny_models import make, save

S, C, D = Rank
QUESTION = "the gate of"
ROOM, CHUNK = 64 << 10, 4 << 10  # bytes; a token's tape of the tiny model is larger than this room
ENOUGH_S = 20.0  # a link's own patience is 60 s
PUBLIC = PublicConfig(policy="full", max_new_tokens=20)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dealer that may be ahead by a part of a token only."""

    def room(sender: Rank, receiver: Rank, agreed: bool) -> int:
        return ROOM if sender is D else flow_control.queue_room(sender, receiver, agreed)

    monkeypatch.setattr(frames, "queue_room", room)
    monkeypatch.setattr(message, "CHUNK_BYTES", CHUNK)


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    """A context of 12 tokens."""
    return context_of(model, 12)


def ending(model: Model, tokens: list[int], length: int) -> tuple[Model, list[int]]:
    """The model with another end token, at which its answer ends after `length` tokens; the answer."""
    public = PUBLIC.model_copy(update={"max_new_tokens": length})
    ids = plain_ids(model, public, tokens, QUESTION)
    assert ids.index(ids[-1]) == length - 1, "the answer would end sooner"
    return replace(model, shape=replace(model.shape, eos_ids=(ids[-1],))), ids


def play(
    model: Model,
    tokens: list[int],
    on_token: OnToken = show_no_token,
    state: Path | None = None,
    resume: bool = False,
    on_links: Callable[[Rank, dict[Rank, FrameLink]], None] = lambda rank, links: None,
) -> dict[Rank, Any]:
    """The three parties as threads, which must all end soon; what each ended with."""
    parties: dict[Rank, Any] = {
        S: partial(serve, own=Document(model, tokens)),
        C: partial(ask, own=Question(QUESTION)),
        D: deal,
    }

    def job(rank: Rank) -> Job:
        def run(links: dict[Rank, FrameLink], ledger: Ledger) -> Report:
            on_links(rank, links)
            keeper = Checkpointer(Store(state, rank) if state else None, resume)
            resources = SessionResources(links, ledger, PUBLIC, on_token=on_token, checkpointer=keeper)
            try:
                report: Report = parties[rank](resources)
                return report
            finally:
                keeper.close()

        return run

    begin = time.monotonic()
    ends = together({rank: job(rank) for rank in Rank})
    assert time.monotonic() - begin < ENOUGH_S + 2 * len(tokens)
    return ends


@pytest.mark.parametrize("length", [1, 2])
def test_an_end_token_in_the_middle_of_a_tape(
    length: int, model: Model, tokens: list[int], little_room: None
) -> None:
    ends, answered = ending(model, tokens, length)
    reports = play(ends, tokens)
    server, client, dealer = (reports[rank] for rank in Rank)
    assert isinstance(server, Report) and isinstance(client, Report) and isinstance(dealer, Report), reports
    assert client.token_ids == answered
    assert list(client.phases) == list(server.phases) == list(dealer.phases)[: len(client.phases)]
    assert len(client.phases) == 2 + length
    assert len(dealer.phases) < len(client.phases) + AHEAD  # the tape that it was in counts for nothing
    for name, phase in client.phases.items():
        both = phase.offline_received + server.phases[name].offline_received
        assert both == dealer.phases[name].offline_sent


def test_a_kept_session_is_forgotten_then(
    model: Model, tokens: list[int], tmp_path: Path, little_room: None
) -> None:
    ends, answered = ending(model, tokens, 2)
    reports = play(ends, tokens, state=tmp_path)
    assert all(isinstance(report, Report) for report in reports.values()), reports
    assert reports[C].token_ids == answered
    assert not list(tmp_path.glob("*/*/*"))


def test_a_resumed_answer_ends_in_the_middle_of_a_tape(
    model: Model, tokens: list[int], tmp_path: Path, little_room: None
) -> None:
    ends, answered = ending(model, tokens, 2)
    seen: list[int] = []

    def stop(token: int, text: str) -> None:
        seen.append(token)
        raise Stopped("client: stopped by SIGINT", signal.SIGINT)

    first = play(ends, tokens, stop, tmp_path)
    assert seen == answered[:1]
    assert isinstance(first[C], Stopped), first
    assert isinstance(first[S], PeerFailed) and isinstance(first[D], PeerFailed), first
    reports = play(ends, tokens, state=tmp_path, resume=True)
    assert all(isinstance(report, Report) for report in reports.values()), reports
    assert reports[C].token_ids == answered
    assert not list(tmp_path.glob("*/*/*"))


@pytest.mark.parametrize("deaf", [S, D])
@pytest.mark.parametrize("kept", [False, True])
def test_the_answer_is_reported_whatever_the_others_do(
    deaf: Rank, kept: bool, model: Model, tokens: list[int], tmp_path: Path
) -> None:
    """A link that fails once the answer is there costs no answer."""
    ends, answered = ending(model, tokens, 2)

    def cut(rank: Rank, links: dict[Rank, FrameLink]) -> None:
        if rank is not C:
            return
        send = links[deaf].send_facts

        def fail(step: str, facts: Any) -> None:
            if facts == {"more": False} or step == "close":
                raise PeerLost(f"lost {deaf.label}")
            send(step, facts)

        links[deaf].send_facts = fail  # type: ignore[method-assign]

    reports = play(ends, tokens, state=tmp_path if kept else None, on_links=cut)
    assert isinstance(reports[C], Report), reports
    assert reports[C].token_ids == answered
    assert isinstance(reports[deaf], LinkError)


@pytest.mark.parametrize("how", ["error", "hang"])
def test_a_party_that_has_reported_is_done(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For `mpcache generate`: what becomes of a party while it closes its links costs no answer."""
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    events: SimpleQueue[tuple[Rank, launch.Event]] = SimpleQueue()
    for rank in Rank:
        report = Report(int(rank), "fast", 1, 1, [1], text="an answer").to_dict()
        events.put((rank, {"event": EventKind.REPORT, "report": report}))
    for rank in (S, C):
        events.put((rank, None))
    if how == "error":
        error = {"name": "PeerTimeout", "text": "no word", "exit_code": 3}
        events.put((D, {"event": EventKind.ERROR, **error}))
        events.put((D, None))
    children = {rank: cast(Any, SimpleNamespace(wait=lambda: 3, poll=lambda: 3)) for rank in Rank}
    reports = launch._listen(children, events, quiet, show_no_token)
    assert set(reports) == set(Rank) and reports[C].text == "an answer"


def test_an_answer_outlives_the_account_of_it() -> None:
    """The client has reported; the server dies before it does."""
    events: SimpleQueue[tuple[Rank, launch.Event]] = SimpleQueue()
    report = Report(C, "fast", 1, 1, [1], text="an answer").to_dict()
    events.put((C, {"event": EventKind.REPORT, "report": report}))
    for rank in (C, S):
        events.put((rank, None))
    children = {rank: cast(Any, SimpleNamespace(wait=lambda _: 3, poll=lambda: -9)) for rank in Rank}
    with pytest.raises(launch.PartyFailed, match="server process .* was ended by SIGKILL") as caught:
        launch._listen(children, events, quiet, show_no_token)
    assert caught.value.answer is not None and caught.value.answer.text == "an answer"


# ------------------------------------------------------------------------------------- the client's pace


def dealer_of() -> tuple[ClientPace, FrameLink, FrameLink]:
    """A dealer that knows of one decode step; the server's and the client's ends of its links."""
    server, one = local_pair(Ledger(), Ledger(), S, D)
    client, other = local_pair(Ledger(), Ledger(), C, D)
    return ClientPace({S: one, C: other}, turn=1, begun=1), server, client


def look(pace: ClientPace, step: int) -> None:
    with pace.watched(step):
        for link in pace._links.values():
            link.before_frame()


def test_the_dealer_hears_what_has_come_and_waits_for_nothing() -> None:
    pace, _, client = dealer_of()
    look(pace, 3)
    assert pace.begun == 1
    for step in (2, 3, 4):
        client.send_facts(more_step(ChunkPlace(1, step)), {"more": step < 4})
    look(pace, 3)
    assert pace.begun == 3  # not more than it deals: a stop counts these
    with pytest.raises(NoMoreTapes):
        look(pace, 5)
    look_after = pace._links[S].before_frame
    look_after()  # nobody looks outside a tape


def test_a_server_that_leaves_means_that_the_client_s_word_is_on_its_way() -> None:
    pace, server, client = dealer_of()
    server.close()
    client.send_facts(more_step(ChunkPlace(1, 2)), {"more": False})
    with pytest.raises(NoMoreTapes):
        look(pace, 3)
    pace, server, client = dealer_of()
    server.close()
    for step in (2, 3):
        client.send_facts(more_step(ChunkPlace(1, step)), {"more": True})
    with pytest.raises(PeerLost, match="decode3: server has ended its session before the client's answer"):
        look(pace, 3)


def test_a_client_that_leaves_without_a_word_is_lost() -> None:
    pace, _, client = dealer_of()
    client.close()
    with pytest.raises(PeerLost, match="client has ended its session"):
        look(pace, 3)


# -------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose tape for one token is larger than the dealer's 32 MiB of room; a document."""
    from tests.support import tiny_models

    folder = tmp_path_factory.mktemp("wide")
    kind = tiny_models.KINDS["llama-gqa"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.KINDS, "wide", (*kind[:2], {"intermediate_size": 28_672}))
        save(make("wide"), folder)
    document = folder.parent / f"{folder.name}.txt"
    document.write_text("the number of the gate of the city")
    return folder, document


def end_after(folder: Path, document: Path, length: int) -> list[int]:
    """Give the model an end token at which its answer ends after `length` tokens; return the answer."""
    from mpcache.model import load_model

    model = load_model(folder)
    context = model.tokenizer.encode(document.read_text(), bos=True)
    ids = ending(model, context, length)[1]
    for file in (folder / "config.json", folder / "generation_config.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"eos_token_id": ids[-1]}))
    return ids


@pytest.mark.slow
@pytest.mark.processes
def test_generate_with_a_tape_beyond_the_room(wide: tuple[Path, Path]) -> None:
    folder, document = wide
    answered = end_after(folder, document, 2)
    flags = ["--model", folder, "--context", document, "--question", QUESTION, "--policy", "full"]
    with started() as children:
        children.append(start(CLI, "generate", *flags, "--max-new-tokens", 12, "--json"))
        out, noise = children[0].communicate(timeout=110)  # a wait for a closing link takes 120 s more
    assert children[0].returncode == 0, noise
    run = json.loads(out)
    assert run["token_ids"] == answered and run["agreement"] == 1
    assert run["private"]["offline_bytes_per_token"] > 32 << 20
    assert "lost" not in noise


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stopped", [False, True])
def test_processes_with_a_tape_beyond_the_room(
    stopped: bool, wide: tuple[Path, Path], tmp_path: Path
) -> None:
    """The end token, or Ctrl-C at the client: all three end within seconds, as documented."""
    folder, document = wide
    end_after(folder, document, 2)
    settings = free_settings(recv_s=120)
    public = PublicConfig(policy="full", max_new_tokens=12)
    config = write_config(settings.model_copy(update={"public": public}), tmp_path / "config.yaml")
    flags: dict[Rank, list[object]] = {
        S: ["--model", folder, "--context", document],
        C: ["--question", QUESTION, *["--no-stop-at-eos"] * stopped],
        D: [],
    }
    with started() as children:
        running = {r: start(PARTY, "--rank", int(r), "--config", config, *flags[r]) for r in Rank}
        children += running.values()
        out = running[C].stdout
        assert out is not None
        assert out.read(1), running[C].communicate()[1]  # the answer has begun
        if stopped:
            running[C].send_signal(signal.SIGINT)
        codes = {S: 3, C: 130, D: 3} if stopped else dict.fromkeys(Rank, 0)
        limit = time.monotonic() + SOON_S
        for rank, child in running.items():
            _, noise = child.communicate(timeout=max(0.1, limit - time.monotonic()))
            assert child.returncode == codes[rank], noise
            if not stopped:
                assert f"{rank.label}: done:" in noise and "lost" not in noise
