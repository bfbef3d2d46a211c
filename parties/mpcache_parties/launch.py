"""Run all three parties as processes of this machine: start, listen to, and end them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import yaml

from mpcache.certificates import make_identity
from mpcache.config import Addresses, Certificates, PublicConfig, Settings
from mpcache.errors import BadInput, MpcacheError, SystemRefusal, one_line
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache_parties.operations.output import EventKind
from mpcache_parties.placement import on_cores_of
from mpcache_parties.resources import OnToken, show_no_token
from mpcache_parties.say import Say, quiet

GRACE_S = 5.0  # for the others to say why, after a party failed
END_S = 3.0  # for a party to end in order
GONE_S = 10.0  # for a process that closed its stdout to be gone
LOOK_EVERY_S = 1.0  # for a process that is gone while another holds its stdout open
LONGEST_LINE = 64 << 20  # bytes of one event
# -P: the parties import what is installed, and what PYTHONPATH names, not what lies in this folder.
COMMAND = (sys.executable, "-P", "-m", "mpcache_parties")

TEXT_FLAGS = {Rank.SERVER: "--context", Rank.CLIENT: "--question-file"}
TEXT_ENDS = {Rank.SERVER: "", Rank.CLIENT: "\n"}  # what its reader takes off again

Event = dict[str, Any] | None  # None: the process has closed its stdout
Child = subprocess.Popen[bytes]
_EFFECTS = ("PeerLost", "PeerFailed")  # errors that another party's failure causes


class PartyFailed(MpcacheError):
    """A party ended without its part being done; the text is its own error's.

    answer: the client's report, where its own part was done.
    """

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.answer: Report | None = None


def free_addresses() -> Addresses:
    """Return loopback addresses that nobody listens on now."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        server, dealer = (f"127.0.0.1:{probe.getsockname()[1]}" for probe in (one, two))
    return Addresses(server=server, dealer=dealer)


def run_parties(
    settings: Settings,
    flags: Mapping[Rank, Sequence[str]],
    texts: Mapping[Rank, str],
    say: Say,
    on_token: OnToken,
    private: str | None = None,
) -> dict[Rank, Report]:
    """Run one session between three processes on free ports, over TLS with identities of its own.

    flags: each party's own. texts: the server's document and the client's question, private: the client's
    document, which go in files:
    everybody can see a process's flags, and what was read from a pipe cannot be read again.

    Raises PartyFailed with the first cause, in one line; SystemRefusal where no file can be written.
    No process outlives this call; if this process is killed they end by themselves, as their stdin closes.
    """
    settings = settings.model_copy(update={"addresses": free_addresses()})
    events: SimpleQueue[tuple[Rank, Event]] = SimpleQueue()
    children: dict[Rank, Child] = {}
    with private_folder() as folder:
        own = write_session(settings, texts, folder, private)
        try:
            for rank in Rank:
                with on_cores_of(rank):
                    children[rank] = start_party(rank, [*own[rank], *flags.get(rank, ())], events)
            return _listen(children, events, say, on_token)
        finally:
            end_parties(children)


def run_quietly(public: PublicConfig, model: Path, document: str, question: str) -> dict[Rank, Report]:
    """Run a session to be measured: an answer of full length, of which only the account is of interest."""
    flags = {Rank.SERVER: ["--model", str(model)], Rank.CLIENT: ["--no-stop-at-eos"]}
    texts = {Rank.SERVER: document, Rank.CLIENT: question}
    return run_parties(Settings(public=public), flags, texts, quiet, show_no_token)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, for a while. Raises SystemRefusal."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="mpcache-", ignore_cleanup_errors=True)
    except OSError as error:
        what = f"no temporary folder can be made: {error.strerror or error}"
        raise SystemRefusal(f"{what}; set TMPDIR to a folder that can be written") from None
    with folder as name:
        yield Path(name)


def write_session(
    settings: Settings, texts: Mapping[Rank, str], folder: Path, private: str | None = None
) -> dict[Rank, list[str]]:
    """Write what three parties need for one session; return each party's flags. Raises SystemRefusal."""
    config = folder / "session.yaml"
    flags = {rank: ["--config", str(config), "--identity", str(folder)] for rank in Rank}
    try:
        settings = settings.model_copy(update={"certificates": _identities(folder)})
        config.write_text(yaml.safe_dump(settings.model_dump()), encoding="utf-8")
        for rank, text in texts.items():
            file = folder / f"{rank.label}.txt"
            file.write_text(text + TEXT_ENDS[rank], encoding="utf-8", newline="")
            flags[rank] += [TEXT_FLAGS[rank], str(file)]
        if private is not None:
            file = folder / "client-document.txt"
            file.write_text(private, encoding="utf-8", newline="")
            flags[Rank.CLIENT] += ["--context", str(file)]
    except OSError as error:
        raise SystemRefusal.of(error, str(folder)) from None
    return flags


def document_flags(name: str) -> list[str]:
    """Return the flags of a client that names one of the server's documents; "": it has one."""
    return ["--document", name] if name else []


