"""Parties and commands as processes, as a user starts them, and small things to ask them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import yaml

from mpcache.config import Settings
from mpcache.rank import Rank
from tests.support.paths import ROOT

PARTY, CLI = [sys.executable, "-m", "mpcache_parties"], [sys.executable, "-m", "mpcache"]
# Within which everybody must have ended after something went wrong. It only has to tell an end that has a
# reason from one that a timeout brings: tests set no timeout below 60 s that could end a party, too. A start
# alone is 2 s of processor time for each of three parties, and other tests have the second core.
SOON_S = 30.0

allowed = True  # whether the test that runs now is marked `processes`

Process = subprocess.Popen[str]
Run = Callable[..., tuple[int, str, str]]  # a command: exit code, stdout, stderr


@cache
def tiny_model(folder: Path) -> Path:
    """A random model of 3 layers and 128 positions, as a Hugging Face folder."""
    from tests.support.tiny_models import make, save

    return save(make("llama-gqa"), folder)


def environment() -> dict[str, str]:
    """Return this process's, for one that imports tests from wherever it runs."""
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found)}


def start(command: list[str], *flags: object, stdin: str = "") -> Process:
    """Start a process; stdout and stderr are piped, stdin holds this text and ends."""
    assert allowed, "mark a test that starts processes: @pytest.mark.processes"
    with tempfile.TemporaryFile("w+") as text:
        text.write(stdin)
        text.seek(0)
        return subprocess.Popen(
            [*command, *map(str, flags)],
            cwd=ROOT,
            env=environment(),
            stdin=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextlib.contextmanager
def started() -> Iterator[list[Process]]:
    """Processes put into this list do not outlive the test."""
    children: list[Process] = []
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def write_config(settings: Settings, file: Path) -> Path:
    file.write_text(yaml.safe_dump(settings.model_dump()))
    return file


def errors_of(noise: str) -> list[str]:
    """The error lines of a party's stderr; everything else in it must be about waiting and progress."""
    lines = noise.splitlines()
    assert "Traceback" not in noise, noise
    found = [line for line in lines if line.startswith("error: ")]
    labels = tuple(f"{rank.label}: " for rank in Rank)
    assert all(line.startswith(labels) for line in lines if line not in found), noise
    return found


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_soon(pids: list[int]) -> bool:
    """Whether all of these processes end within SOON_S."""
    limit = time.monotonic() + SOON_S
    while any(map(alive, pids)):
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True
