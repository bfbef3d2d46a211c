"""A conversation without parties: it answers with the question's own words, as slowly as a test wants."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event

from mpcache.errors import BadInput, MpcacheError, PeerLost
from mpcache_parties.chat import Account, Turn
from mpcache_parties.say import Say


@dataclass
class Script:
    """What conversations do. pace_s: for each word.  go: words wait for it.  setup_s: for each session.

    raw: no chat template stands around them.  refuse_open: what an opening ends with.  die_after: words
    after which the session fails.
    """

    pace_s: float = 0.0
    setup_s: float = 0.0
    room: int = 1000
    raw: bool = True
    refuse_open: MpcacheError | None = None
    die_after: int | None = None
    go: Event = field(default_factory=Event)
    opened: list[ScriptedChat] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go.set()

    def open(self, say: Say) -> ScriptedChat:
        for share in range(0, 100, 25):
            say(f"set-up {share} %")
            time.sleep(self.setup_s / 4)
        if self.refuse_open is not None:
            raise self.refuse_open
        chat = ScriptedChat(self)
        self.opened.append(chat)
        return chat


class ScriptedChat:
    """Answers `Heard N: ` and the words of the question. A word is a token."""

    def __init__(self, script: Script) -> None:
        self.turns: list[Turn] = []
        self.finish_reason, self.progress = "stop", ""
        self.prompt_tokens = self.completion_tokens = 0
        self.room, self.account, self.closed, self.raw = script.room, Account(), False, script.raw
        self._script, self._stopped = script, False

    def ask(self, turn: Turn) -> Iterator[str]:
        asked = turn.text.split()
        if len(asked) >= self.room:
            raise BadInput(f"the question has {len(asked)} tokens, the session has room for {self.room}")
        self.turns.append(turn)
        self._stopped, self.finish_reason = False, "stop"
        self.prompt_tokens, self.completion_tokens = len(asked), 0
        self.progress = "question: layer 1 of 2"
        words = " ".join([f"Heard_{len(self.turns)}:", *asked])
        for stop in turn.stop:
            words = words.partition(stop)[0]
        for number, word in enumerate(words.split()):
            if number == turn.max_new_tokens:
                self.finish_reason = "length"
                break
            self._wait()
            if self._script.die_after == number:
                raise PeerLost("client: server: the connection has ended")
            if self._stopped:
                break
            self.completion_tokens += 1
            yield word.replace("_", " ") if number == 0 else f" {word}"
        self.progress = ""
        self.room -= self.prompt_tokens + self.completion_tokens
        one, count = self.account, self.completion_tokens
        self.account = Account(
            one.turns + 1, one.ms + 1000.0, one.rounds + 138 * count, one.sent + 447_000 * count,
            one.received + 447_000 * count, one.dealt + 23_100_000 * count, one.to_server + 447_000 * count,
            one.to_dealer + 512,
        )  # fmt: skip

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self.closed = True

    def _wait(self) -> None:
        limit = time.monotonic() + self._script.pace_s
        while not self._stopped and (time.monotonic() < limit or not self._script.go.is_set()):
            time.sleep(0.005)
