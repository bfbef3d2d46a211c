"""The same answers through the parties.

Each question is asked of three processes, as `mpcache generate` does. Their session has one question, so
of a task with several each is a session of its own over the same document, which all that was said before
opens. Bits per byte need logits after tokens that are given, which no process is asked for: there the
three parties are threads of this one (`mpcache.engines.threads`), with the same program, shares and messages.
"""

from __future__ import annotations

from typing import Any

from mpcache.answer import bind_to_document, plain_answer
from mpcache.config import PublicConfig
from mpcache.console.terminal import Say
from mpcache.engines.threads import run_threads
from mpcache.evaluate.results import Cell, Results, bits_per_byte_of
from mpcache.evaluate.score import EvalModel, Score, Tokens, score
from mpcache.evaluate.sweep import EvalGrid, bind_at_budget, take_sample
from mpcache.evaluate.tasks import Sample
from mpcache.limits import bind_policy
from mpcache.policy import BoundPolicy
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache.session import Session
from mpcache_parties.launch import run_quietly

CONFIRMED = 16  # bits: tokens of the text that goes on, a private decode step each
TOLERANCE = 0.01  # bits per byte: what fixed point may add to or take from one sample


def confirm_privately(
    engine: EvalModel,
    grid: EvalGrid,
    count: int,
    network: str,
    results: Results,
    say: Say,
) -> None:
    """Ask the first `count` samples of each cell of the sweep privately. Raises PartyFailed.

    Each is counted by whether the answer is right, and whether every token is the plain engine's; bits per
    byte by whether they are within TOLERANCE of the plain engine's.
    """
    for plain, secure, where in results.to_confirm():
        for i in range(count):
            said = f"{where}: private sample {i + 1} of {count}"
            sample, tokens = take_sample(engine, plain.task, plain.question, grid, i)
            bound = bind_at_budget(engine, plain.policy, plain.budget, len(tokens.context))
            secure.count(bound, engine.model.shape.kv_heads)
            if plain.task.by_token:
                if network != "none":
                    results.note(f"{plain.task.name}: the parties ran in one process, which no network slows")
                say(said)
                _go_on(engine, secure, bound, sample, tokens)
                continue
            turns = sample.apart()
            for j, alone in enumerate(turns, 1):
                say(f"{said}, question {j} of {len(turns)}" if len(turns) > 1 else said)
                _answer(engine, secure, bound, alone, network)


def _answer(engine: EvalModel, cell: Cell, bound: BoundPolicy, sample: Sample, network: str) -> None:
    """Ask three processes one question."""
    (turn,), tokens = sample.turns, engine.tokens(sample)
    question, answer, _ = tokens.turns[0]
    public = PublicConfig(policy=bound.spec, max_new_tokens=len(answer), network=network)
    bind_policy(engine.model.shape, public, len(tokens.context), len(question))
    plain = plain_answer(
        engine.model, bound, tokens.context, question, len(answer), Sampling(), (), engine.device
    )
    reports = run_quietly(public, engine.model.path, sample.context, turn.question)
    ids = reports[Rank.CLIENT].token_ids
    cell.scores.append(Score(turn.part, int(ids == answer), 1, 0.0, 0))
    cell.agreed.append(ids == plain.ids)


def _go_on(engine: EvalModel, cell: Cell, bound: BoundPolicy, sample: Sample, tokens: Tokens) -> None:
    """Score the beginning of one long answer, token by token, through three threads."""
    question, answer, _ = tokens.turns[0]
    answer = answer[:CONFIRMED]
    size = len(engine.model.tokenizer.decode(answer).encode())
    tokens = Tokens(tokens.context, ((question, answer, size),))
    window = bound.window
    read = engine.read(tokens.context, window)
    bound, _ = bind_to_document(bound, engine.model.shape, read.known, read.kernels)
    (plain,) = score(cell.task, engine.session(bound, read), sample, tokens)

    def party(ops: Any, me: Any, rank: Rank) -> list[Score] | None:
        owner = rank is Rank.SERVER
        session = Session(ops, me, engine.model.shape, bound)
        session.setup(engine.model.weights if owner else None)
        session.context(*((read.known, read.kernels) if owner else (None, None)))
        if rank is Rank.CLIENT:
            return score(cell.task, session, sample, tokens)
        for m in tokens.chunks():
            session.chunk(None, m)
        return None

    (private,) = run_threads(party)[Rank.CLIENT][0]
    cell.scores.append(private)
    cell.off.append(abs(bits_per_byte_of([private]) - bits_per_byte_of([plain])))
    cell.agreed.append(cell.off[-1] <= TOLERANCE)
