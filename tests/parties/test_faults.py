"""Accidents of real processes, at every phase: the others end in time, with a reason and not with 0."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mpcache.config import PublicConfig, Settings
from mpcache.rank import Rank
from mpcache_parties.network.liveness import GONE_S
from tests.support.links import free_settings
from tests.support.processes import PARTY, Process, errors_of, start, started, write_config

pytestmark = pytest.mark.processes

S, C, D = Rank
FAULTY = [sys.executable, "-m", "tests.support.faulty_party"]
RECONNECT_S, RECV_S = 60, 8
BUSY_S = 30  # what a busy machine adds; with it, still far from RECONNECT_S


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
    settings: Settings = free_settings(recv_s=RECV_S, reconnect_s=RECONNECT_S)
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


def others_end(running: dict[Rank, Process], faulty: Rank, words: str, within_s: float) -> list[str]:
    begin, reasons = time.monotonic(), []
    for rank in set(Rank) - {faulty}:
        _, noise = running[rank].communicate(timeout=within_s + BUSY_S)
        assert running[rank].returncode == 3, noise
        reasons += errors_of(noise)
    assert time.monotonic() - begin < within_s + BUSY_S
    assert len(reasons) == 2
    for line in reasons:
        assert words in line, reasons
    return reasons


PHASES = ("hello", "setup", "context", "question", "decode2")
FAST = [(C, "decode2")]


def each(fast: list[tuple[Rank, str]]) -> list[Any]:
    """Every rank in every phase; slow but for a few."""
    cases = [(rank, phase) for phase in PHASES for rank in Rank]
    return [pytest.param(*case, marks=[] if case in fast else [pytest.mark.slow]) for case in cases]


@pytest.mark.parametrize(("victim", "phase"), each(FAST))
def test_killed(victim: Rank, phase: str, folder: Path, tmp_path: Path) -> None:
    """Nobody waits for a process that is gone as for a connection that may come back."""
    with started() as children:
        running = begin(children, folder, tmp_path, victim, "kill", phase)
        running[victim].wait(timeout=90)
        assert running[victim].returncode == -signal.SIGKILL
        gone = f"lost {victim.label}: its process is gone: nobody listens at 127.0.0.1:"
        others_end(running, victim, gone, GONE_S)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "phase"), each([]))
def test_stalled(victim: Rank, phase: str, folder: Path, tmp_path: Path) -> None:
    """A stopped process keeps its connections: silence is all that the others see of it."""
    with started() as children:
        running = begin(children, folder, tmp_path, victim, "stop", phase)
        pid, flags = os.waitpid(running[victim].pid, os.WUNTRACED)
        assert pid and os.WIFSTOPPED(flags)
        others_end(running, victim, "no word from", RECV_S)


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
        reasons = others_end(running, D, "it is stuck, or slow: then raise timeouts.recv_s", RECV_S)
        assert any("no word from dealer for 8 s" in line for line in reasons)  # who waits for who waits ...
