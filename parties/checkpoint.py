"""What one party keeps of a session on its own disk, so that the session can be resumed.

    DIR/server/key                      this party's key (mode 0600)
    DIR/server/SESSION/context.state    facts, resident weights and cache as the context left them
    DIR/server/SESSION/000007.state     what the first seven chunks added: written after each token

Each party writes its own shares and nothing else; no seed and no mask that is still to be used is ever
on disk. On resuming the parties tell each other which steps they hold, and of which run; all load the
last one that all three hold, forget what comes after it, and go on with new streams from new seeds
(docs/threat-model.md).
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mpcache import sealed, snapshot
from mpcache.answer import TimedSession
from mpcache.cache import Cache
from mpcache.decode import Operands
from mpcache.errors import BadInput, Desync, StateError
from mpcache.ledger import Ledger
from mpcache.link import Link
from mpcache.rank import Rank
from mpcache.report import Phase, phases_of

CONTEXT = "context"
SUFFIX = ".state"
KEPT_STEPS = 3 + 3  # server and client are a step apart at most; the dealer may be three ahead of both
_SESSION = re.compile(r"[0-9a-f]{32}")  # of a run, too: the first one has its session's name
_STEP = re.compile(r"\d{6}")

Links = Mapping[Rank, Link]


@dataclass
class Snapshot:
    """A party's session after `step` chunks. own: what only this party's program needs to go on."""

    step: int
    facts: dict[str, Any]
    operands: Operands
    cache: Cache
    own: dict[str, Any]


class Store:
    """One party's folder of sessions. Raises StateError if it or its key cannot be used."""

    def __init__(self, folder: Path, rank: Rank, key_file: Path | None = None) -> None:
        self.rank, self.folder = rank, folder / rank.label
        sealed.make_folder(self.folder)
        self.key = sealed.load_key(key_file or self.folder / "key")

    def sessions(self) -> list[str]:
        """The sessions that can be resumed, the one that was used last in front."""
        found = [
            f.parent for f in self.folder.glob(f"*/{CONTEXT}{SUFFIX}") if _SESSION.fullmatch(f.parent.name)
        ]
        return [f.name for f in sorted(found, key=lambda f: f.stat().st_mtime_ns, reverse=True)]


class Files:
    """The files of one session at one party; a lock keeps every other process away from them."""

    def __init__(self, store: Store, session: str, keep: int) -> None:
        """keep: how many steps stay; older ones are removed."""
        if not _SESSION.fullmatch(session):
            raise Desync(f"Desync: {session!r:.60} is not a session's name; is it the same version?")
        self.store, self.session, self.keep = store, session, keep
        self.folder = store.folder / session
        sealed.make_folder(self.folder)
        self._lock = sealed.lock(self.folder, "this session")
        sealed.clear_partial(self.folder)

    def steps(self) -> list[int]:
        """The steps that are there, ascending; 0 is the context."""
        names = [file.name.removesuffix(SUFFIX) for file in self.folder.glob(f"*{SUFFIX}")]
        return [0] * (CONTEXT in names) + sorted(int(n) for n in names if _STEP.fullmatch(n))

    def run(self, step: int) -> str:
        """The run that a step was computed in. Raises StateError."""
        with self._explained(step):
            return str(sealed.read_header(self._file(step)).get("run"))

    def write(self, step: int, run: str, tree: Any, since: snapshot.Tensors | None = None) -> int:
        """Seal one step; its size in bytes. What is older than `keep` steps goes."""
        header = self._header(step, run)
        size = sealed.write(self._file(step), self.store.key, header, snapshot.dump(tree, since))
        for old in self.steps():
            if 0 < old <= step - self.keep:
                self._file(old).unlink(missing_ok=True)
        return size

    def read(self, step: int, run: str, since: snapshot.Tensors | None = None) -> Any:
        with self._explained(step):
            return snapshot.read(self._file(step), self.store.key, self._header(step, run), since)

    def forget_after(self, step: int) -> None:
        """What lies beyond a step that the session goes back to must never be loaded again."""
        for later in self.steps():
            if later > step:
                self._file(later).unlink(missing_ok=True)
        sealed.to_disk(self.folder)

    def remove(self) -> None:
        """The session has ended: nothing of it stays."""
        for step in self.steps():
            self._file(step).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        with suppress(StateError):
            sealed.to_disk(self.store.folder)
        self.close()

    def close(self) -> None:
        """Let another process go on with the session."""
        os.close(self._lock)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except StateError as error:
            remedy = "remove it to go back to an earlier step" if step else "start anew without --resume"
            raise StateError(f"{self.store.rank.label}: {error}; {remedy}") from None

    def _file(self, step: int) -> Path:
        return self.folder / f"{f'{step:06d}' if step else CONTEXT}{SUFFIX}"

    def _header(self, step: int, run: str) -> dict[str, Any]:
        rank = int(self.store.rank)
        return {"kind": "checkpoint", "rank": rank, "session": self.session, "step": step, "run": run}


