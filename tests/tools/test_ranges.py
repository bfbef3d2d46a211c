"""The demo model stays in the ranges of `--protocol fast`, with every policy; and a model that does not
is told so."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from mpcache.engines.checked import Ranges
from mpcache.errors import OutOfRange
from mpcache.model import Model, demo_model_dir, load_model
from tools import ranges as tool


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model(demo_model_dir())


def checked(model: Model, spec: str, documents: int, questions: int) -> Ranges:
    ranges = Ranges()
    for context, asked in tool.documents(model, documents, 880, questions):
        for question in asked:
            tool.check(model, spec, context, question, ranges)
    return ranges


def test_one_answer_of_the_demo_model(demo: Model) -> None:
    found = {r.operation: r for r in checked(demo, "mpcache", 1, 1)}
    assert {"truncation", "silu", "exp", "top, difference", "norm, sum of squares", "gather"} <= set(found)
    assert 1 < found["silu"].largest < 32  # it looked at values, not at zeros


@pytest.mark.slow
@pytest.mark.parametrize("spec", tool.DEFAULT)
def test_the_evaluation_set_of_the_demo_model(demo: Model, spec: str) -> None:
    assert all(r.spare_bits > 0 for r in checked(demo, spec, 6, 3))


def test_a_model_out_of_range_is_told_so(demo: Model) -> None:
    first, *rest = demo.weights.layers
    assert first.w_gate is not None
    loud = replace(first, w_gate=first.w_gate * 40)
    louder = replace(demo, weights=replace(demo.weights, layers=(loud, *rest)))
    with pytest.raises(OutOfRange, match=r"^silu at .*layer0/gate: a value of .* is out of range"):
        checked(louder, "full", 1, 1)


def test_the_table(demo: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        sys, "argv", ["ranges.py", "--documents=1", "--questions=1", "--policy=streaming", "--tokens=300"]
    )
    tool.main()
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| operation | observed | bound |")
    assert any(line.startswith("| softmax, narrow score |") for line in table)
