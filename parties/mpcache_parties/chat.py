"""Talk with a model privately: a conversation at this machine's client, for Python programs.

`connect` asks parties that run elsewhere, `LocalParties` runs server and dealer here, too. The client is a
process of its own; this module speaks with it over its stdin and stdout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from subprocess import TimeoutExpired
from threading import Lock
from types import TracebackType
from typing import Any

from mpcache.config import load_settings
from mpcache.console.inputs import read_text
from mpcache.errors import BadInput
from mpcache.ledger import Entry
from mpcache.rank import Rank
from mpcache.report.account import Finish, TurnReport
from mpcache_parties import piped_conversation
from mpcache_parties.answer_pace import in_words
from mpcache_parties.launch import (
    Child,
    Event,
    PartyFailed,
    document_flags,
    private_folder,
    start_party,
    state_flags,
)
from mpcache_parties.operations.output import EventKind
from mpcache_parties.say import Say, quiet

LOOK_EVERY_S = 0.2  # at the processes, while no event comes
CLOSE_S = 12.0  # for the client's process to end


@dataclass(frozen=True)
class Turn:
    """One question, and what its answer may be."""

    text: str
    max_new_tokens: int | None = None  # at most what the parties agreed on, which is the default
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Account:
    """What a conversation has taken so far. Units: ms, rounds, bytes.

    sent, received: between client and server.  dealt: from the dealer to the client.
    to_server, to_dealer: all that each has received of this client.
    """

    turns: int = 0
    ms: float = 0.0
    rounds: int = 0
    sent: int = 0
    received: int = 0
    dealt: int = 0
    to_server: int = 0
    to_dealer: int = 0


class _Running:
    """What the answer that runs has taken, by what the client's process tells on the way."""

    def __init__(self) -> None:
        self.spent = Entry()
        self._began = time.monotonic()
        self._before: Entry | None = None  # what the session had taken when it began

    def told(self, totals: Entry) -> None:
        """Take note of all that the session has taken."""
        self._before = totals if self._before is None else self._before
        self.spent = totals - self._before

    @property
    def ms(self) -> float:
        return 1000 * (time.monotonic() - self._began)