def state_flags(state: Path | str | None, resume: bool = False) -> list[str]:
    """Return the flags of a party that keeps a session. Raises BadInput."""
    if state is None:
        if resume:
            raise BadInput("to resume needs the state: the folder where the session is kept")
        return []
    return ["--state", str(state), *["--resume"] * resume]


def setup_flags(folder: Path | None) -> dict[Rank, list[str]]:
    """Return the flags with which server and dealer keep their masks in a folder, if there is one."""
    return (
        {} if folder is None else {rank: ["--setup-dir", str(folder)] for rank in (Rank.SERVER, Rank.DEALER)}
    )


def _identities(folder: Path) -> Certificates:
    """Make new identities for all three, in this folder, for one session."""
    pinned = {}
    for rank in Rank:
        identity = make_identity(rank)
        identity.write(folder)
        pinned[rank.label] = identity.certificate.decode()
    return Certificates(**pinned)


def start_party(rank: Rank, flags: Sequence[str], events: SimpleQueue[tuple[Rank, Event]]) -> Child:
    """Start a party's process; what it writes comes as events."""
    # A session of its own, so that Ctrl-C reaches this process alone, which then ends the parties.
    child = subprocess.Popen(
        [*COMMAND, "--rank", str(int(rank)), "--events", *flags],
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # -P, for what the child starts
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    threading.Thread(target=_read, args=(rank, child.stdout, events), daemon=True).start()
    return child


def _read(rank: Rank, stdout: IO[bytes], events: SimpleQueue[tuple[Rank, Event]]) -> None:
    """Queue what a process writes, and that it has ended, whatever happens to this thread."""
    try:
        with stdout:
            for line in iter(partial(stdout.readline, LONGEST_LINE), b""):
                events.put((rank, _event(rank, line)))
    finally:
        events.put((rank, None))


def _event(rank: Rank, line: bytes) -> dict[str, Any]:
    """Read an event. A line that is none comes from a library, and is passed on as a word of the party's."""
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict) and "event" in found:
            return found
    return {"event": EventKind.SAY, "text": f"{rank.label}: {one_line(line.decode(errors='replace'))}"}


def _listen(
    children: Mapping[Rank, Child],
    events: SimpleQueue[tuple[Rank, Event]],
    say: Say,
    on_token: OnToken,
) -> dict[Rank, Report]:
    """Listen until all have ended, or the cause of a failure is known. Raises PartyFailed.

    A party's report ends its part: how it closes its links, and how long that takes, costs no answer.
    """
    reports: dict[Rank, Report] = {}
    errors: dict[Rank, dict[str, Any]] = {}
    running, deadline = set(children), float("inf")
    while running and time.monotonic() < deadline:
        try:
            rank, event = events.get(timeout=max(0.0, min(deadline - time.monotonic(), LOOK_EVERY_S)))
        except Empty:
            gone = [rank for rank in running if children[rank].poll() is not None]
            if not gone:
                continue
            rank, event = gone[0], None  # all that it wrote has been read
        match event:
            case {"event": EventKind.SAY, "text": str(text)}:
                say(text)
            case {"event": EventKind.TOKEN, "id": int(token), "text": str(text)}:
                on_token(token, text)
            case {"event": EventKind.REPORT, "report": dict(report)}:
                with suppress(KeyError, TypeError, ValueError):
                    reports[rank] = Report.from_dict(report)
                if len(reports) == len(children):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            case {"event": EventKind.ERROR, "name": str(name), "text": str(text), "exit_code": int(code)}:
                errors[rank] = {"name": name, "text": text, "exit_code": code}
            case None:
                running.discard(rank)
                if rank in reports:
                    continue
                with suppress(subprocess.TimeoutExpired):  # one that goes on without its stdout
                    children[rank].wait(GONE_S)
                if rank not in errors or errors[rank]["name"] not in _EFFECTS:
                    break
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if len(reports) == len(children):
        return reports
    failure = first_cause(children, reports, errors)
    failure.answer = reports.get(Rank.CLIENT)
    raise failure


def first_cause(
    children: Mapping[Rank, Child],
    reports: Mapping[Rank, Report],
    errors: Mapping[Rank, dict[str, Any]],
) -> PartyFailed:
    """Find the failure that the others follow from: of all errors, the one that no peer is the reason of."""
    for rank, child in children.items():
        if rank in errors or rank in reports or (code := child.poll()) is None:
            continue
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed; see its output above"
        return PartyFailed(f"the {rank.label} process (rank {int(rank)}) {how}", 1)
    found = sorted(
        errors.values(), key=lambda error: _EFFECTS.index(error["name"]) if error["name"] in _EFFECTS else -1
    )
    if not found:
        return PartyFailed("the parties did not end")
    return PartyFailed(found[0]["text"], found[0]["exit_code"])


def end_parties(children: Mapping[Rank, Child]) -> None:
    """End them: in order if they take the hint of a closed stdin, else by force."""
    for child in children.values():
        if child.stdin is not None:
            with suppress(OSError):
                child.stdin.close()
    deadline = time.monotonic() + END_S
    for child in children.values():
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
