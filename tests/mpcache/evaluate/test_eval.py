"""`mpcache eval`: its documents, its scores against greedy answers, its gate, and the command itself."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.answer import plain_answer
from mpcache.cost.quality_file import read_quality
from mpcache.demo.documents import load_lines
from mpcache.evaluate.results import Cell, Results, wilson
from mpcache.evaluate.score import EvalModel, Score, Tokens, score
from mpcache.evaluate.secure import CONFIRMED, TOLERANCE
from mpcache.evaluate.sweep import EvalGrid, bind_at_budget, run_sweep, take_sample
from mpcache.evaluate.tasks import ASKED, COPIED, DEPTHS, FACTS, GIVEN, TASKS, TIMES
from mpcache.model import demo_model_dir, load_model
from mpcache.model.prefill import prefill
from mpcache.policy import POLICIES, parse_policy
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report import plots
from mpcache.sampling import Sampling
from tests.support.policy_specs import by_name
from tests.support.processes import CLI, SOON_S, Run, start, started, tiny_model

SHORT = 200  # tokens of a document, for speed
FIELDS = {"task", "policy", "budget_percent", "question", "accuracy", "ci95", "n", "engine"}


@pytest.fixture(scope="module")
def engine() -> EvalModel:
    return EvalModel(load_model(demo_model_dir()))


def grid(*policies: str, task: str = "passkey", **changes: Any) -> EvalGrid:
    options: dict[str, Any] = dict(budgets=(20,), samples=2, seed=0, context=SHORT)
    return EvalGrid((TASKS[task],), ("inside", "after"), policies, **(options | changes))


def words(text: str) -> int:
    return len(re.findall(r"\S+", text))


# ------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_drawn_by_seed(name: str) -> None:
    task = TASKS[name]
    assert task.sample(3, 7, words, 300) == task.sample(3, 7, words, 300)
    others = [task.sample(4, 7, words, 300), task.sample(3, 8, words, 300)]
    assert task.sample(3, 7, words, 300) not in others
    assert words(task.sample(3, 7, words, 300).context) <= 300


def test_passkey_stands_at_its_depth() -> None:
    for i, depth in enumerate(DEPTHS):
        sample = TASKS["passkey"].sample(i, 0, words, 300)
        (turn,) = sample.turns
        lines = sample.context.splitlines()
        place = lines.index(turn.question + turn.answer)
        assert place == round(depth * (len(lines) - 1))
        assert turn.part == f"depth {depth:.2f}"


def test_recall_asks_facts_of_the_document_in_turn() -> None:
    sample = TASKS["recall"].sample(0, 0, words, 300)
    assert len(re.findall(r"^The \w+ of \w+ is \d{4}\.$", sample.context, re.MULTILINE)) == FACTS
    assert len(sample.turns) == ASKED
    said = "".join(turn.question + turn.answer for turn in sample.turns)
    assert set(said.splitlines()) <= set(sample.context.splitlines())
    assert len(set(said.splitlines())) == ASKED


def test_copy_asks_for_words_of_a_verse_of_the_document() -> None:
    sample = TASKS["copy"].sample(0, 0, words, 400)
    (turn,) = sample.turns
    assert sample.context.count(turn.question + turn.answer) == TIMES
    assert (words(turn.question), words(turn.answer)) == (GIVEN, COPIED)


def test_bits_goes_on_with_the_next_verses() -> None:
    sample = TASKS["bits"].sample(0, 0, words, 300)
    (turn,) = sample.turns
    verses = (sample.context + turn.question + turn.answer).splitlines()
    held_out = load_lines("verses.txt")
    first = held_out.index(verses[0])
    whole = [held_out[(first + i) % len(held_out)] for i in range(len(verses))]
    assert verses[:-1] == whole[:-1] and whole[-1].startswith(verses[-1])


def test_a_question_inside_is_the_contexts_end() -> None:
    after = TASKS["recall"].sample(0, 0, words, 300)
    inside = after.inside()
    assert inside.context + inside.turns[0].question == after.context + after.turns[0].question
    assert inside.turns[0].question == " is"
    assert inside.turns[1:] == after.turns[1:]
    assert inside.turns[0].answer == after.turns[0].answer


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(50, 50, 0.9287, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (0, 0, 0.0, 1.0)],
)
def test_wilson(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("spec", ["full", "random", "mpcache:score=bound,share=none"])
def test_a_right_answer_is_what_greedy_decoding_gives(engine: EvalModel, spec: str) -> None:
    """For one question the score is that of the plain engine's own answer, right or wrong."""
    found = set()
    for i in range(4):
        for question in ("inside", "after"):
            task = TASKS["passkey"]
            sample, tokens = take_sample(engine, task, question, grid(), i)
            bound = bind_at_budget(engine, spec, FULL_PERCENT if spec == "full" else 20, len(tokens.context))
            read = engine.read(tokens.context, len(tokens.context))
            (got,) = score(task, engine.session(bound, read), sample, tokens)
            ask, answer, _ = tokens.turns[0]
            greedy = plain_answer(
                engine.model, bound, tokens.context, ask, len(answer), Sampling(), (), "cpu"
            )
            assert (got.right, got.asked) == (int(greedy.ids == answer), 1)
            found.add(got.right)
    assert found == {"full": {1}, "random": {0}}.get(spec, found)


