"""Answer one request: its wait, its answer piece by piece, and what becomes of it when its caller leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Thread
from time import monotonic

from mpcache.errors import BadInput, MpcacheError
from mpcache_parties.endpoint.completions import (
    AnswerEnd,
    CompletionRequest,
    Role,
    Said,
    question_of,
)
from mpcache_parties.endpoint.conversations import ConversationPool, OpenConversation, Waiter
from mpcache_parties.endpoint.refusals import Refusal

FRAMED = (
    "a text cannot be continued here: the model's chat template stands around document and questions; ask "
    "/v1/chat/completions, or let the parties start with --raw"
)
LOOK_EVERY_S = 0.25  # at a wait and at progress
SILENT_S = 10.0  # after which a caller hears that it is not forgotten


@dataclass(frozen=True)
class Beat:
    """How far a request is. place: in the queue, 1 is next; 0: not in it.  progress: in words."""

    place: int = 0
    progress: str = ""


class RunningAnswer:
    """An answer of a conversation, pumped from its own thread, to its end, whoever still listens."""

    def __init__(self, pool: ConversationPool, conversation: OpenConversation, of: CompletionRequest) -> None:
        """Ask what the conversation does not know yet."""
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()  # None: it is over
        self.end: AnswerEnd | None = None
        self.error: BaseException | None = None
        self.conversation = conversation
        self._pool, self._messages, self._text = pool, of.messages, ""
        self._stopping = self._left = False
        known = len(conversation.said)
        self._turn = replace(of.turn, text=question_of(of.messages[known:]))
        self._loop = asyncio.get_running_loop()
        Thread(target=self._pump, daemon=True).start()

    def stop(self) -> None:
        """End it after its present token."""
        if self.end is None and self.error is None:
            self._stopping = True
            self.conversation.chat.stop()

    def leave(self) -> None:
        """Stop it because nobody listens any more."""
        if self.end is None and self.error is None:
            self._left = True
            self.stop()

    def _pump(self) -> None:
        error: BaseException | None = None
        with suppress(RuntimeError):  # the loop has ended
            try:
                for piece in self.conversation.chat.ask(self._turn):
                    self._loop.call_soon_threadsafe(self._take, piece)
            except Exception as raised:
                error = raised
            self._loop.call_soon_threadsafe(self._finish, error)

    def _take(self, piece: str) -> None:
        if piece:
            self._text += piece
            self.pieces.put_nowait(piece)
        if self._stopping:
            self.stop()  # again: a stop that came before the answer had begun stopped nothing

    def _finish(self, error: BaseException | None) -> None:
        chat, conversation = self.conversation.chat, self.conversation
        if error is None:
            self.end = AnswerEnd(
                chat.finish_reason, chat.prompt_tokens, chat.completion_tokens, chat.room, chat.account
            )  # fmt: skip
            conversation.said = (*self._messages, Said(Role.ASSISTANT, self._text))
            conversation.cut = self._left
        else:
            self.error = error
            if not isinstance(error, MpcacheError):
                logging.getLogger(__name__).error("an answer has failed", exc_info=error)
        # A question that does not fit may fit a new conversation, where earlier ones were evicted less.
        fits = isinstance(error, BadInput) and not conversation.said
        unheard = self._left and not self._text  # nobody can go on from what nobody has heard
        self._pool.give_back(conversation, alive=fits or (error is None and not unheard))
        self.pieces.put_nowait(None)


class Exchange:
    """One request from the queue to its end."""

    def __init__(self, pool: ConversationPool, request: CompletionRequest) -> None:
        """Join the queue. Raises Refusal where it is full."""
        self.request, self._pool, self._gone = request, pool, False
        self._waiter: Waiter = pool.join(request.model, request.messages)
        self.answer: RunningAnswer | None = None
        self.place = self._waiter.place  # when it came

    async def events(self) -> AsyncIterator[Beat | str]:
        """Yield how far it is, and pieces of the answer. Raises MpcacheError or Refusal."""
        beats = _Beats()
        while not self._waiter.given.done():
            await asyncio.wait([self._waiter.given], timeout=LOOK_EVERY_S)
            if not self._waiter.given.done() and (
                beat := beats.due(Beat(self._waiter.place, self._waiter.progress))
            ):
                yield beat
        conversation = self._waiter.given.result()
        if self.request.RAW and not conversation.chat.raw:
            raise Refusal(400, FRAMED, code="needs_raw")
        answer = self.answer = RunningAnswer(self._pool, conversation, self.request)
        while True:
            try:
                piece = await asyncio.wait_for(answer.pieces.get(), LOOK_EVERY_S)
            except TimeoutError:
                if beat := beats.due(Beat(0, conversation.chat.progress)):
                    yield beat
                continue
            if piece is None:
                break
            beats.heard()
            yield piece
        if answer.error is not None:
            raise answer.error

    @property
    def end(self) -> AnswerEnd:
        """What it ended with, once its events are over."""
        assert self.answer is not None and self.answer.end is not None
        return self.answer.end

    def stop(self) -> None:
        """End the answer after its present token; its caller hears the rest."""
        if self.answer is not None:
            self.answer.stop()

    def leave(self) -> None:
        """Let go of what this request holds; harmless after its end, and to repeat."""
        if self._gone:
            return
        self._gone = True
        if self.answer is not None:
            self.answer.leave()
        else:
            self._pool.leave(self._waiter)


class _Beats:
    """Which beats are worth telling: those that say something new, and one where all was silent for long."""

    def __init__(self) -> None:
        self._last: Beat | None = None
        self._at = monotonic()

    def heard(self) -> None:
        self._at = monotonic()

    def due(self, beat: Beat) -> Beat | None:
        if beat == self._last and monotonic() - self._at < SILENT_S:
            return None
        self._last, self._at = beat, monotonic()
        return beat
