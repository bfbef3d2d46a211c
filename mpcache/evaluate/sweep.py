"""Every policy at every budget on the same samples, each context read once.

A task's samples go to the full cache first: what the model cannot do with everything in view says
nothing about eviction, and is not asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpcache.console.terminal import Say
from mpcache.errors import BadInput, PolicyError
from mpcache.evaluate.results import Cell, Results
from mpcache.evaluate.score import EvalModel, Tokens, score
from mpcache.evaluate.tasks import BITS_AT_MOST, FULL_AT_LEAST, Sample, Task
from mpcache.policy import BoundPolicy, parse_policy
from mpcache.policy.combined import Combined
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.clock import Clock

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


def run_sweep(engine: EvalModel, grid: EvalGrid, results: Results, say: Say) -> None:
    """Ask every policy at every budget, and add to `results` whole samples at a time. Raises BadInput.

    The rows of an interrupted sweep stand on the same samples, too.
    """
    for task in grid.tasks:
        for question in [q for q in task.questions if q in grid.questions]:
            name = f"{task.name}, question {question}"
            full = Cell(task, question, FULL, FULL_PERCENT)
            results.cells.append(full)
            _ask(engine, grid, [full], results, _under(say, name))
            full.judged = full.passes()
            if not full.judged:
                results.note(gated_out(full))
                continue
            cells = [
                Cell(task, question, spec, budget, judged=True)
                for spec in grid.policies
                for budget in grid.budgets
            ]
            results.cells += cells
            _ask(engine, grid, cells, results, _under(say, name))


def gated_out(full: Cell) -> str:
    """Say in words why a task is not judged."""
    name = f"{full.task.name}, question {full.question}"
    if full.task.by_token:
        reached, wanted = f"{full.bits_per_byte:.2f} bits per byte", f"at most {BITS_AT_MOST}"
    else:
        reached, wanted = f"{100 * full.accuracy:.0f} %", f"at least {100 * FULL_AT_LEAST:.0f} %"
    return f"{name}: not judged: the full cache reaches {reached}, {wanted} is needed"


def _ask(engine: EvalModel, grid: EvalGrid, cells: Sequence[Cell], results: Results, say: Say) -> None:
    """Ask all samples of one task for these cells."""
    if not cells:
        return
    task, question = cells[0].task, cells[0].question
    count = task.samples(grid.samples)
    clock = Clock(count * len(cells))
    for i in range(count):
        said = f"sample {i + 1} of {count}"
        sample, tokens = take_sample(engine, task, question, grid, i)
        length = len(tokens.context)
        bounds = []
        for cell in cells:
            try:
                bounds.append((cell, bind_at_budget(engine, cell.policy, cell.budget, length)))
            except PolicyError as error:
                results.note(f"left out at {cell.budget} % of {length} tokens: {error}")
        read = engine.read(tokens.context, max((b.policy.window(length) for _, b in bounds), default=0))
        done = []
        for cell, bound in bounds:
            say(f"{said}, {cell.policy} at {cell.budget} %{clock.left()}")
            try:
                session = engine.session(bound, read)
            except PolicyError as error:  # what the model lacks
                results.note(f"left out: {error}")
                continue
            done.append((cell, session.policy, score(task, session, sample, tokens)))
        for cell, bound, scores in done:
            cell.count(bound, engine.model.shape.kv_heads)
            cell.scores += scores


def _under(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}")
