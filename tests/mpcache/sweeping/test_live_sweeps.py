"""Sweeps on a terminal: the table fills in place, an interruption loses nothing, failures are named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mpcache.console.live_table import PENDING
from mpcache.model import demo_model_dir
from tests.support.paths import ROOT
from tests.support.processes import CLI, Run
from tests.support.pseudo_terminal import CTRL_C, OnTerminal, on_terminal

pytestmark = pytest.mark.processes
ray_only = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: the extra `scale`")

POLICIES = ("snapkv", "h2o", "quest")
SAMPLES = 16  # enough that a key that is pressed at the first ones comes long before the last
EVAL = [
    *CLI,
    "eval",
    "--task",
    "passkey",
    "--question",
    "after",
    "--samples",
    str(SAMPLES),
    "--context",
    "700",
]
EVAL += ["--budget", "10,20", *(word for policy in POLICIES for word in ("--policy", policy))]
SETTINGS = 1 + 2 * len(POLICIES)
CELLS, FEW = SAMPLES * SETTINGS, 4
AUDIT = [*CLI, "audit", "--context", "256,512", "--json"]
AUDIT += [word for policy in ("full", *POLICIES, "mpcache") for word in ("--policy", policy)]
AGREEMENT = [sys.executable, str(ROOT / "tools/agreement.py"), "--samples", "4", "--tokens", "60"]
AGREEMENT += ["--answer", "2", "--policy", "full", "--policy", "snapkv:cap=32"]
PERCENT = r"\d+ \(\d+-\d+\)"
SOME = r"\b([1-3]) of \1\b"  # a cell that is not full yet; on a busy machine a drawing may skip some


def cells_of(journal: Path) -> list[str]:
    return [json.loads(line)["cell"] for line in journal.read_text().splitlines()[1:]]


def counted(screen: list[str]) -> tuple[int, int] | None:
    """How many cells the screen says are done, of how many."""
    found = re.search(r"(\d+)/(\d+) cells, left", "\n".join(screen))
    return None if found is None else (int(found[1]), int(found[2]))


def fills_in_place(shown: OnTerminal, cells: int, done: int | None = None) -> None:
    """The counts only grow, one table stands on each screen, and none is left at the end. done: else all."""
    counts = [count for screen in shown.screens if (count := counted(screen))]
    assert counts == sorted(counts) and {whole for _, whole in counts} == {cells}
    # A signal may come between a cell's line in the journal and its count.
    assert counts[-1][0] in ((cells,) if done is None else (done - 1, done))
    assert all("\n".join(screen).count("cells, left") <= 1 for screen in shown.screens)
    assert "cells, left" not in shown.written and PENDING not in shown.written


def interrupted_and_continued(journal: Path, *ray: str) -> None:
    command = [*EVAL, "--journal", str(journal), *ray]
    with on_terminal(command, columns=200) as first:
        first.shows(lambda screen: re.search(rf"h2o .*{PERCENT}", screen) is not None, 120)
        first.press(CTRL_C)
        assert first.end() == 130
    half = cells_of(journal)
    fills_in_place(first, CELLS, len(half))
    assert len(set(half)) == len(half) < CELLS
    assert f"has {len(half)} finished cells; the same command goes on after them" in first.written
    assert first.written.rstrip().endswith("error: mpcache: stopped by SIGINT")
    assert "Traceback" not in first.written

    with on_terminal(command, columns=200) as second:
        assert second.end(120) == 0
    shown = [count[0] for screen in second.screens if (count := counted(screen)) and count[0]]
    assert shown[0] >= SAMPLES  # the full cache's are there at once
    fills_in_place(second, CELLS)
    cells = cells_of(journal)
    assert cells[: len(half)] == half and len(set(cells)) == len(cells) == CELLS
    for policy in ("full", *POLICIES):
        assert re.search(rf"│ {policy} .*{PERCENT}", second.written), second.written


@pytest.mark.slow
def test_an_evaluation_that_is_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    interrupted_and_continued(tmp_path / "journal")


@ray_only
@pytest.mark.slow
def test_so_does_one_on_ray(tmp_path: Path) -> None:
    interrupted_and_continued(tmp_path / "journal", "--ray", "local")


def test_json_in_a_file_is_what_it_is_without_a_terminal(tmp_path: Path, run_here: Run) -> None:
    with (tmp_path / "out").open("wb") as out, on_terminal(AUDIT, 200, stdout=out.fileno()) as shown:
        assert shown.end() == 0
    priced = json.loads((tmp_path / "out").read_text())["rows"]
    fills_in_place(shown, 2 * 5)
    times = [line for screen in shown.screens for line in screen if "snapkv" in line]
    assert any(re.search(r"snapkv\S* +[\d.]+ m?s / [\d.]+ m?s", line) for line in times), times
    code, bare, noise = run_here(*AUDIT[len(CLI) :])
    assert code == 0 and json.loads(bare)["rows"] == priced
    assert [line for line in shown.written.splitlines() if line] == noise.splitlines()


@pytest.mark.slow
def test_agreement_fills_a_table_and_gives_pipes_its_lines(tmp_path: Path) -> None:
    with on_terminal(AGREEMENT, 200) as shown:
        assert shown.end(120) == 0
    fills_in_place(shown, 8)
    assert any(re.search(SOME, line) for screen in shown.screens for line in screen)
    table = shown.written.strip().splitlines()
    with (tmp_path / "out").open("wb") as out, on_terminal(AGREEMENT, stdout=out.fileno()) as piped:
        assert piped.end(120) == 0
    fills_in_place(piped, 8)
    lines = (tmp_path / "out").read_text().splitlines()
    assert [json.loads(line)["policy"] for line in lines[:8]] == ["full", "snapkv:cap=32"] * 4
    assert all("| `full` | 4 of 4 | 0, 0 |" in found[-2] for found in (lines, table))


@pytest.mark.slow
def test_agreement_that_is_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [*AGREEMENT, "--samples", "6", "--journal", str(tmp_path / "journal")]
    with on_terminal(command, columns=200) as first:
        first.shows(lambda screen: re.search(SOME, screen) is not None, 120)
        first.press(CTRL_C)
        assert first.end() == 130
    half = cells_of(tmp_path / "journal")
    assert half and f"has {len(half)} finished cells" in first.written and "Traceback" not in first.written
    with on_terminal(command, columns=200) as second:
        assert second.end(120) == 0
    cells = cells_of(tmp_path / "journal")
    assert cells[: len(half)] == half and len(set(cells)) == len(cells) == 12


@ray_only
@pytest.mark.slow
def test_cells_that_fail_are_named_and_asked_again(tmp_path: Path) -> None:
    """Here the model is away when the workers look for it."""
    model = tmp_path / "model"
    shutil.copytree(demo_model_dir(), model)
    command = [
        *EVAL,
        "--samples",
        str(FEW),
        "--model",
        str(model),
        "--journal",
        str(tmp_path / "journal"),
        "--ray",
        "local",
    ]
    with on_terminal(command, columns=400) as first:
        first.shows(lambda screen: f"0/{FEW * SETTINGS} cells" in screen, 120)
        model.rename(tmp_path / "away")
        assert first.end(120) == 1
    named = re.findall(
        r"^(note|error): failed: passkey/after/\d+/\S+ at \d+ %: ", first.written, re.MULTILINE
    )
    assert set(named[:-1]) == {"note"} and named[-1] == "error"
    assert "Traceback" not in first.written
    (tmp_path / "away").rename(model)
    with on_terminal(command, columns=400) as second:
        assert second.end(120) == 0
    assert len(set(cells_of(tmp_path / "journal"))) == FEW * SETTINGS and "failed" not in second.written