WHOLE = ("full", "pod")  # of which no part can be left out


@pytest.mark.parametrize("spec", by_name(POLICIES))
def test_one_read_context_serves_every_policy(engine: EvalModel, spec: str) -> None:
    """Read with all queries, and used before at another budget: the same logits as by itself."""
    _, tokens = take_sample(engine, TASKS["passkey"], "after", grid(), 0)
    n, (ask, _, _) = len(tokens.context), tokens.turns[0]
    shared, logits = engine.read(tokens.context, n), []
    bound = bind_at_budget(engine, spec, FULL_PERCENT if spec in WHOLE else 40, n)
    if spec not in WHOLE:
        engine.session(bind_at_budget(engine, spec, 20, n), shared).chunk(ask, len(ask))
    for read in (shared, engine.read(tokens.context, bound.window)):
        with torch.no_grad():
            logits.append(engine.session(bound, read).chunk(ask, len(ask)))
    torch.testing.assert_close(logits[0], logits[1])


def test_a_wrong_answer_harms_no_later_one(engine: EvalModel) -> None:
    """With the full cache: later questions are asked after what should have been said."""
    task, (sample, tokens) = TASKS["recall"], take_sample(engine, TASKS["recall"], "after", grid(), 1)
    (ask, answer, size), *later = tokens.turns
    digit = engine.model.tokenizer.encode("7", bos=False)
    other = [answer[0], *(digit if answer[1:2] != digit else answer[2:3]), *answer[2:]]
    assert other != answer
    wrong = Tokens(tokens.context, ((ask, other, size), *later))
    full = bind_at_budget(engine, "full", FULL_PERCENT, len(tokens.context))
    scores = score(task, engine.session(full, engine.read(tokens.context, 0)), sample, wrong)
    assert [s.right for s in scores] == [0, 1, 1, 1]


def test_bits_per_byte_is_the_models_loss(engine: EvalModel) -> None:
    """Teacher-forced through the decode program, against one pass over all of the text."""
    task, (sample, tokens) = TASKS["bits"], take_sample(engine, TASKS["bits"], "after", grid(), 0)
    full = bind_at_budget(engine, "full", FULL_PERCENT, len(tokens.context))
    (got,) = score(task, engine.session(full, engine.read(tokens.context, 0)), sample, tokens)
    ask, answer, size = tokens.turns[0]
    logits = prefill(engine.model, [*tokens.context, *ask, *answer], all_logits=True).logits
    rows = logits[len(tokens.context) + len(ask) - 1 : -1]
    nats = torch.nn.functional.cross_entropy(rows, torch.tensor(answer), reduction="sum")
    assert got.nats == pytest.approx(float(nats), rel=1e-3)
    assert got.asked == len(answer) > 40
    assert size == len(sample.turns[0].answer.encode())
    tally = Cell(task, "after", "full", FULL_PERCENT, scores=[got], attended=9, context=9)
    assert tally.row()["bits_per_byte"] == pytest.approx(got.nats / 0.693147 / size, rel=1e-3)


# -------------------------------------------------------------------------------------------- sweep


def test_a_task_that_the_model_cannot_do_is_not_judged(tmp_path: Path) -> None:
    """A random model: the full cache's row, a note, and no other policy's."""
    results = Results()
    random_model = EvalModel(load_model(tiny_model(tmp_path)))
    run_sweep(random_model, grid("snapkv", context=64), results, lambda text: None)
    assert [(r["policy"], r["question"], r["judged"]) for r in results.rows()] == [
        ("full", "inside", False),
        ("full", "after", False),
    ]
    assert "not judged: the full cache reaches 0 %, at least 95 % is needed" in results.notes[0]


