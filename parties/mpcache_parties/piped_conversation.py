"""Hold a conversation for a parent process: questions as JSON lines on stdin, what becomes of them as events.

    {"ask": TEXT, "new_tokens": 32, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop_at_eos": true,
     "stop": [TEXT, ...]}
    {"enough": true}
    {"end": true}

All but `ask` may be left out. `enough` ends the answer that runs after its present token. The conversation
ends when stdin closes; one that is kept ends with `end`, and is suspended where stdin closes without it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from queue import Empty, SimpleQueue
from threading import Thread
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpcache.console.options import read_stops
from mpcache.errors import BadInput
from mpcache.report.account import TurnReport
from mpcache.sampling import Sampling
from mpcache_parties.operations.output import EventKind, Output
from mpcache_parties.private_inputs import Conversation, Question, TurnRecord

LOOK_EVERY_S = 0.2  # at the session, while no question comes
END_S = 5.0  # for the session to end in order once stdin has closed
LONGEST_LINE = 16 << 20  # bytes


class _Line(BaseModel):
    """One line of stdin."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ask: str | None = None
    stop: list[str] = []
    enough: bool = False
    end: bool = False
    new_tokens: int | None = Field(default=None, ge=1)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_at_eos: bool = True


class PipedConversation(Conversation):
    """The conversation of a party that another process has started.

    kept: it can be resumed, so it ends only where that process says so.  document: the client's own.
    """

    def __init__(
        self, output: Output, stdin: BinaryIO, kept: bool = False, document: str | None = None
    ) -> None:
        self.document = document
        self._output, self._stdin = output, stdin
        self._suspends, self._over = kept, False
        self._asked: SimpleQueue[Question | BadInput | None] = SimpleQueue()
        self._came = self._given = self._stopped = 0  # questions; the last one is the newest that is stopped
        Thread(target=self._read, daemon=True).start()

    def opened(self, room: int, earlier: Sequence[TurnRecord], raw: bool) -> None:
        turns = [asdict(record.report) for record in earlier if record.report is not None]
        unfinished = next((record.question.text for record in earlier if record.report is None), None)
        if unfinished is not None:  # as if it was asked now
            self._came, self._given = self._came + 1, self._given + 1
        self._output.event(EventKind.OPENED, room=room, turns=turns, unfinished=unfinished, raw=raw)

    def questions(self, look: Callable[[], None]) -> Iterator[Question]:
        while True:
            try:
                asked = self._asked.get(timeout=LOOK_EVERY_S)
            except Empty:
                look()
                continue
            match asked:
                case None:
                    return
                case BadInput():
                    self._given += 1
                    self.refused(asked)
                case _:
                    self._given += 1
                    yield asked

    def stopped(self) -> bool:
        return self._stopped >= self._given

    def over(self) -> bool:
        return self._over and self._given >= self._came

    def answered(self, report: TurnReport) -> None:
        self._output.event(EventKind.TURN, turn=asdict(report))

    def refused(self, why: BadInput) -> None:
        self._output.event(EventKind.REFUSED, text=str(why))

    def _read(self) -> None:
        """Take lines until stdin closes; what does not end in order then, or is suspended, is ended."""
        with suppress(OSError, ValueError), self._stdin:
            for line in iter(lambda: self._stdin.readline(LONGEST_LINE), b""):
                self._take(line)
        if not self._suspends:
            self._stopped, self._over = self._came, True
            self._asked.put(None)
        _end_this_process(0.0 if self._suspends else END_S)

    def _take(self, data: bytes) -> None:
        try:
            line = _Line.model_validate_json(data)
            if line.enough:
                self._stopped = self._came
                return
            if line.end:
                self._suspends = False
                return
            asked: Question | BadInput = _question(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            asked = BadInput(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}")
        except BadInput as error:
            asked = error
        self._came += 1
        self._asked.put(asked)


def _end_this_process(patience: float) -> None:
    """End what does not end in order. patience: s for it to do so by itself."""
    time.sleep(patience)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os._exit(128 + signal.SIGTERM)


def _question(line: _Line) -> Question:
    """Return the question that a line asks. Raises BadInput."""
    if line.ask is None or not line.ask.strip():
        raise BadInput("the question is empty")
    sampling = Sampling(line.temperature, line.top_p, line.seed)
    return Question(
        line.ask, sampling, line.stop_at_eos, read_stops(line.stop, line.stop_at_eos), line.new_tokens
    )


def ask_line(text: str, **more: object) -> bytes:
    """Return the line that asks this."""
    return json.dumps({"ask": text, **more}).encode() + b"\n"


ENOUGH_LINE = json.dumps({"enough": True}).encode() + b"\n"
END_LINE = json.dumps({"end": True}).encode() + b"\n"
