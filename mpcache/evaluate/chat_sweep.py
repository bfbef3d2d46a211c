"""Every policy at every budget on the same documents, asked as a chat; each document read once.

Judged are the questions that the full cache answers (`question`), or the tasks of which it answers nearly
all (`task`): what the model cannot do with everything in view says nothing about eviction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from mpcache.choices import DocumentAs
from mpcache.console.terminal import Say
from mpcache.errors import BadInput, PolicyError
from mpcache.evaluate.chat_score import Talk, make_talk, score_talks
from mpcache.evaluate.chat_tasks import CHAT_TASKS
from mpcache.evaluate.results import NOTE, Cell, Results, counted, share_text, so_far, text_so_far, wilson
from mpcache.evaluate.score import EvalModel, Score
from mpcache.evaluate.sweep import FULL, EvalGrid, bind_at_budget, engine_of, gated_out, shown_at
from mpcache.evaluate.tasks import Task
from mpcache.model.framing import Framing, make_framing
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.clock import Clock
from mpcache.sweeping.journal import Outcome
from mpcache.sweeping.runner import Batch, CellRunner

GATES = ("question", "task")


@dataclass(frozen=True)
class Reading:
    """What is asked after one reading of a document: conversations of some tasks."""

    question: str
    context: list[int]
    talks: list[tuple[Task, Talk]]


@dataclass(frozen=True)
class ChatAsked:
    """A reading of a document, and what it is asked under: what a worker elsewhere is told.

    model: a folder or file, at the same place on each machine.  number, reading: of `ChatSweep.document`.
    """

    model: Path
    document_as: DocumentAs
    tasks: tuple[str, ...]
    questions: tuple[str, ...]
    seed: int
    context: int
    settings: tuple[tuple[str, int], ...]
    number: int
    reading: int

    def outcomes(self, sweep: ChatSweep, reading: Reading, wanted: Sequence[int]) -> Iterator[Outcome]:
        """Yield what each of the wanted settings gives: right answers, or a note why there are none."""
        engine, length = sweep.engine, len(reading.context)
        read = engine.read(reading.context, length)
        for spec, budget in (self.settings[i] for i in wanted):
            try:
                set_ = bind_at_budget(engine, spec, budget, length)
                bound = engine.bind(set_, read)
                right = score_talks(engine, bound, read, [talk for _, talk in reading.talks])
            except PolicyError as error:
                yield {NOTE: f"left out at {budget} % of {length} tokens: {error}"}
                continue
            # The policy without the counts of this document's heads.
            yield counted(bound, engine.model.shape.kv_heads) | {"spec": set_.spec, "right": right}


def ask_reading(asked: ChatAsked, wanted: Sequence[int]) -> Iterator[Outcome]:
    """Do so at a worker elsewhere, whose model stays in its memory."""
    sweep = _sweep_of(replace(asked, settings=(), number=0, reading=0))
    return asked.outcomes(sweep, sweep.document(asked.number)[asked.reading], wanted)


@lru_cache(maxsize=1)
def _sweep_of(asked: ChatAsked) -> ChatSweep:
    """Make the sweep of a worker: its documents are those of the driver's."""
    engine = engine_of(asked.model)
    framing = make_framing(engine.model.tokenizer, engine.model.shape, False, asked.document_as, True)
    tasks = tuple(CHAT_TASKS[name] for name in asked.tasks)
    grid = EvalGrid(tasks, asked.questions, (), (), 1, asked.seed, asked.context)
    return ChatSweep(engine, framing, grid, GATES[0], Results())


