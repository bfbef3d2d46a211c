"""Ask at the client: one question, or one after another; choose the tokens and show them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

from mpcache.answer import TimedSession, answer, left_range
from mpcache.console.signals import between_tokens, token_by_token
from mpcache.errors import BadInput, LinkError
from mpcache.model.tokenizer import Tokenizer
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.report.account import Finish, TurnReport
from mpcache_parties.client_pace import more_step
from mpcache_parties.facts import Facts
from mpcache_parties.private_inputs import Conversation, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.turns import TurnSizes, announce_turn, skip_undone, turn_step


class Asking:
    """The client's part of a session that has taken in its context.

    ids: the tokens of the present answer.  turns: the accounts of a conversation's.
    """

    def __init__(
        self,
        resources: SessionResources,
        facts: Facts,
        session: TimedSession,
        tokenizer: Tokenizer,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin, or go on with an answer of which `kept` was kept."""
        self.ids: list[int] = list(earlier["ids"]) if earlier else []
        self.turns: list[TurnReport] = []
        self._draws: Any = earlier["draws"] if earlier else None
        self._resources, self._facts, self._session = resources, facts, session
        self._tokenizer = tokenizer

    def kept(self) -> dict[str, Any]:
        """Return what has to be kept of an answer, so that no token of it is chosen twice."""
        return {"ids": self.ids, "draws": self._draws}

    def tokens_of(self, question: Question) -> list[int]:
        """Encode a question, after the token of the last answer that was not taken in."""
        return self.ids[-1:] * (self._session.place.turn > 1) + self._tokenizer.encode(
            question.text, bos=False
        )

    def answer(
        self, question: Question, asked: list[int], limit: int, conversation: Conversation | None = None
    ) -> str:
        """Take a question in, and show its answer token by token; return its text."""
        resources, session = self._resources, self._session
        choose, stream = question.sampling.chooser(resources.public.reveal), self._tokenizer.stream()
        choose.state = choose.state if self._draws is None else self._draws
        self._draws = choose.state
        text = ""

        def show(token: int, piece: str) -> None:
            nonlocal text
            text += piece
            resources.on_token(token, piece)

        for token in self.ids:  # of an answer that goes on
            show(token, stream.push(token))
        stops = set(self._facts.shape.eos_ids) if question.stop_at_eos else set()
        stopped = (lambda: False) if conversation is None else conversation.stopped
        known = tuple(self.ids)
        with token_by_token():
            for token in answer(session, asked, limit, choose, stops, self._announce, known, stopped):
                if new := session.place.step > len(self.ids):
                    self.ids.append(token)
                self._draws = choose.state
                # A token that was shown is never lost.
                resources.checkpointer.token(session, resources.ledger, self.kept())
                if new:
                    show(token, stream.push(token))
                between_tokens(session.place.step)
        if rest := stream.end():
            show(-1, rest)
        return text

    def _announce(self, more: bool) -> None:
        for link in self._resources.links.values():
            with nullcontext() if more else suppress(LinkError):  # an answer that is there needs nobody
                link.send_facts(more_step(self._session.place), {"more": more})

    # ------------------------------------------------------------------------------ a conversation

    def converse(self, conversation: Conversation) -> None:
        """Answer questions as they come, until there are no more."""
        links, session = self._resources.links, self._session
        conversation.opened(self._facts.room)
        for question in conversation.questions(self._look):
            try:
                question.sampling.check(self._resources.public.reveal)
                asked = self.tokens_of(question)
                turn = self._fitting(question, asked)
            except BadInput as why:
                conversation.refused(why)
                continue
            announce_turn(links, session.place.turn, turn)
            report = self._turn(question, asked, turn, conversation)
            self.turns.append(report)
            conversation.answered(report)
            skip_undone(links[Rank.DEALER], session.place.turn)
            session.next_turn()
        announce_turn(links, session.place.turn, None)

    def _look(self) -> None:
        for link in self._resources.links.values():
            link.check_alive(turn_step(self._session.place.turn))

    def _fitting(self, question: Question, asked: list[int]) -> TurnSizes:
        """Return the turn's sizes: an answer is shorter where there is less room. Raises BadInput."""
        room = self._room()
        limit = min(question.limit(self._facts.limit), room - len(asked))
        if limit < 1:
            raise BadInput(
                f"the question has {len(asked)} tokens, the session has room for {room} with its answer; "
                "begin a new conversation"
            )
        return TurnSizes(len(asked), limit)

    def _room(self) -> int:
        return self._facts.room - self._session.cache.length

    def _turn(self, question: Question, asked: list[int], turn: TurnSizes, of: Conversation) -> TurnReport:
        ledger, session, number = self._resources.ledger, self._session, self._session.place.turn
        before, start = ledger.total(), time.perf_counter()
        self.ids, self._draws = [], None
        text = self.answer(question, asked, turn.limit, of)
        if session.in_range is False:  # what it left in the cache spoils later turns, too
            raise left_range(len(self.ids))
        ms = 1000 * (time.perf_counter() - start)
        spent = asdict(ledger.total() - before)
        finish = Finish.LENGTH
        if question.stop_at_eos and self.ids[-1] in self._facts.shape.eos_ids:
            finish = Finish.STOP
        elif len(self.ids) < turn.limit:
            finish = Finish.STOPPED
        first = session.ms[ChunkPlace(number, 0).phase]
        return TurnReport(number, text, self.ids, finish, turn.question, self._room(), ms, first, **spent)