class Chat:
    """One private conversation. A context manager; not for several threads, but for `stop`.

    turns: the complete ones; of a conversation that was resumed, the earlier ones, too.  unfinished: the
    question whose answer was interrupted; `go_on` yields it.  raw: no chat template stands around its texts.
    """

    def __init__(
        self,
        flags: Sequence[str],
        say: Say = quiet,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """Start this client's process, with `mpcache-party`'s flags, and open a session.

        say: told in words how far it is.  watch: raises what has happened to the parties beside it.
        Raises PartyFailed, or what `watch` raises.
        """
        self.turns: list[TurnReport] = []
        self.unfinished: str | None = None
        self.progress = "starting"
        self.on_progress: Say = quiet  # told each time that `progress` is another layer
        self.room = 0
        self._say, self._watch = say, watch
        self._events: SimpleQueue[tuple[Rank, Event]] = SimpleQueue()
        self._writing = Lock()
        self._answering = False
        self._running: _Running | None = None
        self._child: Child | None = start_party(Rank.CLIENT, [*flags, "--conversation"], self._events)
        try:
            opened = self._next(EventKind.OPENED)
        except BaseException:
            self.close(keep=True)
            raise
        self.room, self.unfinished = int(opened["room"]), opened["unfinished"]
        self.raw = bool(opened["raw"])
        self.turns += map(_report_of, opened["turns"])
        if self.unfinished is not None:
            self._answering, self._running = True, _Running()
        self.progress = ""

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=kind is not None)

    @property
    def account(self) -> Account:
        """What it has taken so far, this session's set-up not counted.

        Of an answer that runs: what it had taken when it was heard of last.
        """
        turns, running = self.turns, self._running
        ms, spent = (0.0, Entry()) if running is None else (running.ms, running.spent)
        sent = spent.sent + sum(turn.sent for turn in turns)
        return Account(
            turns=len(turns),
            ms=ms + sum(turn.ms for turn in turns),
            rounds=spent.rounds + sum(turn.rounds for turn in turns),
            sent=sent,
            received=spent.received + sum(turn.received for turn in turns),
            dealt=spent.offline_received + sum(turn.offline_received for turn in turns),
            to_server=sent,
            to_dealer=spent.offline_sent + sum(turn.offline_sent for turn in turns),
        )

    @property
    def finish_reason(self) -> str:
        """What the last answer ended with: "stop" or "length"."""
        return "length" if self.turns and self.turns[-1].finish is Finish.LENGTH else "stop"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the last question, with what stands around its text."""
        return self.turns[-1].question_tokens if self.turns else 0

    @property
    def completion_tokens(self) -> int:
        """Tokens of the last answer."""
        return len(self.turns[-1].token_ids) if self.turns else 0

    def ask(self, question: str | Turn) -> Iterator[str]:
        """Ask, and yield the answer in pieces as they come. Raises BadInput, after which others may be asked.

        An iterator that is closed before its end stops the answer. Raises PartyFailed where the session has
        failed.
        """
        turn = question if isinstance(question, Turn) else Turn(question)
        wanted = {
            "new_tokens": turn.max_new_tokens, "temperature": turn.temperature, "top_p": turn.top_p,
            "seed": turn.seed, "stop": list(turn.stop),
        }  # fmt: skip
        line = piped_conversation.ask_line(
            turn.text, **{name: value for name, value in wanted.items() if value is not None}
        )
        if self._answering:
            raise BadInput("an answer runs; stop it, or hear it to its end")
        self._answering, self._running = True, _Running()
        self._write(line)
        yield from self._answer()

    def go_on(self) -> Iterator[str]:
        """Yield the answer that was interrupted, from its beginning; nothing where none was.

        It is to be heard before anything is asked. Raises as `ask`.
        """
        if self.unfinished is not None:
            yield from self._answer()

    def _answer(self) -> Iterator[str]:
        try:
            while (piece := self._piece()) is not None:
                yield piece
        finally:
            if self._answering and self._child is not None:  # the one who asked has gone
                self.stop()
                with suppress(PartyFailed, BadInput):
                    while self._piece() is not None:
                        pass

    def stop(self) -> None:
        """End the answer that runs after its present token; any thread may call this."""
        if self._child is not None and self._answering:
            self._write(piped_conversation.ENOUGH_LINE)

    def close(self, keep: bool = False) -> None:
        """End the session and its process; harmless to repeat.

        keep: one with a `state` is suspended, so that it can be resumed.
        """
        if not keep:
            self._write(piped_conversation.END_LINE)
        child, self._child, self._answering = self._child, None, False
        if child is None:
            return
        with suppress(OSError):
            assert child.stdin is not None
            child.stdin.close()
        try:
            child.wait(CLOSE_S)
        except TimeoutExpired:
            child.kill()
            child.wait()

    def _piece(self) -> str | None:
        """Wait for the next piece of the answer; None where it ends. Raises BadInput if it was not begun."""
        event = self._next(EventKind.TOKEN, EventKind.TURN, EventKind.REFUSED)
        self.progress = ""
        if event["event"] == EventKind.TOKEN:
            return str(event["text"])
        self._answering, self.unfinished = False, None
        if event["event"] == EventKind.REFUSED:
            self._running = None
            raise BadInput(event["text"])
        self.turns.append(_report_of(event["turn"]))
        self._running = None  # last: who reads the account meanwhile sees it grow
        self.room = self.turns[-1].room
        return None

    def _write(self, line: bytes) -> None:
        with self._writing, suppress(OSError):  # a process that is gone is found by who reads its events
            if self._child is None:
                return
            assert self._child.stdin is not None
            self._child.stdin.write(line)
            self._child.stdin.flush()

    def _next(self, *kinds: EventKind) -> dict[str, Any]:
        """Wait for an event of one of these kinds. Raises PartyFailed, or what `watch` raises."""
        if self._child is None:
            raise PartyFailed("the conversation is closed")
        failure: PartyFailed | None = None
        while True:
            try:
                _, event = self._events.get(timeout=LOOK_EVERY_S)
            except Empty:
                self._watch()
                continue
            match event:
                case dict(found) if found["event"] in kinds:
                    return found
                case {"event": EventKind.SAY, "text": str(text)}:
                    self.progress = text.removeprefix("client: ")
                    self._say(text)
                case {"event": EventKind.LAYER, "phase": str(phase), "layer": int(layer), **more}:
                    if self._running is not None and isinstance(totals := more.get("traffic"), dict):
                        self._running.told(Entry(**totals))
                    layers, left = int(str(more["layers"])), more["left_ms"]
                    self.progress = in_words(phase, layer, layers, left if isinstance(left, float) else None)
                    self.on_progress(self.progress)
                case {"event": EventKind.ERROR, "text": str(text), "exit_code": int(code)}:
                    failure = PartyFailed(text, code)
                case None:
                    self._events.put((Rank.CLIENT, None))  # whoever waits after this hears it, too
                    self._watch()
                    raise failure or PartyFailed("the client's process has ended")


def _report_of(found: dict[str, Any]) -> TurnReport:
    return TurnReport(**{**found, "finish": Finish(found["finish"])})


def connect(
    config: Path | str, identity: Path | str | None = None, say: Say = quiet, *, insecure: bool = False,
    state: Path | str | None = None, resume: bool = False, document: str = "",
    private_context: Path | str | None = None,
) -> Chat:  # fmt: skip
    """Open a conversation with a server and a dealer that run elsewhere; close it after use.

    config: the YAML file that all parties agree on.  identity: the folder of this client's key and
    certificate; None for parties of this machine without TLS.  say: gets a line now and then about how far
    the set-up is.  insecure: no TLS, whatever the addresses.  state: a folder of this client's where the
    conversation is kept while it lasts; the others must keep it, too.  resume: go on with the one that is
    kept there.  document: the public name of one of the server's; "": it has one.
    private_context: the client's own, a text or the Path of a text file, which nobody else sees. Raises
    ConfigError, BadInput, or PartyFailed where no session comes about.
    """
    load_settings(config)  # its faults are told here, not by a process
    flags = ["--config", str(config), *document_flags(document)]
    if identity is not None:
        flags += ["--identity", str(identity)]
    if insecure:
        flags.append("--insecure")
    return open_chat([*flags, *state_flags(state, resume)], say, text_given(private_context))


def open_chat(
    flags: Sequence[str], say: Say, document: str | None, watch: Callable[[], None] = lambda: None
) -> Chat:
    """Open a conversation about the client's document, which goes in a file: flags can be seen by all."""
    if document is None:
        return Chat(flags, say, watch)
    with private_folder() as folder:
        file = folder / "document.txt"
        file.write_text(document, encoding="utf-8", newline="")
        return Chat([*flags, "--context", str(file)], say, watch)


def text_given(document: Path | str | None) -> str | None:
    """Return a text as it is, or read the file that a Path names. Raises TextError."""
    return read_text(document) if isinstance(document, Path) else document