@dataclass
class Keeper:
    """Keeps one session at one party; without a store it keeps nothing.

    A new session: `begin` after the context, `token` after each chunk, `end`. A resumed one: `meet`,
    then `token` and `end`. identity: what a resumed session must have in common with the first run,
    by name; texts and files as digests. keep: how many steps stay on disk.
    """

    store: Store | None = None
    resume: bool = False
    keep: int = KEPT_STEPS
    ms: list[float] = field(default_factory=list)  # what each checkpoint took
    bytes: list[int] = field(default_factory=list)  # and its size on disk
    _files: Files | None = None
    _run: str = ""
    _earlier_wire_bytes: int = 0
    _base: snapshot.Tensors = field(default_factory=dict)
    _phases: dict[str, Phase] = field(default_factory=dict)
    _seen: int = 0  # of the ledger's steps

    @property
    def mode(self) -> str:
        """Public, and the same at all parties."""
        return "none" if self.store is None else "resumed" if self.resume else "kept"

    @property
    def last(self) -> int | None:
        """The last step that is on disk."""
        return max(self._files.steps(), default=None) if self._files is not None else None

    def check(self) -> None:
        """Before anything is connected. Raises BadInput if there is nothing to resume."""
        if self.store is not None and self.resume and not self.store.sessions():
            raise BadInput(
                f"{self.store.rank.label}: no session to resume in {self.store.folder}; it has ended, or "
                "never came past its context: start without --resume"
            )

    def meet(self, links: Links, identity: Mapping[str, str]) -> Snapshot | None:
        """The last step that all three hold, loaded; None for a new session.

        Raises StateError: another model, config or question than in the first run; no common step; a
        file that does not open. Raises Desync if the peers send anything but their steps, or mean another
        step. Until all agree, nothing on disk changes.
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
        if name not in self.store.sessions():
            raise StateError(
                f"{me.label}: the client resumes session {name:.32}, which is not in {self.store.folder}"
            )
        self._files = files = Files(self.store, name, self.keep)
        held = {me: {step: files.run(step) for step in files.steps()}}
        if not _SESSION.fullmatch(run) or run in held[me].values():  # a name that comes twice tells nothing
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
        _same_choice(links, {"step": step, "of": of, "run": run})
        found = self._load(step, identity)
        self._run = run
        return found

    def _load(self, step: int, identity: Mapping[str, str]) -> Snapshot:
        """That step, with what the party itself knew last; later steps are forgotten."""
        assert self._files is not None
        files, newest = self._files, max(self._files.steps())
        base = files.read(0, files.run(0))
        self._same(base["identity"], identity)
        self._base = snapshot.tensors_of(base["cache"], "/cache")

        def read(one: int) -> Any:
            return files.read(one, files.run(one), self._base) if one else base

        last = read(step)
        if newest > step:
            last["own"] = read(newest)["own"]  # tokens that the client has shown stay as they are
            files.write(step, files.run(step), last, self._base if step else None)
            files.forget_after(step)
        self._phases = {name: Phase(**phase) for name, phase in last["phases"].items()}
        self._earlier_wire_bytes = last["wire_bytes"]
        return Snapshot(step, base["facts"], base["operands"], last["cache"], base["own"] | last["own"])

    def _same(self, then: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Raises StateError with the first difference."""
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
        session: TimedSession, ledger: Ledger, own: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """The context has been read: the first checkpoint of a new session."""
        if self.store is None:
            return
        self._run = str(facts["model"].get("session"))  # of a first run: the session's own name
        self._files = Files(self.store, self._run, self.keep)
        self._base = snapshot.tensors_of(session.cache, "/cache")
        whole = {"identity": dict(identity), "facts": dict(facts), "operands": session.operands}
        self._write(0, whole, session, ledger, own, None)

    def token(self, session: TimedSession, ledger: Ledger, own: Mapping[str, Any]) -> None:
        """A chunk has been taken in."""
        if self._files is not None:
            self._write(session.chunks, {}, session, ledger, own, self._base)

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
        self.bytes.append(self._files.write(step, self._run, tree, since))
        self.ms.append(1000 * (time.perf_counter() - start))

    def close(self) -> None:
        """What is on disk stays, for `--resume`."""
        if self._files is not None:
            self._files.close()
            self._files = None

    def end(self, links: Links) -> None:
        """The client has the whole answer: all hear it from the client and forget the session."""
        if self._files is None:
            return
        if self._files.store.rank is Rank.CLIENT:
            for link in links.values():
                link.send_facts("close", {"answered": True})
        elif links[Rank.CLIENT].recv_facts("close").get("answered") is not True:
            raise Desync("Desync: the client does not say that it has the answer; the session is kept")
        self._files.remove()
        self._files = None

    # ------------------------------------------------------------------------------------- account

    def phases(self, ledger: Ledger, session: TimedSession) -> dict[str, Phase]:
        """All phases of the session, those before it was interrupted too."""
        return self._phases | self._since_then(ledger, session)

    def wire_bytes(self, ledger: Ledger) -> int:
        return ledger.wire_bytes + self._earlier_wire_bytes

    def _since_then(self, ledger: Ledger, session: TimedSession) -> dict[str, Phase]:
        """Phases that began after the last call: a long session's ledger is not gone through every time."""
        new = {name: ms for name, ms in session.ms.items() if name not in self._phases}
        steps = islice(ledger.steps.items(), self._seen, None)
        self._seen = len(ledger.steps)
        return phases_of(steps, new, session.cpu_ms)


def _steps_of(facts: Mapping[str, Any], peer: Rank) -> dict[int, str]:
    """A peer's steps and the runs they are of. Raises Desync."""
    steps = facts.get("steps")
    if isinstance(steps, list) and all(map(_is_step, steps)):
        found = dict(steps)
        if len(found) == len(steps):  # no step twice
            return found
    raise Desync(f"Desync: {peer.label} sends {steps!r:.60}, not steps; is it the same version?")


def _is_step(pair: Any) -> bool:
    """Whether this is a step's number and its run."""
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
