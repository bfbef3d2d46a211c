"""`mpcache eval` of a model that chats: its documents, one pass against many steps, its gate and its rows."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from mpcache.cost.quality_file import Quality
from mpcache.demo.documents import make_document
from mpcache.errors import BadInput, PolicyError
from mpcache.evaluate.chat_score import Talk, acts_between_steps, greedy_tokens, make_talk, score_talks
from mpcache.evaluate.chat_sweep import ChatSweep
from mpcache.evaluate.chat_tasks import ALONE, CHAT_TASKS, PEOPLE
from mpcache.evaluate.results import Results
from mpcache.evaluate.score import EvalModel
from mpcache.evaluate.secure_chat import confirm_talks
from mpcache.evaluate.sweep import EvalGrid, bind_at_budget
from mpcache.evaluate.tasks import DEPTHS, Sample, Task, TaskTurn
from mpcache.model import demo_model_dir, load_model
from mpcache.model.framing import RawFraming
from mpcache.policy import parse_policy
from mpcache.policy.plan import FULL_PERCENT

TOKENS = 200  # of a document, for speed


@pytest.fixture(scope="module")
def engine() -> EvalModel:
    return EvalModel(load_model(demo_model_dir()))


def words(text: str) -> int:
    return len(re.findall(r"\S+", text))


def facts(rng: random.Random, count_tokens: Callable[[str], int], context: int, i: int) -> Sample:
    """Two facts that the demo model answers, and one that stands nowhere."""
    text, pairs = make_document(rng, count_tokens, context, 2)
    turns = [TaskTurn("\n", answer, "there", question) for question, answer in pairs]
    return Sample(text, (*turns, TaskTurn("\n", " 0000.", "nowhere", "The gate of Nobody is")))


APART = Task("facts", "", facts, 48, 3, chat=True, apart=True)
IN_TURN = Task("turns", "", facts, 48, 3, chat=True)


def sweep(engine: EvalModel, *policies: str, **changes: Any) -> ChatSweep:
    options: dict[str, Any] = dict(
        tasks=(APART, IN_TURN), questions=("after",), budgets=(20,), samples=6, seed=0
    )
    grid = EvalGrid(**(options | {"policies": policies, "context": TOKENS} | changes))
    framing = RawFraming(engine.model.tokenizer, engine.model.shape)
    return ChatSweep(engine, framing, grid, "question", Results())


# -------------------------------------------------------------------------------------------- tasks


def test_all_tasks_ask_about_one_document() -> None:
    samples = {name: task.sample(3, 7, words, 400) for name, task in CHAT_TASKS.items()}
    assert len({sample.context for sample in samples.values()}) == 1
    assert samples["facts"] != CHAT_TASKS["facts"].sample(3, 8, words, 400)
    lines = samples["facts"].context.splitlines()
    asked = [turn for name in ("facts", "turns", "passkey") for turn in samples[name].turns]
    assert len({turn.lead for turn in asked}) == PEOPLE + 1
    assert len(samples["facts"].turns) == ALONE
    for turn in asked:
        assert turn.lead + turn.answer in lines
    for turn in samples["quotes"].turns:
        assert turn.lead + turn.answer in samples["quotes"].context
    assert words(samples["facts"].context) <= 400


def test_the_number_stands_at_its_depth() -> None:
    for i, depth in enumerate(DEPTHS):
        (turn,) = (sample := CHAT_TASKS["passkey"].sample(i, 0, words, 400)).turns
        assert turn.part == f"depth {depth:.2f}"
        place = sample.context.splitlines().index(turn.lead + turn.answer)
        assert place / (len(sample.context.splitlines()) - 1) == pytest.approx(depth, abs=0.25)


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("spec", ["full", "compact", "snapkv", "compact:counts=joint,refit=none"])
def test_one_pass_says_what_many_steps_say(engine: EvalModel, spec: str, monkeypatch: Any) -> None:
    asked = sweep(engine)
    (reading,) = asked.document(1)
    talks = [talk for _, talk in reading.talks]
    read = engine.read(reading.context, len(reading.context))
    percent = FULL_PERCENT if spec == "full" else 40
    bound = bind_at_budget(engine, spec, percent, len(reading.context))
    at_once = score_talks(engine, bound, read, talks)
    monkeypatch.setattr("mpcache.evaluate.chat_score.acts_between_steps", lambda policy: True)
    assert score_talks(engine, bound, read, talks) == at_once
    if spec == "full":
        assert at_once == [[True], [True], [False], [True, True, False]]


@pytest.mark.parametrize(
    ("spec", "acts"),
    [("full", False), ("compact", False), ("snapkv", False), ("streaming", True), ("h2o", True),
     ("tova", True), ("quest", True), ("mpcache", True), ("snapkv|quest", True), ("oracle", False)],
)  # fmt: skip
def test_what_evicts_on_the_way_is_asked_step_by_step(spec: str, acts: bool) -> None:
    assert acts_between_steps(parse_policy(spec)) is acts


def test_a_question_inside_is_the_contexts_end(engine: EvalModel) -> None:
    framing = RawFraming(engine.model.tokenizer, engine.model.shape)
    talk = make_talk(framing, [TaskTurn("Who is it?", " me.", "p", "It is")])
    context, rest = talk.moved([1, 2])
    assert context + list(rest.ids) == [1, 2, *talk.ids]
    assert len(context) == 2 + talk.first - 1
    ((begin, end),), ((first, last),) = rest.spans, talk.spans
    assert rest.ids[begin:end] == talk.ids[first:last]
    assert engine.model.tokenizer.decode(list(rest.ids[begin:end])).strip() == "me."


# -------------------------------------------------------------------------------------------- sweep


def test_only_what_the_full_cache_answers_is_judged(engine: EvalModel) -> None:
    kept = []
    asked = sweep(engine, "compact", "random", "compact:keep=0.4|quest")
    asked.kept = lambda: kept.append(len(asked.results.rows()))
    said: list[str] = []
    asked.run(said.append)
    rows = {(row["task"], row["policy"]): row for row in asked.results.rows()}
    assert asked.documents == len(kept) == 1
    assert (rows["facts", "full"]["n"], rows["facts", "full"]["answers"]) == (3, "110")
    assert rows["facts", "compact"]["n"] == rows["turns", "compact"]["n"] == 2
    assert (rows["all", "compact"]["n"], rows["all", "compact"]["accuracy"]) == (4, 1.0)
    assert rows["all", "random"]["accuracy"] < 1
    assert rows["facts", "compact"]["spec"] == "compact:keep=39"
    assert rows["facts", "compact:keep=0.4|quest"]["attended_percent"] <= 20
    assert "compact at 20 %" in said[1] and "left" in said[1]
    quality = Quality(asked.results.rows(), by_question=True)
    assert quality.kept()["compact", 20] == {"facts": 1.0, "turns": 1.0}


def test_a_gate_by_task_leaves_out_what_the_model_cannot_do(engine: EvalModel) -> None:
    asked = sweep(engine, "compact", samples=3, tasks=(APART,))
    asked.gate = "task"
    asked.run(lambda text: None)
    rows = asked.results.rows()
    assert [(row["policy"], row["n"], row["judged"]) for row in rows] == [
        ("full", 3, False),
        ("compact", 3, False),
    ]
    assert "not judged: the full cache reaches 67 %" in asked.results.notes[0]


def test_greedy_tokens_are_right_where_the_answer_is(engine: EvalModel) -> None:
    asked = sweep(engine)
    context, talk = next(asked.talks(IN_TURN, "after"))
    read = engine.read(context, len(context))
    bound = bind_at_budget(engine, "full", FULL_PERCENT, len(context))
    assert sum(talk.chunks) == talk.spans[-1][1] - 1 and len(talk.chunks) == sum(e - b for b, e in talk.spans)
    said = greedy_tokens(engine.session(bound, read), talk)
    right = [mine == list(talk.ids[b:e]) for mine, (b, e) in zip(said, talk.spans, strict=True)]
    assert [right] == score_talks(engine, bound, read, [talk])


@pytest.mark.slow
def test_the_parties_say_what_the_plain_engine_says(engine: EvalModel) -> None:
    asked = sweep(engine, "compact", "oracle", samples=3, tasks=(APART,), questions=("after", "inside"))
    asked.run(lambda text: None)
    confirm_talks(asked, 1, "lan", lambda text: None)
    rows = [row for row in asked.results.rows() if row["engine"] == "secure" and row["task"] == "facts"]
    assert [(row["policy"], row["question"]) for row in rows] == [
        ("full", "after"), ("compact", "after"), ("full", "inside"), ("compact", "inside")
    ]  # fmt: skip
    assert all((row["n"], row["agreement"]) == (1, 1.0) for row in rows)
    assert rows[1]["spec"] == "compact:keep=39"
    assert "one process" in asked.results.notes[0] and "oracle: runs in plaintext" in asked.results.notes[1]


def test_a_document_beyond_the_model_is_refused(engine: EvalModel) -> None:
    with pytest.raises(BadInput, match="the model allows 1024; lower --context, which is 1020"):
        sweep(engine, context=1020).document(0)


def test_an_answer_that_the_tokenizer_joins_to_what_is_given_is_refused(engine: EvalModel) -> None:
    framing = RawFraming(engine.model.tokenizer, engine.model.shape)
    with pytest.raises(BadInput, match="joins what is given"):
        make_talk(framing, [TaskTurn("Who?", "ng of", "p", "the ki")])


# ------------------------------------------------------------------------------ budgets of a choice


@pytest.mark.parametrize("then", ["quest", "mpcache:score=bound,share=none"])
def test_a_choice_behind_heads_that_differ_keeps_to_its_budget(engine: EvalModel, then: str) -> None:
    shape, spec = engine.model.shape, f"compact:keep=0.4|{then}"
    for percent in (15, 20, 40):
        bound = bind_at_budget(engine, spec, percent, 800)
        counts = bound.count_from_model(engine.model)
        attended = bound.with_counts(counts, shape).plan.tokens_attended(shape.kv_heads)
        assert 0.8 * percent <= 100 * attended / 800 <= percent
    with pytest.raises(PolicyError, match="cannot attend to"):
        bind_at_budget(engine, spec, 1, 800)


def test_talks_hold_the_places_that_judge() -> None:
    assert Talk((5, 6, 7, 8), ((2, 4),), ("p",)).judged == [[1, 2]]
