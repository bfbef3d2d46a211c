"""Parties that serve keep the sessions of clients that ask for it, and go on with them."""

from __future__ import annotations

import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from mpcache.errors import MpcacheError
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache_parties.handshake import KeepMode, agree
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.session_network import Network
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.store import Store
from tests.support.links import Killed
from tests.support.processes import PARTY, SOON_S, Process, errors_of, start, started
from tests.support.service import QUESTIONS, Service, plain, said, serving
from tests.support.swaps import Bytes, pieces
from tests.support.uniformity import largest_deviation

pytestmark = pytest.mark.processes

S, C, D = Rank
QUESTION = QUESTIONS[0]
LONG_ANSWERED = "the book of"  # whose plain answer has no near tie in 24 tokens


def client_of(state: Path, resume: bool = False) -> Checkpointer:
    """What a client keeps in this folder."""
    return Checkpointer(Store(state, C), resume)


def kept(state: Path, rank: Rank) -> list[str]:
    """The sessions on a party's disk, whole or not."""
    return sorted(folder.name for folder in (state / rank.label).iterdir() if folder.is_dir())


def cut_off(service: Service, keeper: Checkpointer, messages: int = 25) -> list[Bytes]:
    """A client that dies in decode step 2, at its nth message from the server; what it had of that step."""
    taken: list[Bytes] = []

    def tap(network: Network) -> None:
        swap = network[S].swap

        def die(step: str, *rest: Any) -> bytes | bytearray:
            got = swap(step, *rest)
            if step.startswith("decode2/"):
                taken.extend(pieces(got, rest[2]))
                if len(taken) >= messages:
                    raise Killed
            return got

        network[S].swap = die  # type: ignore[assignment,method-assign]

    with pytest.raises(Killed):
        service.ask(QUESTION, keeper, on_links=tap)
    return taken


def test_a_client_goes_on_where_it_was_and_no_mask_is_used_twice(model: Model, tmp_path: Path) -> None:
    """Another client, which keeps nothing, is served meanwhile. What the redone step opens is independent
    of what the interrupted one had opened: the difference is uniform, though the secrets are the same."""
    state, mine = tmp_path / "state", tmp_path / "mine"
    with serving(model, tmp_path, state=state) as service, ThreadPoolExecutor(2) as pool:
        expected = [plain(model, service.settings.public, question) for question in QUESTIONS]
        other = pool.submit(service.ask, QUESTIONS[1])
        before = cut_off(service, client_of(mine))
        assert other.result().token_ids == expected[1]
        for rank in (S, D):
            service.seen(rank, "kept the session up to token")
            service.seen(rank, "client can go on with --resume")
            assert len(kept(state, rank)) == 1  # of the other nothing was kept

        after: list[Bytes] = []

        def tap(network: Network) -> None:
            swap = network[S].swap

            def note(step: str, *rest: Any) -> bytes | bytearray:
                got = swap(step, *rest)
                after.extend(pieces(got, rest[2]) if step.startswith("decode2/") else [])
                return got

            network[S].swap = note  # type: ignore[assignment,method-assign]

        report = service.ask(QUESTION, keeper := client_of(mine, resume=True), on_links=tap)
        assert keeper.alone and report.token_ids == expected[0]
        pairs = zip(before, after, strict=False)
        data = [a - b for a, b in pairs]
        assert sum(map(len, data)) > 5000
        assert largest_deviation(np.concatenate(data)) < 6
        for rank in (S, D):
            service.seen(rank, "resumed after")
            service.seen(rank, "done:", times=2)
            assert kept(state, rank) == []
        assert kept(mine, C) == []
        service.stop()


@pytest.mark.slow
def test_a_session_that_runs_is_not_resumed_beside_itself(model: Model, tmp_path: Path) -> None:
    """A copy of the client's folder is refused with one line, and disturbs nothing."""
    state, mine, copy = tmp_path / "state", tmp_path / "mine", tmp_path / "copy"
    with serving(model, tmp_path, state=state) as service, ThreadPoolExecutor(2) as pool:
        cut_off(service, client_of(mine))
        shutil.copytree(mine, copy)
        begun, go_on = Event(), Event()

        def wait(token: int, text: str) -> None:
            begun.set()
            assert go_on.wait(60)

        first = pool.submit(service.ask, QUESTION, client_of(mine, resume=True), wait)
        assert begun.wait(60)
        words = (
            r"(server|dealer): the session kept as [0-9a-f]{8} still runs; end that run first, or wait until"
        )
        with pytest.raises(MpcacheError, match=words):
            service.ask(QUESTION, client_of(copy, resume=True))
        go_on.set()
        assert first.result().token_ids == plain(model, service.settings.public, QUESTION)
        with pytest.raises(MpcacheError, match="is not there any more: .*; start without --resume"):
            service.ask(QUESTION, client_of(copy, resume=True))
        service.stop()


