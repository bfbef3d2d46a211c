"""Ask the cells that no journal has yet, and hand them on in batches: whole documents, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpcache.cluster import Cluster, ClusterError, Failure
from mpcache.console import terminal
from mpcache.console.live_table import LiveTable
from mpcache.console.signals import Stopped
from mpcache.sweeping.journal import Journal, Outcome

FAILED = "failed"  # of an outcome: why there is none
Work = Callable[..., Iterator[Outcome]]  # takes a batch's `about`, and which cells are wanted
Seen = Callable[[int, int, Outcome], None]  # hears of a batch's number, a cell's in it, and its outcome


@dataclass(frozen=True)
class Batch:
    """Cells that share what is dear to make, as a document that was read.

    name, cells: what the journal calls them.  about: what the work is told; pickled for a worker elsewhere.
    """

    name: str
    cells: tuple[str, ...]
    about: Any = None

    def named(self, cell: int) -> str:
        """Return the journal's name of a cell."""
        return f"{self.name}/{self.cells[cell]}"


@dataclass
class CellRunner:
    """Runs batches here, one after another, or on a cluster. failures: of cells, in words.

    work: at a worker elsewhere; memory: bytes that it needs there.  table: shows how far it is.
    """

    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    cluster: Cluster | None = None
    work: Work | None = None
    memory: int = 0
    failures: list[str] = field(default_factory=list)
    table: LiveTable = field(default_factory=LiveTable)

    def run(
        self, batches: Sequence[Batch], here: Work, seen: Seen = lambda n, cell, outcome: None
    ) -> Iterator[tuple[int, list[Outcome]]]:
        """Yield each batch's number and its cells' outcomes, in the order of the cells, when all are there.

        A cell that failed has the outcome {FAILED: why}; it is asked again when the sweep goes on. What
        `here` raises ends the run; what is done stays done.  seen: hears of each cell as soon as it is
        there, of those in the journal first.
        """
        found = [
            [self.journal.found.get(batch.named(i)) for i in range(len(batch.cells))] for batch in batches
        ]
        there = [
            (n, i, cell) for n, cells in enumerate(found) for i, cell in enumerate(cells) if cell is not None
        ]
        self.table.found(len(there))
        for each in there:
            seen(*each)
        open_ = {n: [i for i, cell in enumerate(cells) if cell is None] for n, cells in enumerate(found)}
        for n, wanted in open_.items():
            if not wanted:
                yield n, [cell for cell in found[n] if cell is not None]
        todo = [(n, wanted) for n, wanted in open_.items() if wanted]
        for n, cell, outcome in self._asked(batches, todo, here):
            failed = None
            if FAILED in outcome:
                failed = f"{batches[n].named(cell)}: {outcome[FAILED]}"
                self.failures.append(failed)
            else:
                self.journal.add(batches[n].named(cell), outcome)
            found[n][cell] = outcome
            self.table.step(failed)
            seen(n, cell, outcome)
            if all(one is not None for one in found[n]):
                yield n, [one for one in found[n] if one is not None]

    def _asked(
        self, batches: Sequence[Batch], todo: Sequence[tuple[int, list[int]]], here: Work
    ) -> Iterator[tuple[int, int, Outcome]]:
        """Yield batch, cell and outcome of all that is to be done."""
        if self.cluster is None or self.work is None:
            for n, wanted in todo:
                for cell, outcome in zip(wanted, here(batches[n].about, wanted), strict=True):
                    yield n, cell, outcome
            return
        parts = list(_parted(todo, self.cluster.workers))
        left = [list(wanted) for _, wanted in parts]
        tasks = [(batches[n].about, wanted) for n, wanted in parts]
        for number, outcome in self.cluster.stream(self.work, tasks, self.memory):
            n = parts[number][0]
            if outcome is None or isinstance(outcome, Failure):
                why = outcome.why if outcome else "its worker gave no result"
                for cell in left[number]:
                    yield n, cell, {FAILED: why}
            else:
                yield n, left[number].pop(0), outcome

    def check(self) -> None:
        """Raise ClusterError where cells failed: their names, and why the first one did."""
        if self.failures:
            more = f", and {len(self.failures) - 1} more" if len(self.failures) > 1 else ""
            again = "; with --journal, the same command asks them again" if self.journal.file is None else ""
            raise ClusterError(f"failed: {self.failures[0]}{more}{again}")

    def kept(self) -> str:
        """Say what an interruption leaves, and how to go on."""
        if self.journal.file is None:
            return "with --journal FILE, an interrupted sweep goes on after the cells that are done"
        done = len(self.journal.found)
        return f"{self.journal.file} has {done} finished cells; the same command goes on after them"


@contextmanager
def cell_runner(
    ray: str | None, journal: Path | None, about: Mapping[str, Any], work: Work, memory: int = 0
) -> Iterator[CellRunner]:
    """Open the journal of what `about` says, and join the cluster that --ray names, if it names one.

    work: what a worker there does; memory: bytes that it takes. Who interrupts is told how to go on. Raises
    BadInput.
    """
    runner = CellRunner(Journal(journal, about))
    try:
        if ray is None:
            yield runner
            return
        with Cluster.join(ray) as cluster:
            cluster.check_memory(memory, 1, "workers")
            runner.cluster, runner.work, runner.memory = cluster, work, memory
            yield runner
    except (Stopped, KeyboardInterrupt):
        terminal.say(f"note: {runner.kept()}")
        raise


def _parted(todo: Sequence[tuple[int, list[int]]], workers: int) -> Iterator[tuple[int, list[int]]]:
    """Cut batches into parts where there are fewer than workers: each part reads its document anew."""
    pieces = -(-workers // max(1, len(todo)))
    for n, wanted in todo:
        size = -(-len(wanted) // pieces)
        for start in range(0, len(wanted), size):
            yield n, wanted[start : start + size]
