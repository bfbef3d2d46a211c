"""Keep open conversations, and give each request the one that it continues; who comes first is served first.

A request is told by what it says, not by a name: it continues the conversation with its model whose messages
its own begin with. All of this runs in one event loop; what blocks has threads of its own.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from time import monotonic
from typing import TypeVar

from mpcache_parties.endpoint.chat_like import ChatLike, Models
from mpcache_parties.endpoint.completions import Said
from mpcache_parties.endpoint.refusals import Refusal
from mpcache_parties.say import Say

T = TypeVar("T")
LOOK_EVERY_S = 0.05  # at what ends
RETRY_S = 5  # told to a caller for whom there is no place, before any answer has taken its time


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run something that blocks in a thread of its own.

    An executor would wait for its threads at the end of the process, and these may wait for a peer.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def give(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            found, error = work(), None
        except BaseException as raised:
            found, error = None, raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(give, found, error)

    Thread(target=run, daemon=True).start()
    return done


@dataclass(eq=False)
class OpenConversation:
    """A session and what was said in it.

    model: the public name of what it asks.  cut: the last answer was left in the middle, so its caller may
    have heard less of it.
    """

    chat: ChatLike
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    said: tuple[Said, ...] = ()
    cut: bool = False
    busy: bool = False
    used_at: float = 0.0
    expiry: asyncio.TimerHandle | None = None

    def begins(self, model: str, messages: Sequence[Said]) -> bool:
        """Return whether these messages to a model go on where this conversation is."""
        last = len(self.said) - 1
        pairs = enumerate(zip(self.said, messages, strict=False))
        return (
            model == self.model
            and len(messages) > len(self.said)
            and all(_same(ours, theirs, cut=self.cut and number == last) for number, (ours, theirs) in pairs)
        )


def _same(ours: Said, theirs: Said, cut: bool) -> bool:
    """Compare messages as callers send them back: without the blanks around them."""
    mine, other = ours.text.strip(), theirs.text.strip()
    same = mine == other or (cut and other != "" and mine.startswith(other))
    return same and ours.role is theirs.role


@dataclass(eq=False)
class SessionOpening:
    """A session with a model that is being set up. progress: how far, in words."""

    model: str
    progress: str = "opening a private session"


@dataclass(eq=False)
class Waiter:
    """A request that waits for its conversation.

    place: 1 is next; 0 is having one set up.  progress: how far that is, in words.
    """

    model: str
    messages: tuple[Said, ...]
    given: asyncio.Future[OpenConversation]
    place: int = 0
    progress: str = ""


class ConversationPool:
    """Conversations with the parties, `limit` at once.

    queue: how many requests may wait beyond those that are having a session set up.
    idle_s: after which a conversation that nobody continues is closed.
    """

    def __init__(self, models: Models, limit: int, queue: int, idle_s: float, say: Say) -> None:
        self.limit, self.queue = limit, queue
        self.open: list[OpenConversation] = []
        self._models, self._idle_s, self._say = models, idle_s, say
        self._waiting: list[Waiter] = []
        self._openings: list[SessionOpening] = []
        self._closing: set[asyncio.Future[None]] = set()
        self._took_s: float = RETRY_S  # of the last answer
        self._ended: str | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait, those among them that are having a session set up."""
        return len(self._waiting)

    def join(self, model: str, messages: tuple[Said, ...]) -> Waiter:
        """Wait for the conversation with a model that these messages continue, or for a new one.

        Raises Refusal where too many wait. Who waits no longer says so by `leave`.
        """
        if self._ended is not None:
            raise Refusal(503, self._ended, code="shutting_down")
        waiter = Waiter(model, messages, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._advance()
        if waiter.place > self.queue:
            self._waiting.remove(waiter)
            raise Refusal(
                429,
                f"{self.limit} answers run and {self.queue} requests wait, which is as many as there may be; "
                "come again later",
                code="queue_full",
                headers={"Retry-After": str(max(1, round(self._took_s)))},
            )
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Wait no longer. A session that is being set up is kept for the next request."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
            waiter.given.cancel()
            self._advance()
        elif waiter.given.done() and not waiter.given.cancelled() and waiter.given.exception() is None:
            self.give_back(waiter.given.result())

    def give_back(self, conversation: OpenConversation, alive: bool = True) -> None:
        """Take a conversation back after its answer. alive: it can be continued."""
        if conversation.busy:
            self._took_s = monotonic() - conversation.used_at
        conversation.busy, conversation.used_at = False, monotonic()
        if not alive or self._ended is not None:
            self._close(conversation)
        else:
            loop = asyncio.get_running_loop()
            conversation.expiry = loop.call_later(self._idle_s, self._expire, conversation)
        self._advance()

    async def end(self, reason: str, within_s: float) -> None:
        """Refuse who waits, stop what runs, and close all, as far as that goes in time."""
        self._ended = reason
        for waiter in self._waiting:
            if not waiter.given.done():
                waiter.given.set_exception(Refusal(503, reason, code="shutting_down"))
        self._waiting.clear()
        for conversation in [*self.open]:
            if conversation.busy:
                conversation.chat.stop()  # it comes back after its token, and is closed then
            else:
                self._close(conversation)
        limit = monotonic() + within_s
        while (self.open or self._closing) and monotonic() < limit:
            await asyncio.sleep(LOOK_EVERY_S)
        for conversation in [*self.open]:
            self._close(conversation)

    # ------------------------------------------------------------------------------------- moving on

    def _advance(self) -> None:
        """Give out what is idle, and make room and sessions for those that it does not fit."""
        for waiter in [*self._waiting]:
            if (found := self._fitting(waiter)) is not None:
                self._waiting.remove(waiter)
                self._give(waiter, found)
        while self._ended is None and len(self._closing) < len(lacking := self._lacking()):
            if len(self.open) + len(self._openings) + len(self._closing) < self.limit:
                self._start_opening(lacking[0].model)
            elif idle := [each for each in self.open if not each.busy]:
                self._close(min(idle, key=lambda each: each.used_at))
            else:
                break
        lacking = self._lacking()
        for waiter in self._waiting:
            waiter.place = 1 + lacking.index(waiter) if waiter in lacking else 0

    def _served(self) -> dict[Waiter, SessionOpening]:
        """Return who waits for a session that is being set up: of each model, who came first."""
        openings, served = [*self._openings], {}
        for waiter in self._waiting:
            for opening in openings:
                if opening.model == waiter.model:
                    served[waiter] = opening
                    openings.remove(opening)
                    break
        return served

    def _lacking(self) -> list[Waiter]:
        """Return who waits and has no session set up."""
        served = self._served()
        return [waiter for waiter in self._waiting if waiter not in served]

    def _fitting(self, waiter: Waiter) -> OpenConversation | None:
        """Return the idle conversation that knows most of a request's messages; a fresh one knows none."""
        fitting = (each for each in self.open if not each.busy and each.begins(waiter.model, waiter.messages))
        return max(fitting, key=lambda each: len(each.said), default=None)

    def _give(self, waiter: Waiter, conversation: OpenConversation) -> None:
        conversation.busy, conversation.used_at = True, monotonic()
        if conversation.expiry is not None:
            conversation.expiry.cancel()
        waiter.given.set_result(conversation)

    def _start_opening(self, model: str) -> None:
        opening = SessionOpening(model)
        self._openings.append(opening)

        def say(text: str) -> None:
            opening.progress = text.removeprefix("client: ")
            show()

        def show() -> None:
            for waiter, each in self._served().items():
                waiter.progress = each.progress

        loop = asyncio.get_running_loop()

        def opened(done: asyncio.Future[ChatLike]) -> None:
            self._openings.remove(opening)
            if (error := done.exception()) is None:
                conversation = OpenConversation(done.result(), model)
                self.open.append(conversation)
                self.give_back(conversation)  # to whoever waits first
                return
            self._say(f"no conversation could be opened: {Refusal.of(error)}")
            if first := next((each for each in self._waiting if each.model == model), None):
                self._waiting.remove(first)
                first.given.set_exception(error)
            self._advance()

        def tell(text: str) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(say, text)

        show()
        in_thread(lambda: self._models[model](tell)).add_done_callback(opened)

    def _expire(self, conversation: OpenConversation) -> None:
        if not conversation.busy and conversation in self.open:
            self._close(conversation)

    def _close(self, conversation: OpenConversation) -> None:
        """Close a conversation; until it is closed it keeps its place at the server."""
        if conversation not in self.open:
            return
        self.open.remove(conversation)
        if conversation.expiry is not None:
            conversation.expiry.cancel()

        def closed(done: asyncio.Future[None]) -> None:
            self._closing.discard(done)
            if (error := done.exception()) is not None:
                self._say(f"a conversation was not closed in order: {Refusal.of(error)}")
            if self._ended is None:
                self._advance()

        closing = in_thread(conversation.chat.close)
        self._closing.add(closing)
        closing.add_done_callback(closed)
