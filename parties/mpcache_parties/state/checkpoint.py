"""Keep one party's part of a session, so that the session can be resumed.

Each party writes its own shares and nothing else (`mpcache_parties.state.store`); no seed and no mask that
is still to be used is ever on disk. On resuming the parties tell each other which steps they hold, and of
which run; all load the last one that all three hold, forget what comes after it, and go on with new streams
from new seeds (docs/threat-model.md).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from mpcache.answer import TimedSession
from mpcache.cache import Cache
from mpcache.console.signals import check_stop
from mpcache.decode import Operands
from mpcache.errors import BadInput, Desync, InUse, LinkError, StateError
from mpcache.ledger import Ledger
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.report.account import Phase, phases_of
from mpcache.transport.link import Links
from mpcache_parties.handshake import KeepMode
from mpcache_parties.state import snapshot
from mpcache_parties.state.store import KEPT_STEPS, Files, Store, check_name

LOOK_EVERY_S = 0.1  # whether a session that is to be resumed has been let go of


@dataclass
class Checkpoint:
    """A party's session after `step` chunks.

    place: of the next chunk.  operands: the weights; None where they are set up again.  own: what only this
    party's program needs to go on.
    """

    step: int
    place: ChunkPlace
    facts: dict[str, Any]
    operands: Operands | None
    cache: Cache
    own: dict[str, Any]


@dataclass
class Checkpointer:
    """Keeps one session at one party; without a store it keeps nothing.

    A new session: `begin` after the context, `document` after each chunk of the client's document, `token`
    after each chunk of a turn, `end`. A resumed one: `meet`, then what is left of these. identity: what a
    resumed session must have in common with the first run, by name; texts and files as digests. keep: how
    many steps stay on disk.

    serving: of a party that serves so many sessions at once. `heard` tells it what to do with this one,
    and when a new one begins at most so many suspended ones stay. patience: how long `meet` waits for a
    run before this one that does not know yet that its client is lost; s.
    """

    store: Store | None = None
    resume: bool = False
    keep: int = KEPT_STEPS
    serving: int = 0
    patience: float = 0.0
    alone: bool = False  # the other parties serve: this one resumes without anybody's help
    ms: list[float] = field(default_factory=list)  # what each checkpoint took
    bytes: list[int] = field(default_factory=list)  # and its size on disk
    _files: Files | None = None
    _run: str = ""
    _earlier_wire_bytes: int = 0
    _base: snapshot.Tensors = field(default_factory=dict)  # what the next step is written after
    _bases: list[int] = field(default_factory=lambda: [0])  # that step, and those that it needs
    _phases: dict[str, Phase] = field(default_factory=dict)
    _seen: int = 0  # of the ledger's steps

    @property
    def mode(self) -> KeepMode:
        """Public: what this party's Hello says of keeping the session."""
        if self.store is None:
            return KeepMode.NONE
        if self.serving:
            return KeepMode.AS_CLIENT
        return KeepMode.RESUMED if self.resume else KeepMode.KEPT

    @property
    def last(self) -> ChunkPlace | None:
        """Where the session stands on disk; None before it has begun, or has been resumed.

        A party that is refused before that is told why, and not to try the same again.
        """
        if self._files is None or not self._run:
            return None
        return self._files.place(steps[-1]) if (steps := self._files.steps()) else None

    def check(self) -> None:
        """Check, before anything is connected, that there is a session to resume. Raises BadInput."""
        if self.store is not None and self.resume and not self.store.sessions():
            raise BadInput(
                f"{self.store.rank.label}: no session to resume in {self.store.folder}; it has ended, or "
                "never came past its context: start without --resume"
            )

    def heard(self, modes: Mapping[Rank, str]) -> None:
        """Take note of what the other parties' Hellos say, which agrees with this one's.

        A party that serves goes by the client.
        """
        self.alone = all(mode == KeepMode.AS_CLIENT for mode in modes.values())
        if self.serving:
            self.resume = modes[Rank.CLIENT] == KeepMode.RESUMED
            self.store = self.store if modes[Rank.CLIENT] != KeepMode.NONE else None

    def meet(self, links: Links, identity: Mapping[str, str]) -> Checkpoint | None:
        """Load the last step that all three hold; None for a new session.

        Raises StateError: another model, config or question than in the first run; no common step; a
        file that does not open; a session that is not there, or still runs. Raises Desync if the peers send
        anything but names and steps, or mean another step. Until all agree, nothing on disk changes.
        """
        if self.store is None or not self.resume:
            return None
        me = self.store.rank
        if me is Rank.CLIENT:
            about = {"session": self.store.sessions()[0], "run": secrets.token_hex(16)}
            for link in links.values():
                link.send_facts("resume/session", about)
        else:
            about = links[Rank.CLIENT].recv_facts("resume/session")
        name, run = str(about.get("session")), str(about.get("run"))
        check_name(run)
        self._files = files = self._open(self.store, name)
        held = {me: {step: files.run(step) for step in files.steps()}}
        if run in held[me].values():  # a name that comes twice tells nothing
            raise Desync(f"Desync: the client sends {run!r:.60}, not a new run's name")
        for link in links.values():
            link.send_facts("resume/steps", {"steps": [[step, run] for step, run in held[me].items()]})
        for peer, link in links.items():
            held[peer] = _steps_of(link.recv_facts("resume/steps"), peer)
        common = set.intersection(*({*steps.items()} for steps in held.values()))
        if not common:
            parts = ", ".join(f"{rank.label} {_listed(held[rank])}" for rank in Rank)
            raise StateError(f"session {name}: the parties hold no step in common ({parts}); start anew")
        step, of = max(common)
        _same_choice(links, {"step": step, "of": of, "run": run, "place": list(files.place(step))})
        found = self._load(step, identity)
        self._run = run
        return found

    def _open(self, store: Store, name: str) -> Files:
        """Open the session that the client names, as soon as nobody else has it open."""
        who, limit = store.rank.label, time.monotonic() + self.patience
        while name in store.sessions():
            try:
                return Files(store, name, self.keep)
            except InUse:
                if time.monotonic() >= limit:
                    why = "still runs; end that run first, or wait until the parties know that it is lost"
                    raise StateError(f"{who}: the session kept as {name:.8} {why}", private=False) from None
            check_stop()
            time.sleep(LOOK_EVERY_S)
        check_name(name)
        why = "is not there any more: it has ended, or made room for newer ones; start without --resume"
        raise StateError(f"{who}: the session kept as {name:.8} {why}", private=False)

    def _load(self, step: int, identity: Mapping[str, str]) -> Checkpoint:
        """Load that step, with what the party itself knew last; later steps are forgotten."""
        assert self._files is not None
        files, newest = self._files, max(self._files.steps())
        base, note = files.read(0, files.run(0)), files.read_note(newest, files.run(newest))
        self._same(base["identity"], identity)

        def read(one: int) -> Any:
            """Read a step, and those that it was written after; `_bases` and `_base` are these then."""
            self._bases, tree = files.bases(one) or [0], base
            for each in [*reversed(self._bases), one]:
                if each:
                    tree = files.read(each, files.run(each), self._base)
                if each != one or not one:
                    self._base = snapshot.tensors_of(tree["cache"], "/cache")
            return tree

        own = read(newest)["own"] if note is None and newest > step else note
        last, place = read(step), files.place(step)
        if newest > step:  # tokens that the client has shown stay as they are
            last["own"] = own
            files.write(step, files.run(step), last, self._base if step else None, place, self._bases)
            files.forget_after(step)
        elif note is not None:
            last["own"] = note
        self._phases = {name: Phase(**phase) for name, phase in last["phases"].items()}
        self._earlier_wire_bytes = last["wire_bytes"]
        own = base["own"] | last["own"]
        return Checkpoint(step, place, base["facts"], base["operands"], last["cache"], own)

    def _same(self, then: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Compare what a session was begun with. Raises StateError with the first difference."""
        assert self._files is not None
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                secret = name in ("document", "question")
                values = "" if secret else f" ({then.get(name)} then, {now.get(name)} now)"
                raise StateError(
                    f"{self._files.store.rank.label}: the session in {self._files.folder} was begun with "
                    f"another {name}{values}; resume with what it was begun with"
                )

    def begin(
        self, identity: Mapping[str, str], facts: Mapping[str, Any],
        session: TimedSession, ledger: Ledger, own: Mapping[str, Any], operands: Operands | None,
    ) -> None:  # fmt: skip
        """Write the first checkpoint of a new session, whose context has been read.

        operands: the weights, where they were masked for this session alone.
        Raises Desync if it has the name of one that is kept; StateError.
        """
        if self.store is None:
            return
        if self.serving:  # so at most twice `serving` are on disk: these, and those that run
            self.store.forget_old(self.serving)
        self._run = str(facts["model"].get("session"))  # of a first run: the session's own name
        self._files = Files(self.store, self._run, self.keep)
        if self._files.steps():
            raise Desync(f"Desync: the server names a new session {self._run:.8}, which is kept already")
        self._base = snapshot.tensors_of(session.cache, "/cache")
        whole = {"identity": dict(identity), "facts": dict(facts), "operands": operands}
        self._write(0, whole, session, ledger, own, None)

    def document(self, session: TimedSession, ledger: Ledger) -> None:
        """Write a checkpoint after a chunk of the client's document, or its eviction. Raises StateError.

        The next one holds what comes from now on, and these stay: the dealer may be any number ahead.
        """
        if self._files is not None:
            self._write(session.chunks, {}, session, ledger, {}, self._base)
            self.turn_ended(session)

    def token(self, session: TimedSession, ledger: Ledger, own: Mapping[str, Any]) -> None:
        """Write a checkpoint after a chunk. Raises StateError."""
        if self._files is not None:
            self._write(session.chunks, {}, session, ledger, own, self._base)

    def note(self, session: TimedSession, own: Mapping[str, Any]) -> None:
        """Keep what the party's program needs to go on, where no chunk has come. Raises StateError."""
        if self._files is not None:
            self._files.write_note(session.chunks, self._run, dict(own))

    def turn_ended(self, session: TimedSession) -> None:
        """Let the next turn's steps hold what comes from now on, or they grow with the conversation."""
        step = session.chunks
        if self._files is not None and self._files.steps()[-1] == step != self._bases[0]:
            self._bases = [step, *self._bases]
            self._base = snapshot.tensors_of(session.cache, "/cache")

    def forget_after(self, chunks: int) -> None:
        """Remove steps that the session goes back from: others come in their place. Raises StateError."""
        if self._files is not None and self._files.steps()[-1] > chunks:
            self._files.forget_after(chunks)

    def _write(
        self, step: int, whole: Mapping[str, Any], session: TimedSession, ledger: Ledger,
        own: Mapping[str, Any], since: snapshot.Tensors | None,
    ) -> None:  # fmt: skip
        assert self._files is not None
        start = time.perf_counter()
        self._phases |= self._since_then(ledger, session)
        tree = {
            **whole, "cache": session.cache, "own": dict(own), "wire_bytes": self.wire_bytes(ledger),
            "phases": {name: asdict(phase) for name, phase in self._phases.items()},
        }  # fmt: skip
        self.bytes.append(self._files.write(step, self._run, tree, since, session.place, self._bases))
        self.ms.append(1000 * (time.perf_counter() - start))

    def close(self) -> None:
        """Let go of the session; what is on disk stays, for `--resume`."""
        if self._files is not None:
            self._files.close()
            self._files = None

    def end(self, links: Links) -> None:
        """Forget the session: all hear from the client that it has the whole answer.

        Raises Desync, or what a link raises; nothing of that at the client, whose answer is there.
        """
        if self._files is None:
            return
        if self._files.store.rank is Rank.CLIENT:
            for link in links.values():
                with suppress(LinkError):  # one that does not hear it keeps its part
                    link.send_facts("close", {"answered": True})
        elif links[Rank.CLIENT].recv_facts("close").get("answered") is not True:
            raise Desync("Desync: the client does not say that it has the answer; the session is kept")
        self._files.remove()
        self._files = None

    # ------------------------------------------------------------------------------------- account

    def phases(self, ledger: Ledger, session: TimedSession) -> dict[str, Phase]:
        """Return all phases of the session, those before it was interrupted too."""
        return self._phases | self._since_then(ledger, session)

    def earlier(self, turn: int) -> dict[int, Phase]:
        """Return what each step of a turn took in earlier runs of the session."""
        places = {name: ChunkPlace.of(name) for name in self._phases}
        return {
            place.step: self._phases[name]
            for name, place in places.items()
            if place is not None and place.turn == turn
        }

    def wire_bytes(self, ledger: Ledger) -> int:
        """Return the bytes on the links with framing, those before the session was interrupted too."""
        return ledger.wire_bytes + self._earlier_wire_bytes

    def _since_then(self, ledger: Ledger, session: TimedSession) -> dict[str, Phase]:
        """Return phases that began after the last call: it does not go through a whole ledger every time."""
        new = {name: ms for name, ms in session.ms.items() if name not in self._phases}
        steps = islice(ledger.steps.items(), self._seen, None)
        self._seen = len(ledger.steps)
        return phases_of(steps, new, session.cpu_ms)


def _steps_of(facts: Mapping[str, Any], peer: Rank) -> dict[int, str]:
    """Return a peer's steps and the runs they are of. Raises Desync."""
    steps = facts.get("steps")
    if isinstance(steps, list) and all(map(_is_step, steps)):
        found = dict(steps)
        if len(found) == len(steps):  # no step twice
            return found
    raise Desync(f"Desync: {peer.label} sends {steps!r:.60}, not steps; is it the same version?")


def _is_step(pair: Any) -> bool:
    """Return whether this is a step's number and its run."""
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    return type(pair[0]) is int and pair[0] >= 0 and isinstance(pair[1], str)


def _same_choice(links: Links, mine: Mapping[str, Any]) -> None:
    """Hear from every peer that it goes on from the same step. Raises Desync.

    Each party forgets what comes after that step. One that has heard other steps than its peers did
    would forget what they still need.
    """
    for link in links.values():
        link.send_facts("resume/agreed", mine)
    for peer, link in links.items():
        if (theirs := link.recv_facts("resume/agreed")) != mine:
            raise Desync(
                f"Desync: {peer.label} resumes from step {theirs.get('step')!r:.20}, this party from "
                f"{mine['step']}, or in another run; nothing is forgotten, resume again"
            )


def _listed(steps: Mapping[int, str]) -> str:
    return f"holds {', '.join(map(str, steps))}" if steps else "holds none"
