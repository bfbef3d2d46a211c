"""Keep a party's sessions on its own disk, each a folder of sealed files.

    DIR/server/key                      this party's key (mode 0600)
    DIR/server/SESSION/context.state    facts, masked weights and cache as the context left them
    DIR/server/SESSION/000007.state     what the first seven chunks added: written after each token
    DIR/server/SESSION/000019.state     of a later turn: what was added to the last step of the turn before
    DIR/client/SESSION/note.state       what the client was asked since then

A party that serves has several sessions at once, each on a thread of its own: a session's files belong
to whoever holds its lock, be it another process or another thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any

from mpcache.errors import Desync, InUse, StateError
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache_parties.state import sealed, snapshot

CONTEXT, NOTE = "context", "note"
SUFFIX = ".state"
KEPT_STEPS = 3 + 3  # server and client are a step apart at most; the dealer may be three ahead of both
_SESSION = re.compile(r"[0-9a-f]{32}")
_STEP = re.compile(r"\d{6}")


def check_name(name: str) -> None:
    """Check the name of a session or a run: 128 random bits in hex, no path, no file's whole header.

    Raises Desync.
    """
    if not _SESSION.fullmatch(name):
        raise Desync(f"Desync: {name!r:.60} is not a session's name; is it the same version?")


class Store:
    """One party's folder of sessions. Raises StateError if it or its key cannot be used."""

    def __init__(self, folder: Path, rank: Rank, key_file: Path | None = None) -> None:
        self.rank, self.folder = rank, folder / rank.label
        sealed.make_folder(self.folder)
        self.key = sealed.load_key(key_file or self.folder / "key")
        self.changing = RLock()  # held while folders come and go; never while something is sealed

    def sessions(self) -> list[str]:
        """List the sessions that can be resumed, the one that was used last in front."""
        used: dict[str, int] = {}
        for name in self._folders():
            with suppress(OSError):  # another thread's session may end meanwhile, or be without a context
                (self.folder / name / f"{CONTEXT}{SUFFIX}").stat()
                used[name] = (self.folder / name).stat().st_mtime_ns
        return sorted(used, key=used.__getitem__, reverse=True)

    def forget_old(self, left: int) -> None:
        """Remove the sessions that nobody has open, but for the `left` ones that were used last.

        None stays that was killed before its context was kept, for it cannot be resumed.
        """
        with self.changing:
            whole = self.sessions()
            for name in (*whole, *(set(self._folders()) - set(whole))):
                with suppress(InUse):
                    files = Files(self, name)
                    if files.steps()[:1] == [0] and left > 0:
                        left -= 1
                        files.close()
                    else:
                        files.remove()

    def _folders(self) -> list[str]:
        with sealed.telling(f"{self.folder}: cannot be read"):
            return [name for name in os.listdir(self.folder) if _SESSION.fullmatch(name)]


