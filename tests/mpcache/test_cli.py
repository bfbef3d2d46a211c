"""`mpcache` as a user runs it: three real processes, one JSON object, one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.console.inputs import demo_question, read_question, read_text
from mpcache.errors import BadInput
from mpcache.report.account import agreement, p95
from mpcache.report.units import duration, size
from mpcache.sampling import Sampling
from mpcache_parties.launch import PartyFailed
from tests.support.paths import ROOT
from tests.support.processes import CLI, SOON_S, Process, Run, children_of, gone_soon, start, started

TEXT = "and the number of the gate of the city is in the book " * 3


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("document") / "document.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def tiny(folder: Path, document: Path) -> list[object]:
    return ["--model", folder, "--context", document, "--question", "the gate of"]


# ----------------------------------------------------------------------------------- the question


def test_a_question_comes_from_a_flag_a_file_or_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "question.txt"
    file.write_bytes(b"the gate\r\nof\n")
    assert read_question("the gate", None) == "the gate"
    assert read_question(None, file) == "the gate\nof"
    assert read_question(None, None) == demo_question()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the gate\n")))
    assert read_question(None, Path("-")) == "the gate"
    with pytest.raises(BadInput, match="give one of them"):
        read_question("the gate", file)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_question(None, tmp_path / "none.txt")
    file.write_bytes(b"\xff")
    with pytest.raises(BadInput, match="is not a text file in UTF-8"):
        read_question(None, file)
    file.write_text("\n")
    with pytest.raises(BadInput, match="the question is empty"):
        read_question(None, file)


@pytest.mark.parametrize(
    "saved", [b"\xef\xbb\xbfthe gate\nof\n", b"the gate\r\nof\r\n", b"the gate\rof\r", b"the gate\nof\n"]
)
def test_a_text_is_the_same_whoever_saved_it(saved: bytes, tmp_path: Path) -> None:
    """Twice, too: a text that was read is written for the party that needs it, which reads it again."""
    file = tmp_path / "text.txt"
    file.write_bytes(saved)
    assert read_text(file) == "the gate\nof\n"
    assert read_question(None, file) == read_question(saved.decode().rstrip(), None) == "the gate\nof"
    file.write_bytes(b"\xef\xbb\xbf" * 2 + saved)
    assert read_text(file) == "the gate\nof\n"


def test_a_typed_question_is_utf_8_or_one_line() -> None:
    assert read_question("the \u2019gate", None) == "the \u2019gate"
    for text in ("a\udcffb", "a\ud800b"):
        with pytest.raises(BadInput, match="^--question: is not a text in UTF-8"):
            read_question(text, None)


@pytest.mark.processes
@pytest.mark.slow
def test_no_process_shows_the_question(folder: Path, document: Path, tmp_path: Path) -> None:
    """Every command line of the machine, over and over until the answer is there."""
    question = tmp_path / "question.txt"
    question.write_text("the gatekeeper of")
    flags = ["--model", folder, "--context", document, "--max-new-tokens", 2, "--json"]
    process = start(CLI, "generate", *flags, "--question-file", question)
    parties: set[str] = set()
    while process.poll() is None:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                assert "gatekeeper" not in command
                parties |= {command} if "mpcache_parties" in command else set()
        time.sleep(0.05)
    out, noise = process.communicate()
    assert process.returncode == 0, noise
    assert len(json.loads(out)["token_ids"]) == 2
    assert len(parties) >= 3


# ----------------------------------------------------------------------------------- the main job


@pytest.fixture(scope="module")
def demo() -> tuple[dict[str, Any], str]:
    """The demo model on the demo document, policy mpcache: its JSON object, and stderr."""
    process = start(CLI, "generate", "--max-new-tokens", 4, "--json")
    out, noise = process.communicate(timeout=250)
    assert process.returncode == 0, noise
    assert out.count("\n") == 1
    return json.loads(out), noise


def test_a_dry_run_starts_no_party_and_says_so(
    run_here: Run, tiny: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mpcache.inquiry.run_parties", lambda *arguments: pytest.fail("processes were started")
    )
    flags = [
        "--question",
        "the gate of",
        "--policy",
        "full",
        "--max-new-tokens",
        3,
        "--no-stop-at-eos",
        "--plain",
    ]
    code, out, noise = run_here("generate", *tiny, *flags)
    assert code == 0 and "Plaintext" in out and "Private" not in out and "nothing was private" in noise
    code, out, _ = run_here("generate", *tiny, *flags, "--json")
    run = json.loads(out)
    assert run["privacy"] == "none" and len(run["token_ids"]) == 3


@pytest.mark.processes
def test_the_demo_equals_plaintext(demo: tuple[dict[str, Any], str]) -> None:
    run, noise = demo
    assert run["token_ids"] == run["plaintext_token_ids"]
    assert len(run["token_ids"]) == 4
    assert run["text"] == run["plaintext_text"]
    assert (run["policy"], run["protocol"], run["leakage"]) == ("compact", "fast-bits", "model-count")
    assert "Traceback" not in noise


@pytest.mark.processes
def test_the_json_object_is_complete(demo: tuple[dict[str, Any], str]) -> None:
    run, _ = demo
    assert run["context_tokens"] > 500
    assert len(run["kept_tokens"]) == 6
    assert all(0 < kept < run["context_tokens"] for kept in run["kept_tokens"])
    assert run["prefill_ms"] > 0
    assert run["setup_bytes"] > 1_000_000
    private, plain = run["private"], run["plaintext"]
    assert private["ms_per_token"] > plain["ms_per_token"] > 0
    assert isinstance(private["rounds_per_token"], int)
    assert private["rounds_per_token"] > 0
    assert private["offline_bytes_per_token"] > private["online_bytes_per_token"] > 0
    assert len(private["token_ms"]) == 3


@pytest.mark.processes
def test_compare(tiny: list[object], run_here: Run) -> None:
    """Two policies in one run; both equal plaintext, and full sends more than it keeps with mpcache."""
    flags = [*tiny, "--policy", "mpcache", "--policy", "full", "--max-new-tokens", 3, "--json"]
    code, out, noise = run_here("compare", *flags)
    assert code == 0, noise
    runs = json.loads(out)["runs"]
    assert [run["policy"] for run in runs] == ["mpcache", "full"]
    assert [run["agreement"] for run in runs] == [1.0, 1.0]
    assert runs[0]["kept_tokens"] < runs[1]["kept_tokens"]
    for run in runs:
        assert run["private"]["first_token_ms"] > 0
        assert run["private"]["ms_per_token_p95"] >= run["private"]["ms_per_token_median"]


@pytest.mark.processes
def test_what_people_see(tiny: list[object], run_here: Run) -> None:
    # The full cache: on a random model a choice of clusters can be a tie, which noise decides.
    flags = ["--policy", "full", "--max-new-tokens", 3]
    code, out, noise = run_here("generate", *tiny, *flags, "--no-stop-at-eos")
    assert code == 0, noise
    assert out.startswith("Question   the gate of\nPrivate    ")
    private, plain = re.findall(r"^(?:Private|Plaintext)\s+(.*)$", out, re.MULTILINE)
    assert private == plain
    for words in ("Cost card: policy full", "rounds per token", "set-up (once per model)"):
        assert words in out
    assert "server: context of" in noise


@pytest.mark.processes
@pytest.mark.slow
def test_stock(tiny: list[object], run_here: Run) -> None:
    """CrypTen as it is: the same program, the same tokens."""
    flags = ["--protocol", "stock", "--policy", "full", "--max-new-tokens", 2, "--json"]
    code, out, noise = run_here("generate", *tiny, *flags)
    assert code == 0, noise
    run = json.loads(out)
    assert run["protocol"] == "stock"
    assert run["token_ids"] == run["plaintext_token_ids"]


def test_policies(run_here: Run) -> None:
    listed = json.loads(run_here("policies", "--json")[1])["policies"]
    by_name = {policy["name"]: policy for policy in listed}
    assert {"full", "mpcache"} <= set(by_name)
    assert by_name["mpcache"]["leaks"] == "none"
    assert "n_keep" in by_name["mpcache"]["options"]
    shown = run_here("policies")[1]
    for policy in listed:
        assert policy["needs"] and policy["source"]
        said = [policy["name"], policy["leaks"], policy["may_leak"], policy["needs"], *policy["options"]]
        assert all(word in shown for word in " ".join(said).split())
    assert by_name["mpcache"]["may_leak"] == "count with threshold"
    assert (by_name["quest"]["evicts"], by_name["quest"]["selects"]) == (False, True)
    assert "…" not in shown


# ------------------------------------------------------------------------------------ the front door


def test_the_version_is_the_package_s(run_here: Run) -> None:
    code, out, noise = run_here("--version")
    assert (code, noise) == (0, "")
    assert re.fullmatch(r"mpcache (\d+\.\d+\.\d+\S*|.*not installed.*)\n", out)


def test_the_module_is_the_command_and_completes_words() -> None:
    """`python -m mpcache`, asked as bash asks for completions."""
    words = {"_MPCACHE_COMPLETE": "complete_bash", "COMP_WORDS": "mpcache gen", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mpcache"], env=os.environ | words, cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, ["generate"]), done.stderr


# -------------------------------------------------------------------------------------- bad input


BAD = {
    "missing model folder": (["--model", "/no/such"], "/no/such: no such model folder"),
    "folder without a model": (["--model", "/tmp"], "/tmp: no config.json in it"),
    "missing document": (["--context", "/no/text"], "/no/text: cannot be read: No such file or directory"),
    "context too long": (["--max-new-tokens", "2000"], "the model allows 1024; shorten the context"),
    "empty question": (["--question", ""], "the question is empty"),
    "unknown policy": (["--policy", "mpcach"], "did you mean mpcache"),
    "unknown option": (["--policy", "mpcache:nkeep=9"], "no option 'nkeep'"),
    "budget above the context": (
        ["--policy", "mpcache:n_keep=5000"],
        "n_keep=5000 is out of range; allowed: 1 to 880",
    ),
    "no budget": (["--policy", "snapkv:cap=0"], "cap='0' is not allowed; give a count of 1 or more"),
    "no pages": (["--policy", "quest:pages=0.0"], "pages='0.0' is not allowed; give a count of 1 or more"),
    "clusters that do not nest": (
        ["--policy", "mpcache:coarse=30,fine=16"],
        "fine=16 is out of range; allowed: a divisor of coarse, 30",
    ),
    "sharing pairs": (
        ["--policy", "mpcache:share=2-3/5-6"],
        "share=2-3/5-6 is out of range; allowed: default, none, or layers 0 to 5",
    ),
    "left of |": (["--policy", "full|quest"], "full evicts no context; on the left of | may stand"),
    "behind another": (
        ["--policy", "snapkv:cap=64|quest:pages=5"],
        "behind snapkv:cap=64, policy quest: pages=5 is out of range; allowed: 1 to 4",
    ),
    "two rules": (["--policy", "mpcache:threshold=0.1,n_keep=9"], "gives counts that are decided later"),
    "threshold": (["--policy", "mpcache:threshold=2.0"], "threshold=2.0 is out of range; allowed: 0 to 1"),
    "unknown protocol": (["--protocol", "slow"], "public.protocol is 'slow'"),
    "network": (["--network", "slow"], "must be none, lan, wan or RTT_MS:MBPS"),
    "no bandwidth": (
        ["--network", "10:0"],
        "public.network is '10:0': must be none, lan, wan or RTT_MS:MBPS",
    ),
    "temperature": (["--temperature", "-1"], "--temperature is -1; give 0"),
    "missing config": (["--config", "/no/config.yaml"], "/no/config.yaml: cannot be read"),
    "unknown flag": (["--bogus"], "No such option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before any process is started."""
    monkeypatch.setattr(
        "mpcache.inquiry.run_parties", lambda *arguments: pytest.fail("processes were started")
    )
    flags, words = BAD[case]
    code, out, noise = run_here("generate", *flags)
    assert (code, out) == (2, "")
    assert words in noise
    assert case == "unknown flag" or re.fullmatch(r"error: .*\n", noise)


