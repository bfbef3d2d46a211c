"""What a sweep found: counts per cell, as rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpcache.evaluate.score import Score
from mpcache.evaluate.tasks import BITS_AT_MOST, FULL_AT_LEAST, Task
from mpcache.policy import BoundPolicy, parse_policy
from mpcache.policy.plan import FULL_PERCENT
from mpcache.sweeping.journal import Outcome
from mpcache.sweeping.runner import FAILED

EvalRow = dict[str, Any]
NOTE = "note"  # of an outcome: why a setting was left out
ALL = "all"  # tasks of a chat together


def wilson(right: int, asked: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927): its ends, from 0 to 1."""
    if not asked:
        return 0.0, 1.0
    p, n = right / asked, asked
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class Cell:
    """Answers of one policy at one budget to one task. attended, context: tokens, summed over samples."""

    task: Task
    question: str
    policy: str
    budget: int
    engine: str = "plain"
    spec: str = ""  # the policy with its budget options, as the first sample ran it
    scores: list[Score] = field(default_factory=list)
    attended: float = 0
    context: int = 0
    agreed: list[bool] = field(default_factory=list)  # secure: the same tokens as plain, or nearly its bits
    off: list[float] = field(default_factory=list)  # secure: a sample's bits per byte from plain's
    judged: bool | None = None  # None: the full cache has not been asked yet

    @property
    def asked(self) -> int:
        return sum(score.asked for score in self.scores)

    @property
    def accuracy(self) -> float:
        return _share(self.scores)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte_of(self.scores)

    def count(self, bound: BoundPolicy, kv_heads: int) -> None:
        """Count one more sample that is asked under this policy and plan."""
        self.add(counted(bound, kv_heads))

    def add(self, counts: Outcome) -> None:
        """Add what `counted` counts of a sample."""
        self.spec = self.spec or counts["spec"]
        self.attended += counts["attended"]
        self.context += counts["context"]

    def take(self, outcomes: Iterable[Outcome]) -> None:
        """Stand on these outcomes of samples, in order, in place of those before."""
        self.spec, self.scores, self.attended, self.context = "", [], 0, 0
        for outcome in outcomes:
            if "scores" in outcome:
                self.add(outcome)
                self.scores += [Score(*each) for each in outcome["scores"]]

    def passes(self) -> bool:
        """Return whether the model does the task at all; this is the full cache's cell."""
        if self.task.by_token:
            return self.bits_per_byte <= BITS_AT_MOST
        return self.accuracy >= FULL_AT_LEAST

    def row(self) -> EvalRow:
        right = sum(score.right for score in self.scores)
        parts: defaultdict[str, list[Score]] = defaultdict(list)
        for score in self.scores:
            parts[score.part].append(score)
        row: EvalRow = {
            "task": self.task.name,
            "policy": self.policy,
            "budget_percent": self.budget,
            "question": self.question,
            "accuracy": round(self.accuracy, 4),
            "ci95": [round(end, 4) for end in wilson(right, self.asked)],
            "n": self.asked,
            "answers": "".join(str(score.right) for score in self.scores),
            "engine": self.engine,
            "judged": self.judged,
            "spec": self.spec,
            "attended_percent": round(100 * self.attended / self.context, 2),
            "parts": {part: round(_share(scores), 4) for part, scores in sorted(parts.items())},
        }
        if self.task.by_token:
            row["bits_per_byte"] = round(self.bits_per_byte, 4)
        if self.off:
            row["bits_per_byte_off"] = round(max(self.off), 6)
        if self.agreed:
            row["agreement"] = round(sum(self.agreed) / len(self.agreed), 4)
        return row


def counted(bound: BoundPolicy, kv_heads: int) -> Outcome:
    """Return what `Cell.count` counts of a sample, as a part of its outcome."""
    return {
        "spec": bound.spec, "attended": bound.plan.tokens_attended(kv_heads), "context": bound.plan.context,
    }  # fmt: skip


def so_far(cells: Iterable[Cell]) -> str:
    """Say what the first settings reach so far."""
    there = [cell for cell in cells if cell.scores][:3]
    said = [f"{cell.policy} at {cell.budget} %: {100 * cell.accuracy:.0f} %" for cell in there]
    return f"; so far {', '.join(said)}" if said else ""


def cell_text(row: EvalRow) -> str:
    """Write a cell: 98 (90-100), in percent; 1.57 (39) for bits per byte.

    Secure rows add how many answers were the plain engine's, or how far the farthest sample was off the
    plain engine's bits per byte.
    """
    if "bits_per_byte" in row:
        text = f"{row['bits_per_byte']:.2f} ({100 * row['accuracy']:.0f})"
        return f"{text}, off {row['bits_per_byte_off']:.4f}" if "bits_per_byte_off" in row else text
    text = share_text(row["accuracy"], *row["ci95"])
    return f"{text}, agree {100 * row['agreement']:.0f}" if "agreement" in row else text


def budget_name(budget: int) -> str:
    """Name a budget's column."""
    return "all" if budget == FULL_PERCENT else f"{budget} %"


def share_text(share: float, low: float, high: float) -> str:
    """Write a share and its interval in percent."""
    return f"{100 * share:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def text_so_far(text: str, outcomes: Iterable[Outcome]) -> str:
    """Write a cell that fills: what its answers give, and what gave none."""
    outcomes = list(outcomes)
    if failed := sum(FAILED in outcome for outcome in outcomes):
        return f"{text}, {failed} failed" if text else f"{failed} failed"
    return text or ("left out" if any(NOTE in outcome for outcome in outcomes) else "")


def bits_per_byte_of(scores: Sequence[Score]) -> float:
    """Return the bits that a byte of the answers took, the mean over all bytes."""
    return sum(score.nats for score in scores) / math.log(2) / sum(score.bytes for score in scores)


def _share(scores: Iterable[Score]) -> float:
    scores = list(scores)
    return sum(score.right for score in scores) / sum(score.asked for score in scores)


@dataclass
class Results:
    """Grows as the sweep runs. notes: in words, what was left out and why, each once."""

    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def to_confirm(self) -> Iterator[tuple[Cell, Cell, str]]:
        """Yield each judged cell, a new one for what the parties say there, and where that is, in words."""
        for plain in [cell for cell in self.cells if cell.judged and cell.scores]:
            if parse_policy(plain.policy).in_the_clear:
                self.note(f"{plain.policy}: runs in plaintext only, so the parties did not confirm it")
                continue
            secure = Cell(plain.task, plain.question, plain.policy, plain.budget, "secure", judged=True)
            self.cells.append(secure)
            where = f"{plain.task.name}, question {plain.question}, {plain.policy} at {plain.budget} %"
            yield plain, secure, where

    def rows(self) -> list[EvalRow]:
        """Return a row of each cell; of a chat also one of all tasks together."""
        return [cell.row() for cell in [*self.cells, *self._together()] if cell.scores]

    def _together(self) -> list[Cell]:
        """Add up the judged cells of a chat over its tasks."""
        found: dict[tuple[str, str, int, str], Cell] = {}
        for cell in self.cells:
            if not cell.task.chat or not cell.judged:
                continue
            key = (cell.question, cell.policy, cell.budget, cell.engine)
            empty = replace(cell, task=replace(cell.task, name=ALL), scores=[], attended=0, context=0)
            whole = found.setdefault(key, empty)
            whole.scores += [replace(score, part=cell.task.name) for score in cell.scores]
            whole.attended += cell.attended
            whole.context += cell.context
        return list(found.values())
