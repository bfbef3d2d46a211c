"""How a command begins: signals in its imports, and streams that are closed, full or of another encoding."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import CLI, PARTY, environment, started

pytestmark = pytest.mark.processes

ANSWER = ("generate", "--policy", "full", "--max-new-tokens", "2", "--no-stop-at-eos")


def shell(line: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell, in which "$@" is the given command."""
    return subprocess.run(
        ["bash", "-c", line, "bash", *map(str, arguments)],
        cwd=ROOT, env=environment() | more, stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    document = tmp_path_factory.mktemp("document") / "document.txt"
    document.write_text("and the number of the gate of the city is in the book")
    return ["--model", folder, "--context", document]


# ---------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("command", [[*CLI, "policies"], [*PARTY, "--rank", "2"]], ids=["mpcache", "party"])
@pytest.mark.parametrize(
    "seconds", [0.3, 1.0, *(pytest.param(later, marks=pytest.mark.slow) for later in (0.6, 1.6))]
)
def test_a_signal_at_any_moment_is_one_line(command: list[str], seconds: float) -> None:
    """Imports take about two seconds of this."""
    with started() as children:
        children.append(
            process := subprocess.Popen(
                command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, noise = process.communicate(timeout=60)
        if process.returncode == 0:
            pytest.skip("it had ended")
        errors = [line for line in noise.splitlines() if "waiting for" not in line]
        assert process.returncode == 130, noise
        assert len(errors) == 1 and errors[0].startswith("error: ")
        assert errors[0].endswith("stopped by SIGINT")


def test_a_signal_that_the_caller_ignores_is_ignored(tmp_path: Path) -> None:
    """The command nohup starts it so; the other signals end it as ever."""
    config = tmp_path / "two.yaml"
    config.write_text("addresses:\n  server: 127.0.0.1:1\n  dealer: 127.0.0.1:2\n")  # where nobody listens
    with started() as children:
        children.append(
            process := subprocess.Popen(
                [
                    "bash",
                    "-c",
                    'trap "" HUP; exec "$@"',
                    "bash",
                    *PARTY,
                    "--rank",
                    "1",
                    "--config",
                    str(config),
                    "--connect-timeout",
                    "60",
                ],
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
        assert process.stderr is not None
        assert "waiting for" in process.stderr.readline()
        process.send_signal(signal.SIGHUP)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[1] == "error: client: stopped by SIGTERM\n"
        assert process.returncode == 143


# ---------------------------------------------------------------------------------------- streams


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_closed_stream_is_ordinary(closed: str, tiny: list[object]) -> None:
    """A stderr that takes nothing, too: there is only less to be seen."""
    done = shell(f'"$@" {closed}', *CLI, *ANSWER, *tiny, "--question", "the gate", "--json")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"error" not in done.stderr
    assert closed.startswith((">", "<&- >")) or b'"token_ids"' in done.stdout


def test_a_full_stdout_is_one_line() -> None:
    done = shell('"$@" > /dev/full', *CLI, "policies")
    assert done.returncode == 1
    assert done.stderr.endswith(b"No space left on device; free some space, or give another folder\n")
    assert done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"error: ")


def test_nobody_who_reads_is_no_error() -> None:
    done = shell('"$@" | head -1; exit ${PIPESTATUS[0]}', *CLI, "policies")
    assert done.stderr == b""


@pytest.mark.slow
def test_an_encoding_without_a_character_shows_the_answer(tiny: list[object]) -> None:
    """The question is shown, too, and a table; what cannot be written is spelt."""
    question = ("--question", "the \u2019gate\u2019 of \u4eba")
    encodings = {
        "ascii": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        "latin-1": {"PYTHONIOENCODING": "latin-1"},
        "the caller's way": {"PYTHONIOENCODING": "ascii:replace"},
    }
    for name, more in encodings.items():
        done = shell('"$@"', *CLI, *ANSWER, *tiny, *question, **more)
        assert done.returncode == 0, done.stderr
        shown = b"the ?gate? of ?" if "caller" in name else rb"the \u2019gate\u2019 of \u4eba"
        assert shown in done.stdout.splitlines()[0]
        assert b"Private" in done.stdout and b"Cost card" in done.stdout


def test_what_libraries_print_is_not_on_stdout() -> None:
    """`MKL_VERBOSE=1` writes to stdout what belongs to nobody's JSON."""
    program = (
        "import os; from mpcache.console.start import begin; begin('x'); os.write(1, b'noise'); print('mine')"
    )
    done = shell('"$@"', CLI[0], "-c", program)
    assert (done.stdout, done.stderr) == (b"mine\n", b"noise")


def test_a_closed_stream_keeps_its_number() -> None:
    """Else the next file to be opened is what a library prints into."""
    program = (
        "from mpcache.console.start import begin; begin('x'); import os, sys; f = open(os.devnull); "
        "os.write(2, str((f.fileno() > 2, os.get_inheritable(0))).encode())"
    )
    assert shell('"$@" <&- >&-', CLI[0], "-c", program).stderr == b"(True, True)"
