"""Every policy at every budget on the same documents, asked as a chat; each document read once.

Judged are the questions that the full cache answers (`question`), or the tasks of which it answers nearly
all (`task`): what the model cannot do with everything in view says nothing about eviction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpcache.console.terminal import Say
from mpcache.errors import BadInput, PolicyError
from mpcache.evaluate.chat_score import Talk, make_talk, score_talks
from mpcache.evaluate.results import Cell, Results
from mpcache.evaluate.score import EvalModel, Score
from mpcache.evaluate.sweep import FULL, EvalGrid, bind_at_budget, gated_out
from mpcache.evaluate.tasks import Task
from mpcache.model.framing import Framing
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.clock import Clock

GATES = ("question", "task")


@dataclass(frozen=True)
class Reading:
    """What is asked after one reading of a document: conversations of some tasks."""

    question: str
    context: list[int]
    talks: list[tuple[Task, Talk]]


@dataclass
class ChatSweep:
    """A sweep over documents that are asked about as a chat.

    gate: `question` or `task`.  kept: called after each document.
    """

    engine: EvalModel
    framing: Framing
    grid: EvalGrid
    gate: str
    results: Results
    kept: Callable[[], None] = lambda: None
    cells: dict[tuple[str, str, str, int], Cell] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """How many documents give the answers that were asked for."""
        return -(-self.grid.samples // sum(task.per_document for task in self.grid.tasks))

    def document(self, i: int) -> list[Reading]:
        """Make document i, and all that is asked about it. Raises BadInput where it does not fit."""
        encode, grid = self.engine.model.tokenizer.encode, self.grid
        count_tokens = lambda text: len(encode(text, bos=False))  # noqa: E731
        talks, text = [], ""
        for task in grid.tasks:
            sample = task.sample(i, grid.seed, count_tokens, grid.context)
            text = sample.context
            groups = [[turn] for turn in sample.turns] if task.apart else [sample.turns]
            talks += [(task, make_talk(self.framing, turns)) for turns in groups if turns]
        context = self.framing.frame_document(text)
        longest, most = max(len(talk.ids) for _, talk in talks), self.engine.model.shape.max_positions
        if len(context) + longest > most:
            raise BadInput(
                f"a document of {len(context)} tokens with its template, and {longest} of a conversation: "
                f"the model allows {most}; lower --context, which is {grid.context}"
            )
        found = []
        if "after" in grid.questions:
            found.append(Reading("after", context, talks))
        if "inside" in grid.questions:
            for task, talk in talks:
                longer, rest = talk.moved(context)
                found.append(Reading("inside", longer, [(task, rest)]))
        return found

    def run(self, say: Say) -> None:
        """Ask everything, and add to `results` whole readings at a time. Raises BadInput."""
        grid = self.grid
        settings = [(FULL, FULL_PERCENT), *((p, b) for p in grid.policies for b in grid.budgets)]
        readings = self.documents * len(self.document(0))
        clock = Clock(readings * len(settings))
        for i in range(self.documents):
            for reading in self.document(i):
                said = f"document {i + 1} of {self.documents}, question {reading.question}"
                self._ask(reading, settings, lambda text, said=said: say(f"{said}, {text}{clock.left()}"))  # type: ignore[misc]
            self.kept()
        self._judge()

    def _ask(self, reading: Reading, settings: Sequence[tuple[str, int]], say: Say) -> None:
        """Ask one reading's conversations, of the full cache first."""
        read = self.engine.read(reading.context, len(reading.context))
        able: list[list[bool]] | None = None
        for n, (spec, budget) in enumerate(settings):
            say(f"{spec} at {budget} % ({n + 1} of {len(settings)})")
            try:
                wanted = bind_at_budget(self.engine, spec, budget, len(reading.context))
                bound = self.engine.bind(wanted, read)
                right = score_talks(self.engine, bound, read, [talk for _, talk in reading.talks])
            except PolicyError as error:
                self.results.note(f"left out at {budget} % of {len(reading.context)} tokens: {error}")
                continue
            able = right if able is None else able
            for (task, talk), answers, before in zip(reading.talks, right, able, strict=True):
                cell = self._cell(task, reading.question, spec, budget)
                counted = before if self.gate == "question" and spec != FULL else [True] * len(answers)
                cell.spec = cell.spec or wanted.spec  # without the counts of this document's heads
                cell.count(bound, self.engine.model.shape.kv_heads)
                cell.scores += [
                    Score(part, int(answer), 1, 0.0, 0)
                    for part, answer, counts in zip(talk.parts, answers, counted, strict=True)
                    if counts
                ]

    def _cell(self, task: Task, question: str, spec: str, budget: int) -> Cell:
        key = (task.name, question, spec, budget)
        if key not in self.cells:
            self.cells[key] = Cell(task, question, spec, budget, judged=True)
            order = {name: i for i, name in enumerate(dict.fromkeys(k[:2] for k in self.cells))}
            ranked = sorted(self.cells, key=lambda k: order[k[:2]])
            self.results.cells[:] = [self.cells[k] for k in ranked]
        return self.cells[key]

    def _judge(self) -> None:
        """Judge by task what is not judged by question."""
        if self.gate == "question":
            return
        for (name, question, _, _), cell in self.cells.items():
            full = self.cells[name, question, FULL, FULL_PERCENT]
            cell.judged = full.passes()
            if not cell.judged:
                self.results.note(gated_out(full))