@dataclass
class ChatSweep:
    """A sweep over documents that are asked about as a chat.

    gate: `question` or `task`.  kept: called after each reading.
    """

    engine: EvalModel
    framing: Framing
    grid: EvalGrid
    gate: str
    results: Results
    kept: Callable[[], None] = lambda: None
    document_as: DocumentAs = DocumentAs.SYSTEM
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

    def talks(self, task: Task, question: str) -> Iterator[tuple[list[int], Talk]]:
        """Yield a task's conversations, each with what is read before it."""
        for i in range(self.documents):
            for reading in self.document(i):
                if reading.question == question:
                    yield from (
                        (reading.context, talk) for one, talk in reading.talks if one.name == task.name
                    )

    def run(self, say: Say, runner: CellRunner | None = None) -> None:
        """Ask everything, and add to `results` whole readings at a time. Raises BadInput."""
        grid, runner = self.grid, runner or CellRunner()
        settings = grid.settings()
        places = [(i, r) for i in range(self.documents) for r in range(len(self.document(i)))]
        names = tuple(f"{spec} at {budget} %" for spec, budget in settings)
        about = ChatAsked(
            self.engine.model.path, self.document_as, tuple(task.name for task in grid.tasks),
            grid.questions, grid.seed, grid.context, tuple(settings), 0, 0,
        )  # fmt: skip
        batches = [
            Batch(f"document {i}/reading {r}", names, replace(about, number=i, reading=r)) for i, r in places
        ]
        clock, done = Clock(len(places) * len(settings)), dict[int, list[Outcome]]()

        def here(asked: ChatAsked, wanted: Sequence[int]) -> Iterator[Outcome]:
            reading = self.document(asked.number)[asked.reading]
            said = f"document {asked.number + 1} of {self.documents}, question {reading.question}"
            outcomes = asked.outcomes(self, reading, wanted)
            for n in wanted:
                left = "" if runner.table.drawn else clock.left()  # the table says it, too
                say(f"{said}, {names[n]} ({n + 1} of {len(settings)}){left}")
                yield next(outcomes)

        title = "all tasks together, questions judged by the full cache" if self.gate == "question" else ""
        shown = [shown_at(*setting) for setting in settings]
        runner.table.begin(title or "all tasks together", "policy", shown, len(places) * len(settings))
        filling: list[dict[int, Outcome]] = [{} for _ in settings]

        def seen(n: int, j: int, outcome: Outcome) -> None:
            filling[j][n] = outcome
            for one in (j,) if j else range(len(settings)):  # what the full cache answers judges the others
                if filling[one]:
                    runner.table.put(shown[one], self._so_far(filling[0], filling[one]))

        for n, outcomes in runner.run(batches, here, seen):
            done[n] = outcomes
            self._stand_on({places[m]: done[m] for m in sorted(done)}, settings)
            if runner.cluster is not None:
                evicted = (cell for cell in self.cells.values() if cell.policy != FULL)
                say(f"{len(done)} of {len(places)} readings{so_far(evicted)}")
            self.kept()
        self._judge()

    def _so_far(self, full: Mapping[int, Outcome], mine: Mapping[int, Outcome]) -> str:
        """Write what a setting answers in the readings that it shares with the full cache."""
        counts = [
            answer
            for n in full.keys() & mine.keys()
            for able, answers in zip(full[n].get("right", ()), mine[n].get("right", ()), strict=False)
            for before, answer in zip(able, answers, strict=True)
            if before or self.gate != "question" or mine is full
        ]
        right, asked = sum(counts), len(counts)
        text = share_text(right / asked, *wilson(right, asked)) if asked else ""
        return text_so_far(text, mine.values())

    def _stand_on(
        self, done: Mapping[tuple[int, int], list[Outcome]], settings: Sequence[tuple[str, int]]
    ) -> None:
        """Count all that has been asked, from the first document to the last, in place of what was before."""
        self.cells.clear()
        self.results.cells.clear()
        for (i, r), outcomes in done.items():
            reading = self.document(i)[r]
            able = outcomes[0].get("right") if settings[0][0] == FULL else None
            for (spec, budget), outcome in zip(settings, outcomes, strict=True):
                if NOTE in outcome:
                    self.results.note(outcome[NOTE])
                if "right" in outcome and able is not None:
                    self._count(reading, spec, budget, outcome, able)

    def _count(
        self, reading: Reading, spec: str, budget: int, outcome: Outcome, able: Sequence[list[bool]]
    ) -> None:
        """Add a setting's answers to the cells of their tasks. able: what the full cache answers."""
        for (task, talk), answers, before in zip(reading.talks, outcome["right"], able, strict=True):
            cell = self._cell(task, reading.question, spec, budget)
            counts = before if self.gate == "question" and spec != FULL else [True] * len(answers)
            cell.add(outcome)
            cell.scores += [
                Score(part, int(answer), 1, 0.0, 0)
                for part, answer, counted_ in zip(talk.parts, answers, counts, strict=True)
                if counted_
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
