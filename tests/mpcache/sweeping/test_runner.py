"""Cells of a grid: each asked once, here or elsewhere, and failures by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mpcache.cluster import ClusterError
from mpcache.sweeping.journal import Journal, Outcome
from mpcache.sweeping.runner import FAILED, Batch, CellRunner, cell_runner
from tests.support.cluster_here import ClusterHere

BATCHES = [Batch(f"doc {i}", ("a", "b", "c"), i) for i in range(3)]
asked: list[tuple[int, int]] = []


def work(document: int, wanted: Sequence[int]) -> Iterator[Outcome]:
    for cell in wanted:
        asked.append((document, cell))
        if (document, cell) == (1, 1) and len(asked) < 99:
            raise ClusterError("out of luck")
        yield {"is": [document, cell]}


def fine(document: int, wanted: Sequence[int]) -> Iterator[Outcome]:
    asked.append((document, len(wanted)))
    yield from ({"is": [document, cell]} for cell in wanted)


@pytest.fixture(autouse=True)
def nothing_asked() -> None:
    asked.clear()


def test_here_batches_come_in_order_with_their_cells() -> None:
    found = list(CellRunner().run(BATCHES, fine))
    assert found == [(i, [{"is": [i, c]} for c in range(3)]) for i in range(3)]


@pytest.mark.parametrize("workers", [1, 3, 7])
def test_elsewhere_the_same_cells_come_in_any_order(workers: int) -> None:
    runner = CellRunner(cluster=ClusterHere(workers), work=fine)
    found = list(runner.run(BATCHES, work))
    assert [n for n, _ in found] == [2, 1, 0] and sorted(found) == list(CellRunner().run(BATCHES, fine))
    assert len(asked) == 3 + max(3, 3 * -(-workers // 3))  # documents are cut where workers would be idle


def test_what_the_journal_has_is_not_asked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {})
    runs = CellRunner(journal).run(BATCHES, fine)
    next(runs), next(runs)  # and then it is interrupted
    asked.clear()
    again = CellRunner(Journal(tmp_path / "j", {}), ClusterHere(), fine)
    assert sorted(again.run(BATCHES, work)) == list(CellRunner().run(BATCHES, fine))
    assert [document for document, _ in asked[:-3]] == [2, 2]


def test_failures_are_named_by_cell_and_asked_again(tmp_path: Path) -> None:
    runner = CellRunner(Journal(tmp_path / "j", {}), ClusterHere(1), work)
    found = dict(runner.run(BATCHES, work))
    assert found[1] == [{"is": [1, 0]}, {FAILED: "out of luck"}, {FAILED: "out of luck"}]
    assert runner.failures == ["doc 1/b: out of luck", "doc 1/c: out of luck"]
    with pytest.raises(ClusterError, match="doc 1/b: out of luck, and 1 more"):
        runner.check()
    asked.clear()
    again = CellRunner(Journal(tmp_path / "j", {}), ClusterHere(1), fine)
    assert dict(again.run(BATCHES, work))[1][2] == {"is": [1, 2]}
    assert asked == [(1, 2)] and not again.failures


def test_without_a_cluster_nothing_of_ray_is_needed(tmp_path: Path) -> None:
    with cell_runner(None, tmp_path / "j", {}, fine) as runner:
        list(runner.run(BATCHES, fine))
        runner.check()
    assert (tmp_path / "j").read_text().count("\n") == 10