class Files:
    """The files of one session at one party; a lock keeps everybody else away from them."""

    def __init__(self, store: Store, session: str, keep: int = KEPT_STEPS) -> None:
        """Open, or begin, a session. keep: how many steps stay; older ones are removed.

        Raises Desync on what is no session's name, InUse if somebody has the session open, StateError.
        """
        check_name(session)
        self.store, self.session, self.keep = store, session, keep
        self.folder = store.folder / session
        with store.changing:
            sealed.make_folder(self.folder)
            self._lock = sealed.lock(self.folder, "this session")
        sealed.clear_partial(self.folder)

    def steps(self) -> list[int]:
        """List the steps that are there, ascending; 0 is the context."""
        names = [file.name.removesuffix(SUFFIX) for file in self.folder.glob(f"*{SUFFIX}")]
        return [0] * (CONTEXT in names) + sorted(int(n) for n in names if _STEP.fullmatch(n))

    def run(self, step: int) -> str:
        """Return the run that a step was computed in. Raises StateError."""
        with self._explained(step):
            return str(sealed.read_header(self._file(step)).get("run"))

    def place(self, step: int) -> ChunkPlace:
        """Return where the session stood after a step. Raises StateError."""
        with self._explained(step):
            place = sealed.read_header(self._file(step)).get("place")
            if isinstance(place, list) and len(place) == 2 and all(type(number) is int for number in place):
                return ChunkPlace(*place)
            raise StateError(f"{self._file(step)}: its place is {place!r:.60}, not a turn and a step")

    def bases(self, step: int) -> list[int]:
        """Return the steps that one was written after, each after the next one in the list, down to 0.

        Raises StateError.
        """
        found: list[int] = []
        while step:
            with self._explained(step):
                of = sealed.read_header(self._file(step)).get("after")
                if type(of) is not int or not 0 <= of < step:
                    raise StateError(f"{self._file(step)}: it comes after {of!r:.60}, not an earlier step")
            found.append(step := of)
        return found

    def write(
        self, step: int, run: str, tree: Any, since: snapshot.Tensors | None = None,
        place: ChunkPlace | None = None, after: Sequence[int] = (0,),
    ) -> int:  # fmt: skip
        """Seal one step; return its size in bytes. What is older than `keep` steps goes.

        place: where the session stands after it; None: in its first turn.  after: as `bases` returns it;
        these stay.  since: the tensors of the first of them.
        """
        header = self._header(step, run) | {"place": list(place or ChunkPlace(1, step))}
        if step:
            header |= {"after": after[0], "after_run": self.run(after[0])}
        size = sealed.seal(self._file(step), self.store.key, header, snapshot.serialize(tree, since))
        for old in self.steps():
            if old <= step - self.keep and old not in after:
                self._file(old).unlink(missing_ok=True)
        return size

    def read(self, step: int, run: str, since: snapshot.Tensors | None = None) -> Any:
        """Read one step of a run. since: the tensors of the step that it was written after."""
        header = self._header(step, run)
        if bases := self.bases(step):
            header |= {"after": bases[0], "after_run": self.run(bases[0])}
        with self._explained(step):
            return snapshot.read_snapshot(self._file(step), self.store.key, header, since)

    def write_note(self, step: int, run: str, tree: Any) -> None:
        """Seal what belongs to a step and came after it. It replaces the note before it."""
        sealed.seal(self._note, self.store.key, self._note_header(step, run), snapshot.serialize(tree))

    def read_note(self, step: int, run: str) -> Any:
        """Return what was noted after a step of a run; None where nothing was."""
        if not self._note.exists():
            return None
        try:
            there, header = sealed.read_header(self._note), self._note_header(step, run)
            if any(there.get(name) != header[name] for name in ("step", "run")):
                return None
            return snapshot.read_snapshot(self._note, self.store.key, header)
        except StateError as error:
            raise StateError(f"{self.store.rank.label}: {error}; remove it to go on without it") from None

    def forget_after(self, step: int) -> None:
        """Remove the steps beyond one that the session goes back to: they must never be loaded again."""
        for later in self.steps():
            if later > step:
                self._file(later).unlink(missing_ok=True)
        sealed.to_disk(self.folder)

    def remove(self) -> None:
        """Remove all of a session that has ended."""
        for step in self.steps():
            self._file(step).unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        with self.store.changing, suppress(OSError):
            (self.folder / sealed.LOCK_FILE).unlink(missing_ok=True)
            self.folder.rmdir()
        with suppress(StateError):
            sealed.to_disk(self.store.folder)
        self.close()

    def close(self) -> None:
        """Let others go on with the session."""
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

    @property
    def _note(self) -> Path:
        return self.folder / f"{NOTE}{SUFFIX}"

    def _note_header(self, step: int, run: str) -> dict[str, Any]:
        return self._header(step, run) | {"kind": "note"}

    def _header(self, step: int, run: str) -> dict[str, Any]:
        rank = int(self.store.rank)
        return {"kind": "checkpoint", "rank": rank, "session": self.session, "step": step, "run": run}
