"""Ask at the client: one question, or one after another; choose the tokens and show them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

from mpcache.answer import AnswerText, TimedSession, answer, left_range
from mpcache.console.signals import between_tokens, token_by_token
from mpcache.errors import BadInput, LinkError
from mpcache.model.framing import Framing
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

    ids, text: the present answer.  turns: the accounts of a conversation's.
    """

    def __init__(
        self,
        resources: SessionResources,
        facts: Facts,
        session: TimedSession,
        framing: Framing,
        document: str | None = None,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin, or go on with an answer of which `kept` was kept. document: the client's own."""
        self.ids: list[int] = list(earlier["ids"]) if earlier else []
        self.text = ""
        self.turns: list[TurnReport] = []
        self._ended = False  # the last answer, by its end token, as all know
        self._draws: Any = earlier["draws"] if earlier else None
        self._resources, self._facts, self._session = resources, facts, session
        self._framing, self._document = framing, document

    def kept(self) -> dict[str, Any]:
        """Return what has to be kept of an answer, so that no token of it is chosen twice."""
        return {"ids": self.ids, "draws": self._draws}

    def framed(self, question: str) -> list[int]:
        """Return the tokens of the first question."""
        return self._framing.frame_turn(question, True, self._document)

    def answer(
        self, question: Question, asked: list[int], limit: int, conversation: Conversation | None = None
    ) -> bool:
        """Take a question in (token ids, with what is around it), and show its answer token by token.

        Returns whether one of the texts that end an answer has come.
        """
        resources, session = self._resources, self._session
        choose, shown = question.sampling.chooser(resources.public.reveal), self._begin(question)
        if self._draws is not None:
            choose.state = self._draws
        self._draws = choose.state
        stops = self._framing.end_tokens if question.stop_at_eos else frozenset[int]()
        known = tuple(self.ids)

        def enough() -> bool:
            return shown.stopped or (conversation is not None and conversation.stopped())

        with token_by_token():
            for token in answer(session, asked, limit, choose, stops, self._announce, known, enough):
                if new := session.place.step > len(self.ids):
                    self.ids.append(token)
                self._draws = choose.state
                # A token that was shown is never lost.
                resources.checkpointer.token(session, resources.ledger, self.kept())
                if new:
                    resources.on_token(token, shown.push(token))
                between_tokens(session.place.step)
        if rest := shown.end():
            resources.on_token(-1, rest)
        self.text = shown.text
        return shown.stopped

    def _begin(self, question: Question) -> AnswerText:
        """Begin to show an answer, or show from its beginning what there is of one that goes on."""
        shown = AnswerText(self._framing.tokenizer, question.stop_texts)
        for token in self.ids:
            self._resources.on_token(token, shown.push(token))
        return shown

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
                asked = self._framed(question)
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

    def _framed(self, question: Question) -> list[int]:
        """Return what is to be taken in for a question, after the answer before. Raises BadInput."""
        if self._session.place.turn == 1:
            return self.framed(question.text)
        return self._framing.next_turn(self.ids, question.text, self._ended)

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
        at_stop = self.answer(question, asked, turn.limit, of)
        if session.in_range is False:  # what it left in the cache spoils later turns, too
            raise left_range(len(self.ids))
        ms = 1000 * (time.perf_counter() - start)
        spent = asdict(ledger.total() - before)
        finish = Finish.LENGTH
        early = len(self.ids) < turn.limit
        at_end = question.stop_at_eos and self.ids[-1] in self._framing.end_tokens
        if at_end or at_stop:
            finish = Finish.STOP
        elif early:
            finish = Finish.STOPPED
        self._ended = at_end and early
        first = session.ms[ChunkPlace(number, 0).phase]
        return TurnReport(
            number, self.text, self.ids, finish, turn.question, self._room(), ms, first, **spent
        )
