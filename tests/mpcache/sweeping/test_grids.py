"""The same table, whoever asks the cells: in order, in any order, or in two halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpcache.audit.priced_rows import AuditGrid, ask_settings, price_rows
from mpcache.cluster import Cluster, ClusterError
from mpcache.evaluate.results import Results, cell_text
from mpcache.evaluate.score import EvalModel
from mpcache.evaluate.sweep import EvalGrid, SampleAsked, ask_sample, run_sweep
from mpcache.evaluate.tasks import TASKS
from mpcache.model import demo_model_dir, load_model, load_shape
from mpcache.sweeping.journal import Journal, Outcome
from mpcache.sweeping.runner import CellRunner
from mpcache.transport.network import parse_network
from tests.support.cluster_here import ClusterHere
from tests.support.pseudo_terminal import drawn

EVAL = EvalGrid((TASKS["passkey"],), ("after",), ("snapkv", "quest"), (10, 20), 2, 0, 120)


def rows(engine: EvalModel, runner: CellRunner | None = None) -> tuple[Any, set[str]]:
    results = Results()
    run_sweep(engine, EVAL, results, lambda text: None, runner)
    return results.rows(), set(results.notes)


@pytest.fixture(scope="module")
def engine() -> EvalModel:
    return EvalModel(load_model(demo_model_dir()))


def test_an_evaluation_is_the_same_elsewhere_and_in_two_halves(engine: EvalModel, tmp_path: Path) -> None:
    here, journal = rows(engine), Journal(tmp_path / "j", {})
    assert rows(engine, CellRunner(journal)) == here
    assert len(here[0]) == 3 and here[1]  # and notes of what cannot be set to so few tokens
    lines = (tmp_path / "j").read_text().splitlines(keepends=True)
    (tmp_path / "j").write_text("".join(lines[:5]))
    again = CellRunner(Journal(tmp_path / "j", {}), ClusterHere(1), ask_sample)
    assert rows(engine, again) == here and set(again.journal.found) == set(journal.found)
    assert sorted((tmp_path / "j").read_text().splitlines(keepends=True)) == sorted(lines)


def test_an_audit_is_the_same_elsewhere(tmp_path: Path) -> None:
    lan = parse_network("lan")
    assert lan is not None
    shape = load_shape(demo_model_dir())
    grid = AuditGrid(shape, [64, 128], ["full", "snapkv:cap=32"], [lan], ["fast", "auto"], 8, 2)
    here = price_rows(grid)
    for _ in range(2):
        runner = CellRunner(Journal(tmp_path / "j", grid.about(None)), ClusterHere(), ask_settings)
        assert price_rows(grid, runner=runner) == here


def third_fails(asked: SampleAsked, wanted: Sequence[int]) -> Iterator[Outcome]:
    for cell in wanted:
        if cell == 2:
            raise ClusterError("out of luck")
        yield from ask_sample(asked, [cell])


def test_a_table_that_fills_has_the_same_figures_and_names_what_failed(engine: EvalModel) -> None:
    runner = CellRunner(cluster=ClusterHere(1), work=third_fails)
    found, _ = rows(engine, runner)
    texts = {(row["policy"], row["budget_percent"]): cell_text(row).split() for row in found}
    lines = [line.split() for line in drawn(runner.table, 120)]
    assert ["full", *texts["full", 100]] in lines
    assert ["snapkv", *texts["snapkv", 10], *texts["snapkv", 20]] in lines
    assert ["quest", "2", "failed", "2", "failed"] in lines
    assert lines[-1] == ["failed:", "passkey/after/0/quest", "at", "20", "%:", "out", "of", "luck"]


@pytest.mark.slow
def test_an_evaluation_on_ray_is_the_same(engine: EvalModel) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: the extra `scale`")
    with Cluster.join("local", workers=2) as cluster:
        assert rows(engine, CellRunner(cluster=cluster, work=ask_sample)) == rows(engine)