def test_a_budget_that_a_policy_cannot_meet_is_left_out(engine: EvalModel) -> None:
    results = Results()
    run_sweep(engine, grid("quest", budgets=(5, 20)), results, lambda text: None)
    assert {(row["policy"], row["budget_percent"]) for row in results.rows()} == {
        ("full", 100),
        ("quest", 20),
    }
    assert any("left out at 5 %" in note and "quest" in note for note in results.notes)


def test_parts_add_up() -> None:
    scores = [Score("a", 1, 1, 0, 0), Score("a", 0, 1, 0, 0), Score("b", 1, 1, 0, 0)]
    row = Cell(TASKS["passkey"], "after", "full", 100, scores=scores, attended=50, context=200).row()
    assert (row["accuracy"], row["n"], row["parts"]) == (0.6667, 3, {"a": 0.5, "b": 1.0})
    assert row["attended_percent"] == 25


# ------------------------------------------------------------------------------------ the command


SMALL = ["--context", SHORT, "--samples", 2, "--task", "passkey", "--budget", "20"]


def test_json(run_here: Run, tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    flags = ["--policy", "snapkv", "--policy", "mpcache", "--json", "--plot", file]
    code, out, noise = run_here("eval", *SMALL, *flags)
    assert code == 0, noise
    found = json.loads(out)
    assert found["complete"] is True and found["context_tokens"] == SHORT
    rows = found["rows"]
    cells = {(row["policy"], row["budget_percent"], row["question"]) for row in rows}
    assert cells == {
        (*cell, question)
        for cell in (("full", 100), ("snapkv", 20), ("mpcache", 20))
        for question in ("inside", "after")
    }
    for row in rows:
        assert set(row) >= FIELDS
        low, high = row["ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert (row["n"], row["engine"], row["judged"]) == (2, "plain", True)
        assert row["policy"] != "snapkv" or re.fullmatch(r"snapkv:cap=\d+", row["spec"])
        parse_policy(row["spec"])
    drawn = file.read_text()
    assert drawn.startswith("<?xml") and "snapkv" in drawn and "passkey, question after" in drawn
    assert f"demo, documents of {SHORT:,} tokens; bars: 95 %" in drawn
    # The audit reads what this prints.
    saved = tmp_path / "quality.json"
    saved.write_text(out)
    quality = read_quality(saved)
    assert (quality.model, quality.rows, quality.by_question) == ("demo", rows, False)


def test_what_people_see(run_here: Run) -> None:
    code, out, noise = run_here(
        "eval", *SMALL, "--question", "after", "--policy", "mpcache:score=bound,share=none"
    )
    assert code == 0, noise
    assert "passkey, question after, plain engine, n = 2" in out
    assert re.search(r"full .* 100 \(34-100\)", out)
    assert "mpcache:score=bound,share=none" in out
    assert "sample 2 of 2" in noise


@pytest.mark.processes
def test_interrupted_it_keeps_what_is_done() -> None:
    with started() as children:
        flags = ["--task", "passkey", "--samples", 500, "--context", SHORT, "--policy", "snapkv", "--json"]
        children.append(process := start(CLI, "eval", "--question", "after", *flags))
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("full: sample 4 " in line for line in lines)
        process.send_signal(signal.SIGINT)
        out, noise = process.communicate(timeout=SOON_S)
    assert process.returncode == 130
    assert "error: mpcache: stopped by SIGINT" in noise and "Traceback" not in noise
    found = json.loads(out)
    assert found["complete"] is False
    (row,) = found["rows"]
    assert row["policy"] == "full" and 3 <= row["n"] < 500 and row["judged"] is None


BAD = {
    "task": (["--task", "riddle"], "--task 'riddle' is not known; known, with commas: passkey"),
    "task twice": (
        ["--task", "copy,copy"],
        "--task 'copy,copy': give values with commas between them, each once",
    ),
    "question": (["--question", "before"], "--question 'before' is not known"),
    "no such question": (["--task", "bits", "--question", "inside"], "bits is asked after the context only"),
    "budget": (["--budget", "0"], "--budget '0': give whole percents from 1 to 99"),
    "budget text": (["--budget", "5,x"], "give whole percents"),
    "samples": (["--samples", "0"], "--samples is 0; give 1 to 1000000"),
    "seed": (["--seed", "-1"], "--seed is -1"),
    "secure": (["--secure", "-1"], "--secure is -1"),
    "network alone": (["--network", "lan"], "it needs --secure N"),
    "network": (["--network", "slow", "--secure", "1"], "must be none, lan, wan or RTT_MS:MBPS"),
    "policy": (["--policy", "snapvk"], "did you mean snapkv"),
    "impossible": (["--policy", "streaming:sink=900"], "cannot attend to 352 tokens or fewer"),
    "context": (["--context", "2000"], "--context is 2000; the model takes 32 to"),
    "context small": (["--context", "40", "--task", "recall"], "too short for task recall"),
    "model": (["--model", "/no/such"], "/no/such: no such model folder"),
    "plot name": (["--plot", "/tmp/plot.jpg"], "give a name that ends in .svg, .pdf, .png"),
    "plot folder": (["--plot", "/no/such/plot.svg"], "there is no folder /no/such"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, run_here: Run) -> None:
    flags, said = BAD[case]
    code, out, noise = run_here("eval", *flags)
    assert (code, out) == (2, "")
    assert said in noise
    assert re.fullmatch(r"error: .*\n", noise)


def test_a_plot_without_matplotlib(run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    code, out, noise = run_here("eval", "--plot", "/tmp/plot.svg")
    assert (code, out) == (2, "")
    assert noise == "error: --plot needs matplotlib, which is not installed: pip install 'mpcache[plot]'\n"


def test_policies_say_what_they_need(run_here: Run) -> None:
    listed = json.loads(run_here("policies", "--json")[1])["policies"]
    assert {p["name"]: p["needs"] for p in listed} == {name: cls.needs for name, cls in POLICIES.items()}


@pytest.mark.slow
def test_the_parties_give_the_same_answers(run_here: Run) -> None:
    flags = ["--policy", "mpcache:score=bound,share=none", "--secure", 1, "--network", "2:1000", "--json"]
    code, out, noise = run_here("eval", *SMALL, *flags)
    assert code == 0, noise
    rows = [row for row in json.loads(out)["rows"] if row["engine"] == "secure"]
    assert {(row["policy"], row["question"]) for row in rows} == {
        (policy, question)
        for policy in ("full", "mpcache:score=bound,share=none")
        for question in ("inside", "after")
    }
    assert [(row["agreement"], row["n"]) for row in rows] == [(1.0, 1)] * 4
    assert "oracle" not in out


@pytest.mark.slow
def test_the_parties_answer_every_question_of_a_session(run_here: Run) -> None:
    """One after another, each with all that was said before it."""
    flags = ["--task", "recall", "--question", "after", "--samples", ASKED, "--context", 220]
    code, out, noise = run_here("eval", *flags, "--policy", "full", "--secure", 1, "--json")
    assert code == 0, noise
    (secure,) = [row for row in json.loads(out)["rows"] if row["engine"] == "secure"]
    assert (secure["n"], secure["accuracy"], secure["agreement"]) == (ASKED, 1.0, 1.0)
    assert set(secure["parts"]) == {f"question {j + 1}" for j in range(ASKED)}
    assert f"private sample 1 of 1, question {ASKED} of {ASKED}" in noise


@pytest.mark.slow
def test_the_parties_give_the_same_bits_per_byte(run_here: Run) -> None:
    flags = ["--task", "bits", "--samples", 8, "--context", 80, "--policy", "snapkv", "--budget", 40]
    code, out, noise = run_here("eval", *flags, "--secure", 1, "--network", "1:1000", "--json")
    assert code == 0, noise
    found = json.loads(out)
    rows = [row for row in found["rows"] if row["engine"] == "secure"]
    assert {row["policy"] for row in rows} == {"full", "snapkv"}
    for row in rows:
        assert (row["n"], row["agreement"]) == (CONFIRMED, 1.0)
        assert 0 < row["bits_per_byte_off"] <= TOLERANCE < row["bits_per_byte"]
    assert any("which no network slows" in note for note in found["notes"])


def test_a_turn_apart_begins_with_what_was_said() -> None:
    sample = TASKS["recall"].sample(0, 0, words, 300).inside()
    said = ""
    for alone, turn in zip(sample.apart(), sample.turns, strict=True):
        assert alone.context == sample.context
        (only,) = alone.turns
        assert (only.question, only.answer, only.part) == (said + turn.question, turn.answer, turn.part)
        said = only.question + only.answer


def test_chunks_are_what_a_score_takes_in(engine: EvalModel) -> None:
    sample, tokens = take_sample(engine, TASKS["recall"], "after", grid(), 0)
    session = engine.session(
        bind_at_budget(engine, "full", FULL_PERCENT, len(tokens.context)), engine.read(tokens.context, 0)
    )
    taken, chunk = [], session.chunk
    session.chunk = lambda ids, m: taken.append(m) or chunk(ids, m)  # type: ignore
    score(TASKS["recall"], session, sample, tokens)
    assert taken == tokens.chunks()
