"""The same answers of a chat through the parties.

What is given of an answer has to be fed, and the logits after it read, which no process is asked for. So the
three parties are threads of this one (`mpcache.engines.threads`), with the same program, shares and messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from mpcache.console.terminal import Say
from mpcache.engines.threads import run_threads
from mpcache.evaluate.chat_score import Talk, greedy_tokens, score_talks
from mpcache.evaluate.chat_sweep import ChatSweep
from mpcache.evaluate.results import Cell
from mpcache.evaluate.score import EvalModel, Read, Score
from mpcache.evaluate.sweep import FULL, bind_at_budget
from mpcache.policy import BoundPolicy
from mpcache.policy.plan import FULL_PERCENT
from mpcache.rank import Rank
from mpcache.session import Session


def confirm_talks(sweep: ChatSweep, count: int, network: str, say: Say) -> None:
    """Have the first `count` conversations of each cell of a sweep with the parties.

    Each answer is counted by whether it is right, gated as in the sweep, and by whether every token that
    greedy decoding would give is the plain engine's.
    """
    results, engine = sweep.results, sweep.engine
    if network != "none":
        results.note("the parties of a chat ran in one process, which no network slows")
    for plain, secure, where in results.to_confirm():
        for i, (context, talk) in enumerate(islice(sweep.talks(plain.task, plain.question), count), 1):
            say(f"{where}: private conversation {i} of {count}")
            read = engine.read(context, len(context))
            wanted = bind_at_budget(engine, plain.policy, plain.budget, len(context))
            secure.spec = secure.spec or wanted.spec  # without the counts of this document's heads
            bound = engine.bind(wanted, read)
            secure.count(bound, engine.model.shape.kv_heads)
            counted = [True] * len(talk.spans)
            if sweep.gate == "question" and plain.policy != FULL:
                full = engine.bind(bind_at_budget(engine, FULL, FULL_PERCENT, len(context)), read)
                (counted,) = score_talks(engine, full, read, [talk])
            _count(secure, talk, counted, _private(engine, bound, read, talk),
                   greedy_tokens(engine.session(bound, read), talk))  # fmt: skip


def _count(
    cell: Cell, talk: Talk, counted: Sequence[bool], private: list[list[int]], plain: list[list[int]]
) -> None:
    """Add what the parties said to each question of a conversation."""
    for part, (begin, end), counts, mine, theirs in zip(
        talk.parts, talk.spans, counted, private, plain, strict=True
    ):
        cell.agreed.append(mine == theirs)
        if counts:
            cell.scores.append(Score(part, int(mine == list(talk.ids[begin:end])), 1, 0.0, 0))


def _private(engine: EvalModel, bound: BoundPolicy, read: Read, talk: Talk) -> list[list[int]]:
    """Have a conversation on shares: the client's greedy tokens, answer by answer."""
    shape = engine.model.shape

    def party(ops: Any, me: Any, rank: Rank) -> list[list[int]] | None:
        owner = rank is Rank.SERVER
        session = Session(ops, me, shape, bound)
        session.setup(engine.model.weights if owner else None)
        known = read.known.last_queries(bound.window) if owner else None
        session.context(known, read.kernels if owner else None)
        if rank is Rank.CLIENT:
            return greedy_tokens(session, talk)
        for m in talk.chunks:
            session.chunk(None, m)
        return None

    found: list[list[int]] = run_threads(party)[Rank.CLIENT][0]
    return found