@pytest.mark.slow
def test_sessions_that_nobody_goes_on_with_make_room(model: Model, tmp_path: Path) -> None:
    state = tmp_path / "state"
    folders = [tmp_path / f"client{number}" for number in range(3)]
    with serving(model, tmp_path, sessions=1, state=state) as service:
        for number, folder in enumerate(folders):
            cut_off(service, client_of(folder))
            for rank in (S, D):
                service.seen(rank, "ended: ", times=number + 1)
                assert len(kept(state, rank)) <= 2
        left = [kept(folder, C) for folder in folders]
        for rank in (S, D):
            assert kept(state, rank) == sorted(left[1] + left[2])
        with pytest.raises(MpcacheError, match="is not there any more: .*; start without --resume"):
            service.ask(QUESTION, client_of(folders[0], resume=True))
        for rank in (S, D):
            service.seen(rank, "ended: ", times=4)
        report = service.ask(QUESTION, client_of(folders[1], resume=True))
        assert report.token_ids == plain(model, service.settings.public, QUESTION)
        service.stop()


@pytest.mark.parametrize("keeps", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_cannot_be_kept_is_said(keeps: bool, model: Model, tmp_path: Path) -> None:
    """A client that keeps where the others do not; one that says what no client says. The next is served."""
    state, mine = tmp_path / "state", tmp_path / "mine"
    with serving(model, tmp_path, state=state if keeps else None, tokens=1) as service:
        public = service.settings.public
        if not keeps:
            # The server or the dealer finds it first; the lower rank of the two is named first.
            pair = "(none at server, kept at client|kept at client, none at dealer)"
            words = f"state is {pair}; .* or one that serves with --state alone"
            with pytest.raises(MpcacheError, match=words):
                service.ask(QUESTION, client_of(mine))
            assert kept(mine, C) == []
        for nonsense in (KeepMode.AS_CLIENT, "always"):
            words = f"state is .*{nonsense} at client"
            refused = pytest.raises(MpcacheError, match=words)
            with refused, connect_all(C, service.settings, Ledger()) as network:
                agree(network.links, C, said(public) | {"state": nonsense})
                network[S].recv_facts("facts/model")
        assert service.ask(QUESTION).token_ids == plain(model, public, QUESTION)
        assert [folder for folder in state.glob("*/*") if folder.is_dir()] == []
        service.stop()


# --------------------------------------------------------------------------------- whole processes


def ask_of(service: Service, state: Path, *flags: object) -> Process:
    """A client, as a process."""
    own = ["--config", service.config, "--question", LONG_ANSWERED, "--no-stop-at-eos", "--state", state]
    service.children.append(start(PARTY, "--rank", 1, *own, *flags))
    return service.children[-1]


def reach(state: Path, step: int, client: Process) -> None:
    """Wait until a client has so many chunks on disk."""
    limit = time.monotonic() + 90
    while max((int(file.stem) for file in state.glob("client/*/0*.state")), default=0) < step:
        assert time.monotonic() < limit and client.poll() is None, client.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_is_killed_in_turn(model: Model, tmp_path: Path) -> None:
    """kill -9 of the client; of the server; SIGTERM at the dealer, then at both that serve. Each is started
    again, the servers as before, and the answer is the uninterrupted one."""
    state, mine = tmp_path / "state", tmp_path / "mine"
    with serving(model, tmp_path, tokens=24, state=state) as service:
        flags: list[object] = []
        for step, victims in ((3, [C]), (7, [S]), (11, [D]), (15, [S, D])):
            client = ask_of(service, mine, *flags)
            reach(mine, step, client)
            for victim in victims:
                if victim is C:
                    client.kill()
                elif victim is S and len(victims) == 1:
                    service.kill(S)
                else:
                    service.parties[victim].send_signal(signal.SIGTERM)
            _, noise = client.communicate(timeout=60)
            if victims != [C]:
                assert client.returncode == 3
                assert len(errors_of(noise)) == 1
                assert "client: kept the session up to token" in noise
                assert "start it again with --resume to go on" in noise
            for victim in set(victims) - {C}:
                if victims != [S]:
                    assert service.parties[victim].wait(timeout=SOON_S) == 143
                    service.seen(victim, "kept the session up to token")
                service.start(victim)
                service.seen(victim, "serving at")
            flags = ["--resume"]
        out, noise = ask_of(service, mine, *flags).communicate(timeout=120)
        assert out == model.tokenizer.decode(plain(model, service.settings.public, LONG_ANSWERED)) + "\n", (
            noise
        )
        assert "client: resumed after" in noise
        for rank in (S, D):
            service.seen(rank, "done:")
        assert sorted(f.name for f in (*state.glob("*/*"), *mine.glob("*/*"))) == ["key"] * 3
        service.stop()


@pytest.mark.slow
def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    cases = {
        "--resume is said by the client": [2, "--serve", "--state", tmp_path, "--resume"],
        "--offline-store is for one session": [0, "--serve", "--offline-store", tmp_path],
        "leave --setup-dir out": [0, "--offline-store", tmp_path, "--setup-dir", tmp_path],
        "--serve belongs to the server and the dealer": [1, "--serve", "--state", tmp_path],
    }
    with started() as children:
        for flags in cases.values():
            children.append(start(PARTY, "--rank", *flags))
        for child, words in zip(children, cases, strict=True):
            _, noise = child.communicate(timeout=60)
            (line,) = errors_of(noise)
            assert child.returncode == 2 and words in line
