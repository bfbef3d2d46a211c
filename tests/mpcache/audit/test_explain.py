"""The formulas of `mpcache audit --explain` against the cost engine, at sizes they were not made from."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from mpcache.audit.audit_shapes import shape_of
from mpcache.audit.explain import Explained, StepReading, explained, read_step
from mpcache.audit.explain_text import explain_policy, explained_policy, merged
from mpcache.audit.formula import Names, evaluate_formula, modulus, pairs, solve, total
from mpcache.cost.pricing import price
from mpcache.policy import POLICIES
from tests.support.priced_shapes import GPT, LLAMA

SECURE = [name for name, cls in POLICIES.items() if not cls.plain_only]
QUICK = ["full", "mpcache", "h2o"]
SPECS = [spec if spec in QUICK else pytest.param(spec, marks=pytest.mark.slow) for spec in SECURE]
SPECS.append(pytest.param("mpcache:score=bound,share=none", marks=pytest.mark.slow))
SHAPES = {"gqa": LLAMA, "gpt": GPT}
FIRST = 220, 5  # context and question in tokens
DUEL = 240, 5
# Others, at which the program is read only; a policy forms a block at some of them and not at others.
OTHERS = [(301, 2), (333, 9), (230, 3), (411, 7), (222, 5), (218, 5), (236, 5)]


@cache
def plan_of(kind: str, spec: str) -> Explained:
    return explained(SHAPES[kind], spec, *first_of(spec), "fast")


def first_of(spec: str) -> tuple[int, int]:
    """Of cascade's steps one in which a token duels, as it does in most."""
    return DUEL if spec == "cascade" else FIRST


def bytes_of(reading: StepReading) -> dict[object, tuple[Counter[str], int]]:
    """By step: what is opened for each reason, and what the dealer sends."""
    found: dict[object, tuple[Counter[str], int]] = {}
    for key, said in reading.steps.items():
        opened: Counter[str] = Counter()
        for seen in said.opened:
            opened[f"{seen.why} to {seen.to}"] += seen.bytes
        found[key] = opened, sum(seen.bytes for seen in said.dealt)
    return found


@pytest.mark.parametrize("kind", ["gqa", pytest.param("gpt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", SPECS)
def test_formulas_hold_at_other_sizes(spec: str, kind: str) -> None:
    plan = plan_of(kind, spec)
    form = read_step(SHAPES[kind], spec, *first_of(spec), "fast").form
    readings = [read_step(SHAPES[kind], spec, *sizes, "fast") for sizes in OTHERS]
    alike = [reading for reading in readings if reading.form == form]
    assert len(alike) >= 2
    for reading in alike:
        there = bytes_of(reading)
        assert list(plan.steps) == list(there)
        for key, step in plan.steps.items():
            sizes = {**reading.symbols[key[0]], **reading.steps[key].symbols}
            opened: Counter[str] = Counter()
            for line in step.opened:
                assert line.formula is not None, (key, line)
                opened[f"{line.why} to {line.to}"] += line.times * evaluate_formula(line.formula, sizes)
            assert step.offline is not None, key
            assert (opened, evaluate_formula(step.offline, sizes)) == there[key], (
                reading.bound.plan.context,
                key,
            )


@pytest.mark.parametrize("spec", ["full", "mpcache", "h2o"])
def test_steps_are_those_of_the_cost_engine(spec: str) -> None:
    """The same bytes and rounds as the reading that equals the parties' ledgers."""
    plan = plan_of("gqa", spec)
    (phase,) = (price(LLAMA, spec, *FIRST).phases["decode1"],)
    for (layer, name), step in plan.steps.items():
        tally = phase[f"layer{layer}/{name}" if layer is not None else name]
        assert step.rounds == tally.rounds
        assert step.offline_bytes == tally.offline
        both = sum(line.bytes * line.times for line in step.opened if line.to == "both")
        one_way = sum(line.bytes * line.times for line in step.opened if line.to != "both")
        assert tally.server_sent + tally.client_sent == 2 * both + one_way


@pytest.mark.parametrize("spec", ["mpcache", "delta"])
def test_formulas_for_this_models_heads_only_say_so(spec: str) -> None:
    lines = list(explain_policy(LLAMA, spec, *FIRST, "fast"))
    assert any("formulas hold for this model's" in line for line in lines) == (spec == "delta")


def test_data_and_lines_tell_the_same() -> None:
    """Each layer's steps, rounds and bytes are in the groups, once."""
    found = explained_policy(LLAMA, "mpcache:share=1-2", *FIRST, "fast")
    plan = explained(LLAMA, "mpcache:share=1-2", *FIRST, "fast")
    told = {
        (layer, step["step"]): (
            step["rounds"],
            step["offline_bytes"],
            sum(o["bytes"] for o in step["opened"]),
        )
        for step in found["steps"]
        for layer in step["layers"] or [None]
    }
    assert told == {
        key: (s.rounds, s.offline_bytes, sum(o.bytes * o.times for o in s.opened))
        for key, s in plan.steps.items()
    }
    assert len(found["steps"]) < len(plan.steps) / 2
    names = [step["step"] for step in found["steps"]]
    assert names.index("select/coarse") < names.index("softmax") < names.index("o") < names.index("down")


def test_merged_keeps_each_order() -> None:
    orders = [["a", "c", "d"], ["a", "b", "c"], ["e", "d"]]
    found = merged(orders)
    assert sorted(found) == ["a", "b", "c", "d", "e"]
    assert all([name for name in found if name in order] == order for order in orders)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SECURE)
def test_a_large_model_is_told_on_two_screens(spec: str) -> None:
    lines = list(explain_policy(shape_of("llama-2-7b")[1], spec, 512, 16, "fast"))
    assert len(lines) < 120, spec


def test_names() -> None:
    names = Names({"n": (5, 9, 20, 32, 41, 52), "k": (2, 3, 7, 11, 13, 14), "s": (4,) * 6})
    assert names.of((3,) * 6) == "3"
    assert names.of((6, 10, 21, 33, 42, 53)) == "n + 1"
    assert names.of(tuple(map(pairs, names.symbols["n"]))) == "pairs(n)"
    assert names.of(tuple(map(modulus, names.symbols["n"]))) == "modulus(n)"
    assert names.of((12, 21, 47, 75, 95, 118)) == "2*n + k"
    assert names.of((10, 27, 140, 352, 533, 728)) == "n*k"
    assert names.of((1, 5, 2, 8, 3, 9)) is None  # nothing is said rather than something wrong
    assert total([["3", "KV", "g", "n + 1"], ["5", "H", "n + 1"], ["2"], ["6", "7"]]) == "8*H*(n + 1) + 44"
    assert evaluate_formula("8*H*(n + 1) + 44", {"H": 4, "n": 2}) == 140
    assert solve([(1, 1, 1), (1, 2, 3)], (3, 5, 8)) is None
