"""`mpcache chat`: lines in, answers out; and a conversation with a real model about the clinic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpcache.demo import DEMO
from tests.support.processes import CLI, Run, start, started
from tests.support.real_model import real_model

DOCUMENT = "The code of the red gate is 4921. The code of the blue gate is 7035.\n"


@pytest.mark.slow
@pytest.mark.processes
def test_each_line_is_a_question_of_one_session(tmp_path: Path) -> None:
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    flags = ["--context", file, "--policy", "full", "--max-new-tokens", 3]
    with started() as children:
        children.append(
            start(CLI, "chat", *flags, "--json", stdin="The code of the red gate is\n\n and of\n")
        )
        out, noise = children[0].communicate(timeout=120)
    assert children[0].returncode == 0, noise
    run = json.loads(out)
    assert [turn["number"] for turn in run["turns"]] == [1, 2]
    assert all(len(turn["token_ids"]) == 3 for turn in run["turns"])
    assert run["account"]["rounds"] == sum(turn["rounds"] for turn in run["turns"])


@pytest.mark.slow
@pytest.mark.processes
def test_a_real_model_is_understood_and_understands() -> None:
    """What the README shows: the second question means nothing without the first turn's page."""
    flags = ["--context", DEMO / "clinic.txt", "--policy", "full", "--max-new-tokens", 24]
    asked = "Who is the director?\nAnd how many beds are there?\n"
    with started() as children:
        children.append(start(CLI, "chat", "--model", real_model(), *flags, stdin=asked))
        out, noise = children[0].communicate(timeout=900)
    assert children[0].returncode == 0, noise
    first, second = re.split(r"^> ", out, flags=re.M)[1:]
    assert "Maria Keller" in first and "42" in second
    assert len(re.findall(r"\d+ tokens in .* rounds, .* from the dealer", noise)) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_a_real_models_private_answer_is_the_plain_one() -> None:
    """48 tokens, each of them the same."""
    flags = ["--context", DEMO / "clinic.txt", "--policy", "full", "--max-new-tokens", 48, "--no-stop-at-eos"]
    asked = ["--question", "What should a visitor know?", "--json"]
    with started() as children:
        children.append(start(CLI, "generate", "--model", real_model(), *flags, *asked))
        out, noise = children[0].communicate(timeout=1800)
    assert children[0].returncode == 0, noise
    run = json.loads(out)
    assert len(run["token_ids"]) == 48 and run["token_ids"] == run["plaintext_token_ids"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--identity", "keys"], "give --config, and nothing of theirs"),
        (["--identity", "keys", "--config", "x.yaml", "--policy", "full"], "nothing of theirs"),
        (["--stop", ""], "--stop is empty"),
        (["--temperature", "-1"], "--temperature is -1"),
    ],
)
def test_what_does_not_go_together(flags: list[str], words: str, run_here: Run) -> None:
    code, out, noise = run_here("chat", *flags)
    assert (code, out) == (2, "") and words in noise