def begun(process: Process) -> list[int]:
    """Wait until the answer has begun; the party processes."""
    assert process.stdout is not None
    while (line := process.stdout.read(1)) != "P":  # of "Private"
        assert line, process.communicate()[1]
    pids = children_of(process.pid)
    assert len(pids) == 3
    return pids


@pytest.mark.processes
def test_a_broken_checkpoint_is_the_servers_error(
    folder: Path, document: Path, tmp_path: Path, run_here: Run
) -> None:
    """What only the server's process finds out comes back as one line, with its exit code."""
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-64] if file.suffix == ".safetensors" else content)
    code, out, noise = run_here(
        "generate",
        "--model",
        tmp_path,
        "--context",
        document,
        "--question",
        "the gate",
        "--max-new-tokens",
        2,
    )
    assert (code, out) == (2, "Question   the gate\n")
    (line,) = (line for line in noise.splitlines() if line.startswith("error: "))
    assert "cannot be read as safetensors" in line
    assert "Traceback" not in noise


@pytest.mark.processes
@pytest.mark.parametrize(
    "how", [*(pytest.param(how, marks=pytest.mark.slow) for how in ("party", "parent")), "interrupt"]
)
def test_no_process_is_left_behind(how: str, tiny: list[object]) -> None:
    """A killed party ends the run; a killed parent, or Ctrl-C, ends the parties."""
    with started() as children:
        flags = ["--max-new-tokens", 25, "--no-stop-at-eos", "--policy", "full"]
        children.append(start(CLI, "generate", *tiny, *flags))
        parent = children[0]
        pids = begun(parent)
        begin = time.monotonic()
        match how:
            case "party":
                os.kill(pids[1], signal.SIGKILL)
                code, words = 1, r"error: the \w+ process \(rank \d\) was ended by SIGKILL"
            case "parent":
                parent.kill()
                code, words = -signal.SIGKILL, ""
            case _:
                parent.send_signal(signal.SIGINT)
                code, words = 130, "error: mpcache: stopped by SIGINT"
        _, noise = parent.communicate(timeout=SOON_S)
        assert gone_soon(pids)
        assert time.monotonic() - begin < SOON_S
        assert parent.returncode == code
        assert re.search(words, noise)
        assert "Traceback" not in noise
        assert noise.count("error: ") == (how != "parent")


