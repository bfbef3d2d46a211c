"""The same answers through the real parties: three processes, one question each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mpcache.answer import Sampling, plain_answer
from mpcache.answer import bind as bind_session
from mpcache.config import PublicConfig
from mpcache.evaluate.rows import Results, Tally
from mpcache.evaluate.score import Engine, Score
from mpcache.evaluate.sweep import Grid, Say, bind, take
from mpcache.launch import run_quietly
from mpcache.policy import parse
from mpcache.rank import Rank


def confirm(
    engine: Engine, grid: Grid, cells: Sequence[Tally], count: int, network: str, results: Results, say: Say
) -> None:
    """The first `count` samples of each cell of the sweep, the first question of each, answered privately:
    right or not, and whether every token is the plain engine's. Raises PartyFailed.
    """
    for plain in cells:
        if plain.task.by_token or not plain.judged or not plain.scores:
            continue
        if parse(plain.policy).in_the_clear:
            results.note(f"{plain.policy}: runs in plaintext only, so the parties did not confirm it")
            continue
        secure = Tally(plain.task, plain.question, plain.policy, plain.budget, "secure", judged=True)
        results.tallies.append(secure)
        where = f"{plain.task.name}, question {plain.question}, {plain.policy} at {plain.budget} %"
        for i in range(count):
            say(f"{where}: private sample {i + 1} of {count}")
            _answer(engine, grid, secure, i, network)


def _answer(engine: Engine, grid: Grid, cell: Tally, i: int, network: str) -> None:
    sample, tokens = take(engine, cell.task, cell.question, grid, i)
    turn, (question, answer, _) = sample.turns[0], tokens.turns[0]
    bound = bind(engine, cell.policy, cell.budget, len(tokens.context))
    public = PublicConfig(policy=bound.policy.spec, max_new_tokens=len(answer), network=network)
    bind_session(engine.model.shape, public, len(tokens.context), len(question))
    plain = plain_answer(
        engine.model, bound, tokens.context, question, len(answer), Sampling(), (), engine.device
    )
    with tempfile.TemporaryDirectory(prefix="mpcache-") as folder:
        document = Path(folder) / "document.txt"
        document.write_text(sample.context, encoding="utf-8")
        reports = run_quietly(public, engine.model.folder, document, turn.question)
    ids = reports[Rank.CLIENT].token_ids
    cell.spec = cell.spec or bound.policy.spec
    cell.attended += bound.plan.attended
    cell.context += len(tokens.context)
    cell.scores.append(Score(turn.part, int(ids == answer), 1, 0.0, 0))
    cell.agreed.append(ids == plain.ids)
