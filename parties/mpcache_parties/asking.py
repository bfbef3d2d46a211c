"""Ask at the client: one question, or one after another; choose the tokens and show them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

from mpcache.answer import AnswerText, TimedSession, answer, left_range
from mpcache.console.signals import between_tokens, token_by_token
from mpcache.errors import BadInput, LinkError
from mpcache.model.framing import Framing, RawFraming
from mpcache.padding import padded_length
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.report.account import Finish, TurnReport
from mpcache_parties.client_pace import more_step
from mpcache_parties.facts import Facts
from mpcache_parties.private_inputs import Conversation, Question, TurnRecord
from mpcache_parties.resources import SessionResources
from mpcache_parties.turns import PreparedTurns, TurnSizes, announce_turn, skip_undone, turn_step


class Asking:
    """The client's part of a session that has taken in its context.

    records: of all questions that were asked.  text: of the last answer.
    """

    def __init__(
        self,
        resources: SessionResources,
        facts: Facts,
        session: TimedSession,
        framing: Framing,
        document: str | None = None,
        earlier: Mapping[str, Any] | None = None,
        prepared: PreparedTurns | None = None,
    ) -> None:
        """Begin, or go on with what `kept` returned in an earlier run.

        document: the client's own.  prepared: what there are tapes for, in place of a dealer.
        """
        self._prepared = prepared
        self.records: list[TurnRecord] = list(earlier["records"]) if earlier else []
        for record in self.records:
            if record.report is not None:  # read back as plain values
                record.report = replace(record.report, finish=Finish(record.report.finish))
        self.text = ""
        self._resources, self._facts, self._session = resources, facts, session
        self._framing, self._document = framing, document

    def kept(self) -> dict[str, Any]:
        """Return what has to be kept, so that no token of an answer is chosen twice."""
        return {"records": self.records}

    def framed(self, question: str) -> list[int]:
        """Return the tokens of the first question."""
        return self._framing.frame_turn(question, True, self._document)

    @property
    def ids(self) -> list[int]:
        """The last answer's tokens."""
        return self.records[-1].ids if self.records else []

    @property
    def turns(self) -> list[TurnReport]:
        """The accounts of a conversation's complete turns."""
        return [record.report for record in self.records if record.report is not None]

    def ask_once(self, question: Question) -> None:
        """Answer the question of a session that has one, or what is left of its answer."""
        if not self.records:
            asked = self.framed(question.text)
            limit = self._facts.limit
            self.records.append(TurnRecord(question, asked, limit, limit))
        self._answer(self.records[0])

    def _answer(self, record: TurnRecord, conversation: Conversation | None = None) -> bool:
        """Take a question in, and show its answer token by token; one that is complete is shown already.

        Returns whether one of the texts that end an answer has come.
        """
        resources, session, question = self._resources, self._session, record.question
        choose, shown = question.sampling.chooser(resources.public.reveal), self._begin(record)
        if record.draws is not None:
            choose.state = record.draws
        record.draws = choose.state
        stops = self._framing.end_tokens if question.stop_at_eos else frozenset[int]()
        known, over = tuple(record.ids), record.report is not None

        def enough() -> bool:
            if over:
                return session.place.step >= len(record.ids)
            return shown.stopped or (conversation is not None and conversation.stopped())

        with token_by_token():
            announce = self._announce if self._prepared is None else self._announce_more
            for token in answer(session, record.asked, record.limit, choose, stops, announce, known, enough):
                if new := session.place.step > len(record.ids):
                    record.ids.append(token)
                record.draws = choose.state
                # A token that was shown is never lost.
                resources.checkpointer.token(session, resources.ledger, self.kept())
                if new:
                    resources.on_token(token, shown.push(token))
                between_tokens(session.place.step)
        if (rest := shown.end()) and not over:
            resources.on_token(-1, rest)
        self.text = shown.text
        return shown.stopped

    def _begin(self, record: TurnRecord) -> AnswerText:
        """Begin to show an answer, or show from its beginning what there is of one that goes on."""
        shown = AnswerText(self._framing.tokenizer, record.question.stop_texts)
        for token in record.ids:
            piece = shown.push(token)
            if record.report is None:
                self._resources.on_token(token, piece)
        return shown

    def _announce(self, more: bool) -> None:
        for link in self._resources.links.values():
            with nullcontext() if more else suppress(LinkError):  # an answer that is there needs nobody
                link.send_facts(more_step(self._session.place), {"more": more})

    def _announce_more(self, more: bool) -> None:
        if more:  # else the turn is filled up
            self._announce(True)

    # ------------------------------------------------------------------------------ a conversation

    def converse(self, conversation: Conversation) -> None:
        """Answer questions as they come, until there are no more; one that was interrupted first."""
        session, resources = self._session, self._resources
        room = self.turns[-1].room if self.turns else self._facts.room
        conversation.opened(room, self.records, isinstance(self._framing, RawFraming))
        for record in self.records[session.place.turn - 1 :]:
            self._go_through(record, conversation)
        for question in conversation.questions(self._look):
            try:
                question.sampling.check(resources.public.reveal)
                asked = self._framed(question)
                record = self._fitting(question, asked)
            except BadInput as why:
                conversation.refused(why)
                continue
            self.records.append(record)
            resources.checkpointer.note(session, self.kept())
            self._go_through(record, conversation)
        announce_turn(resources.links, session.place.turn, None)

    def _go_through(self, record: TurnRecord, conversation: Conversation) -> None:
        """Go through a turn, or through what the session has not taken in yet of one of an earlier run."""
        session, resources = self._session, self._resources
        number = session.place.turn
        announce_turn(resources.links, number, TurnSizes(self._length(record.asked), record.chunks))
        report = self._turn(record, conversation)
        if record.report is None:
            record.report = report
            resources.checkpointer.note(session, self.kept())
            conversation.answered(report)
        if self._prepared is None:
            skip_undone(resources.links[Rank.DEALER], number)
        else:
            self._fill_up(record, conversation)
        resources.checkpointer.turn_ended(session)
        session.next_turn()

    def _fill_up(self, record: TurnRecord, conversation: Conversation) -> None:
        """Take in as many tokens as the tapes of later turns were dealt for: the answer's, then line breaks.

        The token that ended the answer is left out, as the next question begins with the template's own.
        """
        session, encode = self._session, self._framing.tokenizer.encode
        there = record.ids[:-1] if self._at_end(record) else record.ids
        blank = (encode("\n", bos=False) or there)[-1]
        with token_by_token():
            for step in range(session.place.step, record.chunks):
                last = self._prepared is None or self._prepared.sizes(session.place.turn + 1) is None
                if last or conversation.over():
                    return self._announce(False)
                self._announce(True)
                session.chunk([there[step - 1] if step <= len(there) else blank], 1)
                if session.in_range is False:
                    raise left_range(len(record.ids))
                between_tokens(step)
        return None

    def _framed(self, question: Question) -> list[int]:
        """Return what is to be taken in for a question, after the answer before. Raises BadInput."""
        if not self.records:
            return self.framed(question.text)
        last = self.records[-1]
        all_in = self._prepared is not None or self._ended(last)
        return self._framing.next_turn(last.ids, question.text, all_in)

    def _ended(self, record: TurnRecord) -> bool:
        """Return whether an answer ended by its end token, as all know."""
        return self._at_end(record) and len(record.ids) < record.limit

    def _at_end(self, record: TurnRecord) -> bool:
        return record.question.stop_at_eos and record.ids[-1] in self._framing.end_tokens

    def _look(self) -> None:
        for link in self._resources.links.values():
            link.check_alive(turn_step(self._session.place.turn))

    def _fitting(self, question: Question, asked: list[int]) -> TurnRecord:
        """Return the turn to be: an answer is shorter where there is less room. Raises BadInput."""
        if self._prepared is not None:
            return self._with_tapes(question, asked, self._prepared)
        room, length = self._room(), self._length(asked)
        limit = min(question.limit(self._facts.limit), room - length)
        if limit < 1:
            raise BadInput(
                f"the question has {length} tokens, the session has room for {room} with its answer; "
                "begin a new conversation"
            )
        return TurnRecord(question, asked, limit, limit)

    def _with_tapes(self, question: Question, asked: list[int], prepared: PreparedTurns) -> TurnRecord:
        """Return the turn to be, if the tapes are for one like that. Raises BadInput."""
        session, number = self._session, self._session.place.turn
        if (sizes := prepared.sizes(number)) is None:
            raise BadInput(
                f"the tapes were for {prepared}, and are used up; begin a new conversation, with other tapes "
                "or with a dealer"
            )
        if (length := self._length(asked)) != sizes.question:
            shortest = sizes.question - session.grid + 1
            fitting = f"{shortest} to {sizes.question}" if session.grid > 1 else str(sizes.question)
            raise BadInput(
                f"the question has {length} tokens with what stands around it, the tapes of turn "
                f"{number} are for {sizes.question}; ask one of {fitting}, or converse with a dealer"
            )
        limit = min(question.limit(self._facts.limit), prepared.answer)
        return TurnRecord(question, asked, limit, sizes.limit)

    def _length(self, asked: list[int]) -> int:
        """Return how many tokens of a question all see: its own, and those it is padded with."""
        return padded_length(len(asked), self._session.grid)

    def _room(self) -> int:
        return self._facts.room - self._session.cache.length

    def _turn(self, record: TurnRecord, conversation: Conversation) -> TurnReport:
        """Go through a turn's chunks; return its account, with what it took before it was interrupted."""
        ledger, session, number = self._resources.ledger, self._session, self._session.place.turn
        earlier = self._resources.checkpointer.earlier(number)
        before, start = ledger.total(), time.perf_counter()
        for phase in earlier.values():
            start -= phase.ms / 1000
            before = before - phase.traffic
        at_stop = self._answer(record, conversation)
        if session.in_range is False:  # what it left in the cache spoils later turns, too
            raise left_range(len(record.ids))
        ms, first = 1000 * (time.perf_counter() - start), ChunkPlace(number, 0).phase
        first_ms = session.ms[first] if first in session.ms else earlier[0].ms
        finish = Finish.LENGTH
        if self._at_end(record) or at_stop:
            finish = Finish.STOP
        elif len(record.ids) < record.limit:
            finish = Finish.STOPPED
        return TurnReport(
            number, self.text, list(record.ids), finish, self._length(record.asked), self._room(), ms,
            first_ms, **asdict(ledger.total() - before), question=record.question.text,
        )  # fmt: skip
