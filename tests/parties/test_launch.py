"""Three processes on this machine: whatever they print or import, the one that started them ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpcache.config import Settings
from mpcache.rank import Rank
from mpcache_parties import launch
from mpcache_parties.launch import PartyFailed, run_parties
from tests.support.processes import CLI, SOON_S, environment

pytestmark = pytest.mark.processes

FLAGS = ("--question", "the gate of", "--policy", "full", "--max-new-tokens", "2", "--json")

TEXTS = {Rank.SERVER: "the gate of", Rank.CLIENT: "the gate"}
NOISE = {
    "no event": b"Intel MKL VERBOSE: on\n",
    "no text": b"\xff\xfe\x00\n\x80",
    "JSON that is no event": b'7\n[]\n{}\n{"event": "say"}\n{"event": "token", "id": "x"}\nnull\n',
    "a report that is none": b'{"event": "report", "report": {}}\n',
    "an endless number": b"1" * 5000 + b"\n",
    "deep JSON": b"[" * 100_000 + b"\n",
}


def shell(line: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line, "bash", *map(str, arguments)],
        env=environment() | more, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def generate(model: Path, document: Path, cwd: Path, **more: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*CLI, "generate", "--model", str(model), "--context", str(document), *FLAGS],
        env=environment() | more, cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("document") / "document.txt"
    file.write_text("and the number of the gate of the city is in the book")
    return file


@pytest.mark.parametrize("case", NOISE)
def test_whatever_a_child_prints_the_run_ends(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(f"import sys\nsys.stdout.buffer.write({NOISE[case]!r})\n")
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, str(child)))
    said: list[str] = []
    with pytest.raises(PartyFailed, match=r"process \(rank \d\) failed"):
        run_parties(Settings(), {}, TEXTS, said.append, lambda token, text: None)
    assert all(line.startswith(tuple(rank.label for rank in Rank)) for line in said)


@pytest.mark.parametrize("code", ["os.close(1); time.sleep(60)", "os.fork() or time.sleep(15)"])
def test_an_open_or_closed_stdout_keeps_no_parent(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that lives on without its stdout, and one that is gone while another holds it."""
    child = tmp_path / "child.py"
    child.write_text(f"import os, time\n{code}\n")
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, str(child)))
    monkeypatch.setattr(launch, "GONE_S", 1.0)
    begin = time.monotonic()
    with pytest.raises(PartyFailed):
        run_parties(Settings(), {}, TEXTS, lambda text: None, lambda token, text: None)
    assert time.monotonic() - begin < SOON_S


@pytest.mark.slow
def test_libraries_that_print_do_not_disturb_the_answer(folder: Path, document: Path, tmp_path: Path) -> None:
    """They print before this project's code runs and while it does; in C, as MKL_VERBOSE makes MKL do."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, threading\n"
        "def shout():\n"
        "    while True:\n"
        "        os.write(1, b'noise ')\n"
        "        threading.Event().wait(0.02)\n"
        "if 'mpcache_parties' in sys.orig_argv:\n"
        "    os.write(1, b'begin\\n\\xff\\n')\n"
        "    import mpcache_parties.process as process\n"
        "    own = process.own_stdout\n"
        "    def later(*given):\n"
        "        found = own(*given)\n"
        "        threading.Thread(target=shout, daemon=True).start()\n"
        "        return found\n"
        "    process.own_stdout = later\n"
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    code, out, noise = generate(folder, document, tmp_path, PYTHONPATH=path, MKL_VERBOSE="1")
    assert code == 0, noise
    assert len(json.loads(out)["token_ids"]) == 2
    assert "server: begin" in noise and "noise noise" in noise


@pytest.mark.slow
def test_the_parties_import_what_is_installed(folder: Path, document: Path, tmp_path: Path) -> None:
    """Not what lies in the folder that the command runs in, whoever wrote it."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('a foreign yaml')\n")
    done = subprocess.run(
        [CLI[0], "-P", *CLI[1:], "generate", "--model", str(folder), "--context", str(document), *FLAGS],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "foreign" not in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('F=$1 M=$2; shift 2; "$@" --model "$M" --context <(cat "$F")', marks=pytest.mark.slow),
        pytest.param('F=$1 M=$2; shift 2; "$@" --model "$M" --context - < "$F"', marks=pytest.mark.slow),
        pytest.param(
            "F=$1 M=$2; shift 2; "
            'cat "$F" | "$@" --model "$M" --context /dev/stdin --config <(echo "public: {}")',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_document_is_read_once(line: str, folder: Path, document: Path) -> None:
    """It may come through a pipe, which holds it once."""
    done = shell(line, document, folder, *CLI, "generate", *FLAGS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    code, out, _ = generate(folder, document, document.parent)
    assert code == 0 and found["token_ids"] == json.loads(out)["token_ids"]
    assert found["context_tokens"] == json.loads(out)["context_tokens"]


@pytest.mark.slow
def test_a_config_is_read_once_by_compare(folder: Path, document: Path) -> None:
    line = '"$@" --config <(echo "public: {max_new_tokens: 2}")'
    flags = ("--model", folder, "--context", document, "--question", "the gate", "--json")
    done = shell(line, *CLI, "compare", *flags, "--policy", "full", "--policy", "streaming")
    assert done.returncode == 0, done.stderr
    assert [len(run["token_ids"]) for run in json.loads(done.stdout)["runs"]] == [2, 2]


def test_stdin_holds_one_text(folder: Path) -> None:
    done = shell('"$@"', *CLI, "generate", "--context", "-", "--question-file", "-")
    assert (done.returncode, done.stderr) == (
        2,
        "error: stdin (-) holds one text; give the other one in a file\n",
    )


def test_a_system_that_refuses_files_is_one_line(folder: Path, document: Path) -> None:
    """No temporary folder: each candidate is tried with a small file, which may not grow here."""
    flags = ("--model", folder, "--context", document)
    done = shell('ulimit -f 0; "$@"', *CLI, "generate", *flags, *FLAGS)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no temporary folder can be made: No usable temporary directory found")
    assert last.endswith("set TMPDIR to a folder that can be written") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_name_that_the_system_refuses_is_one_line() -> None:
    """As a folder does that cannot be entered, on a file system's own terms: here a name that is too long."""
    long = "a" * 300
    for flags in (
        ["generate", "--model"],
        ["generate", "--context"],
        ["audit", "--shape"],
        ["audit", "--csv"],
    ):
        done = shell('"$@"', *CLI, *flags, long)
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("error: ") and "File name too long" in done.stderr
        assert done.stderr.count("\n") == 1