# ------------------------------------------------------------------------------------ small parts


def test_sampling() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert Sampling().chooser()(logits) == 1
    draw = Sampling(temperature=1.0, seed=3).chooser()
    drawn = [draw(logits) for _ in range(300)]
    again = Sampling(temperature=1.0, seed=3).chooser()
    assert drawn == [again(logits) for _ in range(300)]
    assert set(drawn) >= {0, 1, 2}
    assert abs(drawn.count(1) / 300 - torch.softmax(logits, -1)[1].item()) < 0.1
    few = Sampling(temperature=1.0, top_p=0.9).chooser()
    assert {few(logits) for _ in range(100)} == {1, 2}
    alone = Sampling(temperature=5.0, top_p=1e-9).chooser()
    assert {alone(logits) for _ in range(20)} == {1}


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}])
def test_sampling_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="^--"):
        Sampling(**values)


def test_figures() -> None:
    assert [size(n) for n in (0, 999, 1234, 12_345_678, 5e9)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "12.3 MB",
        "5 GB",
    ]
    assert [duration(n) for n in (4.321, 123.4, 1234.5)] == ["4.32 ms", "123 ms", "1.23 s"]
    assert p95(range(1, 101)) == 95
    assert p95([7.0]) == 7.0
    assert agreement([1, 2, 3], [1, 2]) == pytest.approx(2 / 3)
    assert agreement([], []) == 1.0
    assert PartyFailed("x", 3).exit_code == 3
