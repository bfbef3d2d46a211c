"""Accidents of real processes, at every phase: the others end in time, with a reason and not with 0."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mpcache.config import PublicConfig, Settings
from mpcache.rank import Rank
from tests.parties.helpers import free_settings
from tests.parties.processes import PARTY, Process, errors_of, start, started, write_config

S, C, D = Rank
FAULTY = [sys.executable, "-m", "tests.parties.faulty_party"]
RECONNECT_S, RECV_S = 2, 8
LIMIT_S = RECV_S + RECONNECT_S + 10  # and what a busy machine adds


def begin(
    children: list[Process],
    folder: Path,
    tmp_path: Path,
    faulty: Rank,
    fault: str,
    phase: str,
    tokens: int = 25,
) -> dict[Rank, Process]:
    """All three; one of them will have an accident."""
    settings: Settings = free_settings(connect_s=60, recv_s=RECV_S, reconnect_s=RECONNECT_S)
    public = PublicConfig(policy="full", max_new_tokens=tokens)
    config = write_config(settings.model_copy(update={"public": public}), tmp_path / "config.yaml")
    document = tmp_path / "document.txt"
    document.write_text("the number of the gate of the city")
    flags: dict[Rank, list[object]] = {
        S: ["--model", folder, "--context", document],
        C: ["--question", "the gate of", "--no-stop-at-eos"],
        D: [],
    }
    running = {}
    for rank in Rank:
        command = [*FAULTY, fault, phase] if rank is faulty else PARTY
        running[rank] = start(command, "--rank", int(rank), "--config", config, *flags[rank])
        children.append(running[rank])
    return running


def others_end(running: dict[Rank, Process], faulty: Rank, words: str) -> None:
    begin, reasons = time.monotonic(), []
    for rank in set(Rank) - {faulty}:
        _, noise = running[rank].communicate(timeout=LIMIT_S)
        assert running[rank].returncode == 3, noise
        reasons += errors_of(noise)
    assert time.monotonic() - begin < LIMIT_S
    assert len(reasons) == 2
    for line in reasons:
        assert words in line, reasons


EACH = [(rank, phase) for phase in ("setup", "context", "question", "decode2") for rank in Rank]
FAST = [(D, "question")]


@pytest.mark.parametrize(
    ("victim", "phase"),
    [pytest.param(*each, marks=[] if each in FAST else [pytest.mark.slow]) for each in EACH],
)
def test_killed(victim: Rank, phase: str, folder: Path, tmp_path: Path) -> None:
    with started() as children:
        running = begin(children, folder, tmp_path, victim, "kill", phase)
        running[victim].wait(timeout=90)
        assert running[victim].returncode == -signal.SIGKILL
        others_end(running, victim, f"lost {victim.label}: its process or the connection ended")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "phase"), [(S, "context"), (C, "decode2"), (D, "question")])
def test_stalled(victim: Rank, phase: str, folder: Path, tmp_path: Path) -> None:
    """A stopped process keeps its connections: silence is all that the others see of it."""
    with started() as children:
        running = begin(children, folder, tmp_path, victim, "stop", phase)
        pid, flags = os.waitpid(running[victim].pid, os.WUNTRACED)
        assert pid and os.WIFSTOPPED(flags)
        others_end(running, victim, "no word from")


@pytest.mark.slow
def test_a_slow_dealer_is_waited_for(folder: Path, tmp_path: Path) -> None:
    with started() as children:
        running = begin(children, folder, tmp_path, D, "slow:0.05", "question", tokens=3)
        for child in running.values():
            _, noise = child.communicate(timeout=200)
            assert child.returncode == 0, noise


@pytest.mark.slow
def test_a_dealer_slower_than_allowed_is_named(folder: Path, tmp_path: Path) -> None:
    with started() as children:
        running = begin(children, folder, tmp_path, D, f"slow:{3 * RECV_S}", "question")
        others_end(
            running, D, "no word from dealer for 8 s; it is stuck, or slow: then raise timeouts.recv_s"
        )
