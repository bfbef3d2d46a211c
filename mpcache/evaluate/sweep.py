"""Every policy at every budget on the same samples, each context read once.

A task's samples go to the full cache first: what the model cannot do with everything in view says
nothing about eviction, and is not asked again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mpcache.console.terminal import Say
from mpcache.cost.sizing import FLOAT, PROCESS
from mpcache.errors import BadInput, PolicyError
from mpcache.evaluate.results import (
    NOTE,
    Cell,
    Results,
    budget_name,
    cell_text,
    counted,
    so_far,
    text_so_far,
)
from mpcache.evaluate.score import EvalModel, Tokens, score
from mpcache.evaluate.tasks import BITS_AT_MOST, FULL_AT_LEAST, TASKS, Sample, Task
from mpcache.model import ModelShape, Weights, load_model
from mpcache.policy import BoundPolicy, parse_policy
from mpcache.policy.combined import Combined
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.clock import Clock
from mpcache.sweeping.journal import Outcome
from mpcache.sweeping.runner import Batch, CellRunner

FULL = "full"


@dataclass(frozen=True)
class EvalGrid:
    """What is asked.

    policies: as the user writes them, without full.  budgets: percent of the context.
    samples: answers per task and cell.  context: tokens of a document, at most.
    """

    tasks: tuple[Task, ...]
    questions: tuple[str, ...]
    policies: tuple[str, ...]
    budgets: tuple[int, ...]
    samples: int
    seed: int
    context: int

    def about(self, chat: bool, document_as: str) -> dict[str, Any]:
        """Return what each cell depends on beside its own name: what a journal belongs to."""
        framed = {
            "document_as": document_as, "tasks": [t.name for t in self.tasks], "questions": self.questions,
        }  # fmt: skip
        asked = {name: list(value) if isinstance(value, tuple) else value for name, value in framed.items()}
        return {"sweep": "eval", "seed": self.seed, "context": self.context} | (asked if chat else {})

    def settings(self) -> list[tuple[str, int]]:
        """Return each policy with each budget, in percent; the full cache first."""
        return [(FULL, FULL_PERCENT), *((spec, budget) for spec in self.policies for budget in self.budgets)]


def shown_at(spec: str, budget: int) -> tuple[str, str]:
    """Return the row and the column of a setting, in the table that fills."""
    return spec, budget_name(budget)


def worker_memory(shape: ModelShape) -> int:
    """Return the bytes that a worker takes: the process, the model as read, and as it is laid out."""
    return PROCESS + 2 * FLOAT * sum(tensor.numel() for _, tensor in Weights.meta(shape).items())


def bind_at_budget(engine: EvalModel, spec: str, budget: int, context: int) -> BoundPolicy:
    """Bind the policy, set to `budget` percent of `context` tokens. Raises PolicyError."""
    shape = engine.model.shape
    policy = parse_policy(spec).at_percent(budget, context, shape)
    if isinstance(policy, Combined) and not policy.plan_is_public and budget < FULL_PERCENT:
        policy = policy.within(max(1, int(context * budget // FULL_PERCENT)), context, engine.model)
    return policy.bind(context, shape)


def take_sample(
    engine: EvalModel, task: Task, question: str, grid: EvalGrid, i: int
) -> tuple[Sample, Tokens]:
    """Take sample i of a task. Raises BadInput when the session does not fit into the model."""
    tokenizer, limit = engine.model.tokenizer, engine.model.shape.max_positions
    count_tokens = lambda text: len(tokenizer.encode(text, bos=False))  # noqa: E731
    sample = task.sample(i, grid.seed, count_tokens, grid.context)
    if question == "inside":
        sample = sample.inside()
    tokens = engine.tokens(sample)
    if tokens.length > limit:
        raise BadInput(
            f"task {task.name}: a session of {tokens.length} tokens, the model allows {limit}; "
            f"lower --context, which is {grid.context}"
        )
    return sample, tokens


def run_sweep(
    engine: EvalModel, grid: EvalGrid, results: Results, say: Say, runner: CellRunner | None = None
) -> None:
    """Ask every policy at every budget, and add to `results` whole samples at a time. Raises BadInput.

    The rows of an interrupted sweep stand on the same samples, too. runner: where cells are asked, and kept.
    """
    runner = runner or CellRunner()
    for task in grid.tasks:
        for question in [q for q in task.questions if q in grid.questions]:
            name = f"{task.name}, question {question}"
            places = [shown_at(*setting) for setting in grid.settings()]
            runner.table.begin(name, "policy", places, task.samples(grid.samples) * len(places))
            full = Cell(task, question, FULL, FULL_PERCENT)
            results.cells.append(full)
            _ask(engine, grid, [full], results, _under(say, f"{name}: full"), runner)
            full.judged = bool(full.scores) and full.passes()
            if not full.judged:
                results.note(gated_out(full) if full.scores else f"{name}: the full cache was not asked")
                continue
            cells = [Cell(task, question, *setting, judged=True) for setting in grid.settings()[1:]]
            results.cells += cells
            _ask(engine, grid, cells, results, _under(say, name), runner)


def gated_out(full: Cell) -> str:
    """Say in words why a task is not judged."""
    name = f"{full.task.name}, question {full.question}"
    if full.task.by_token:
        reached, wanted = f"{full.bits_per_byte:.2f} bits per byte", f"at most {BITS_AT_MOST}"
    else:
        reached, wanted = f"{100 * full.accuracy:.0f} %", f"at least {100 * FULL_AT_LEAST:.0f} %"
    return f"{name}: not judged: the full cache reaches {reached}, {wanted} is needed"


@dataclass(frozen=True)
class SampleAsked:
    """A sample, and the policies and budgets that it is asked under: what a worker elsewhere is told.

    model: a folder or file, at the same place on each machine.
    """

    model: Path
    task: str
    question: str
    number: int
    settings: tuple[tuple[str, int], ...]
    seed: int
    context: int

    def outcomes(self, engine: EvalModel, wanted: Sequence[int]) -> Iterator[Outcome]:
        """Yield what each of the wanted settings gives: counts and scores, or a note why there are none."""
        grid = EvalGrid((), (), (), (), 0, self.seed, self.context)
        sample, tokens = take_sample(engine, TASKS[self.task], self.question, grid, self.number)
        length = len(tokens.context)
        bounds: list[BoundPolicy | Outcome] = []
        for spec, budget in (self.settings[i] for i in wanted):
            try:
                bounds.append(bind_at_budget(engine, spec, budget, length))
            except PolicyError as error:
                bounds.append({NOTE: f"left out at {budget} % of {length} tokens: {error}"})
        windows = (bound.policy.window(length) for bound in bounds if isinstance(bound, BoundPolicy))
        read = engine.read(tokens.context, max(windows, default=0))
        for bound in bounds:
            if not isinstance(bound, BoundPolicy):
                yield bound
                continue
            try:
                session = engine.session(bound, read)
            except PolicyError as error:  # what the model lacks
                yield {NOTE: f"left out: {error}"}
                continue
            scores = score(TASKS[self.task], session, sample, tokens)
            counts = counted(session.policy, engine.model.shape.kv_heads)
            yield counts | {"scores": [astuple(each) for each in scores]}


def ask_sample(asked: SampleAsked, wanted: Sequence[int]) -> Iterator[Outcome]:
    """Do so at a worker elsewhere, whose model stays in its memory."""
    return asked.outcomes(engine_of(asked.model), wanted)


@lru_cache(maxsize=1)
def engine_of(model: Path) -> EvalModel:
    """Load a model once in this process."""
    return EvalModel(load_model(model), "cuda" if torch.cuda.is_available() else "cpu")


def _ask(
    engine: EvalModel, grid: EvalGrid, cells: Sequence[Cell], results: Results, say: Say, runner: CellRunner
) -> None:
    """Ask all samples of one task for these cells."""
    if not cells:
        return
    task, question = cells[0].task, cells[0].question
    settings = tuple((cell.policy, cell.budget) for cell in cells)
    names = tuple(f"{spec} at {budget} %" for spec, budget in settings)
    count, done = task.samples(grid.samples), dict[int, list[Outcome]]()
    clock = Clock(count * len(cells))
    batches = [
        Batch(
            f"{task.name}/{question}/{i}", names,
            SampleAsked(engine.model.path, task.name, question, i, settings, grid.seed, grid.context),
        )
        for i in range(count)
    ]  # fmt: skip

    def here(asked: SampleAsked, wanted: Sequence[int]) -> Iterator[Outcome]:
        outcomes = asked.outcomes(engine, wanted)
        for n in wanted:
            left = "" if runner.table.drawn else clock.left()  # the table says it, too
            say(f"sample {asked.number + 1} of {count}, {names[n]}{left}")
            yield next(outcomes)

    filling = [(Cell(task, question, *setting), list[Outcome]()) for setting in settings]

    def seen(i: int, j: int, outcome: Outcome) -> None:
        cell, outcomes = filling[j]
        outcomes.append(outcome)
        cell.take(outcomes)
        text = cell_text(cell.row()) if cell.scores else ""
        runner.table.put(shown_at(cell.policy, cell.budget), text_so_far(text, outcomes))

    for i, outcomes in runner.run(batches, here, seen):
        done[i] = outcomes
        for j, cell in enumerate(cells):
            cell.take([done[n][j] for n in sorted(done)])
        for outcome in outcomes:
            if NOTE in outcome:
                results.note(outcome[NOTE])
        if runner.cluster is not None:
            say(f"{len(done)} of {count} samples{so_far(cells)}")


def _under(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}")
