"""Real parties, killed and told to stop at several steps, go on with `--resume` and give the same answer."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from mpcache.answer import plain_answer
from mpcache.config import PublicConfig, Settings
from mpcache.limits import bind_policy
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache_parties.network.liveness import listens
from tests.support.links import free_settings
from tests.support.processes import (
    CLI,
    PARTY,
    SOON_S,
    Process,
    errors_of,
    start,
    started,
    write_config,
)

pytestmark = pytest.mark.processes

S, C, D = Rank
QUESTION = "the gate of"
TOKENS = 24
STEP_S = 90.0  # for a step to be reached, starting included


class Session:
    """Three parties with one state folder, started as often as needed."""

    def __init__(self, tmp_path: Path, folder: Path, model: Model, children: list[Process]) -> None:
        ids = model.tokenizer.encode("and the number of the gate of the city is in the book " * 20, bos=True)
        document = tmp_path / "document.txt"
        document.write_text(model.tokenizer.decode(ids[:30]))
        self.public = PublicConfig(policy="mpcache:coarse=8,fine=4,recent=4", max_new_tokens=TOKENS)
        self.settings: Settings = free_settings().model_copy(update={"public": self.public})
        self.config = write_config(self.settings, tmp_path / "config.yaml")
        self.flags: dict[Rank, list[object]] = {
            S: ["--model", folder, "--context", document],
            C: ["--question", QUESTION, "--no-stop-at-eos"],
            D: [],
        }
        self.state, self.children = tmp_path / "state", children
        self.before = dict.fromkeys(Rank, 0)
        context = model.tokenizer.encode(document.read_text(), bos=True)
        asked = model.tokenizer.encode(QUESTION, bos=False)
        bound = bind_policy(model.shape, self.public, len(context), len(asked))
        plain = plain_answer(model, bound, context, asked, TOKENS, Sampling(), ())
        self.answer = model.tokenizer.decode(plain.ids)

    def start(self, *more: object, first: Rank | None = None) -> dict[Rank, Process]:
        """Start all three. first: listens before the others are started."""
        self.before = {rank: self.step_of(rank) for rank in Rank}
        every = ["--config", self.config, "--state", self.state, *more]
        parties = {}
        for rank in sorted((D, C, S), key=lambda rank: rank is not first):
            parties[rank] = start(PARTY, "--rank", int(rank), *every, *self.flags[rank])
            self.children.append(parties[rank])
            limit = time.monotonic() + STEP_S
            while rank is first and not listens(self.settings.addresses.of(rank)):
                assert time.monotonic() < limit
                time.sleep(0.02)
        return parties

    def step_of(self, rank: Rank) -> int:
        return max((int(f.stem) for f in (self.state / rank.label).glob("*/0*.state")), default=0)

    def reach(self, rank: Rank, step: int, parties: dict[Rank, Process]) -> None:
        """A step of this run: what an earlier one left on disk does not count."""
        step, limit = max(step, self.before[rank] + 1), time.monotonic() + STEP_S
        while self.step_of(rank) < step:
            assert time.monotonic() < limit
            assert all(child.poll() is None for child in parties.values()), [
                child.communicate()[1] for child in parties.values() if child.poll() is not None
            ]
            time.sleep(0.02)

    def end(self, parties: dict[Rank, Process], killed: Iterable[Rank]) -> None:
        """The others end soon, with a reason and a hint."""
        for rank in set(parties) - set(killed):
            _, noise = parties[rank].communicate(timeout=SOON_S)
            assert parties[rank].returncode == 3
            assert len(errors_of(noise)) == 1
            assert f"{rank.label}: kept the session up to token" in noise
            assert "start all parties again with --resume to go on" in noise
        for rank in killed:
            assert parties[rank].wait(timeout=SOON_S) == -signal.SIGKILL

    def finish(self, parties: dict[Rank, Process]) -> None:
        """The whole answer is told, as if nothing had happened; nothing stays but the keys."""
        for rank, child in parties.items():
            out, noise = child.communicate(timeout=120)
            assert child.returncode == 0, noise
            assert f"{rank.label}: resumed after" in noise
            if rank is C:
                assert out == self.answer + "\n"
        assert sorted(f.name for f in self.state.glob("*/*")) == ["key"] * 3


@pytest.fixture
def session(tmp_path: Path, folder: Path, model: Model) -> Iterable[Session]:
    with started() as children:
        yield Session(tmp_path, folder, model, children)


@pytest.mark.slow
def test_all_killed_at_once(session: Session) -> None:
    parties = session.start()
    session.reach(C, 3, parties)
    for child in parties.values():
        child.kill()
    session.end(parties, Rank)
    session.finish(session.start("--resume"))


@pytest.mark.slow
def test_each_killed_in_turn(session: Session) -> None:
    """One session: server, client, dealer and all three are killed at later and later steps."""
    flags: list[object] = []
    for i, victims in enumerate(([S], [C], [D], list(Rank), [C, D])):
        parties = session.start(*flags)
        session.reach(victims[0], 3 * (i + 1), parties)
        for victim in victims:
            parties[victim].kill()
        session.end(parties, victims)
        flags = ["--resume"]
    session.finish(session.start("--resume"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", list(Rank))
def test_a_stop_signal_suspends(session: Session, victim: Rank) -> None:
    """SIGTERM: the party says why it ends and how to go on; the others say it too; the session goes on."""
    parties = session.start()
    session.reach(victim, 3, parties)
    parties[victim].send_signal(signal.SIGTERM)
    for rank, child in parties.items():
        _, noise = child.communicate(timeout=SOON_S)
        assert child.returncode == (143 if rank is victim else 3)
        (line,) = errors_of(noise)
        assert f"{victim.label}: stopped by SIGTERM" in line
        assert f"{rank.label}: kept the session up to token" in noise
    assert not list(session.state.glob("*/*/*.partial"))
    session.finish(session.start("--resume"))


@pytest.mark.slow
def test_only_one_resumes(session: Session) -> None:
    """A party without --resume, or without a session, is named on all sides."""
    parties = session.start()
    session.reach(C, 2, parties)
    for child in parties.values():
        child.kill()
        child.wait()
    session.flags[D] = ["--resume"]
    # Client and dealer find it first, and tell a server that starts within seconds alone.
    parties = session.start(first=S)
    for child in parties.values():
        _, noise = child.communicate(timeout=120)
        assert child.returncode == 3
        (line,) = errors_of(noise)
        assert "state is " in line and "start both with the same --state and --resume" in line
    for file in (session.state / "server").glob("*/*"):
        file.unlink()
    session.flags[D] = []
    parties = session.start("--resume")
    for rank, child in parties.items():
        _, noise = child.communicate(timeout=120)
        assert child.returncode == (2 if rank is S else 3)
        (line,) = errors_of(noise)
        assert "server: no session to resume in" in line


@pytest.mark.slow
def test_generate_goes_on(session: Session, folder: Path, tmp_path: Path) -> None:
    """`mpcache generate --state DIR`, stopped, and again with --resume."""
    flags = [
        "generate", "--model", folder, "--context", tmp_path / "document.txt", "--question", QUESTION,
        "--config", session.config, "--no-stop-at-eos", "--state", session.state,
    ]  # fmt: skip
    session.children.append(child := start(CLI, *flags))
    session.reach(C, 3, {C: child})
    child.send_signal(signal.SIGTERM)
    _, noise = child.communicate(timeout=SOON_S)
    assert child.returncode == 143 and "Traceback" not in noise
    session.children.append(child := start(CLI, *flags, "--resume", "--json"))
    out, noise = child.communicate(timeout=120)
    assert child.returncode == 0, noise
    import json

    run = json.loads(out)
    assert run["text"] == session.answer and run["agreement"] == 1
    assert len(run["private"]["token_ms"]) == TOKENS - 1
