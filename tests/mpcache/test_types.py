"""Types keep apart what must not be mixed: a value is computed on, an operand was masked once.

mypy reads this file with `make check`. Each misuse below is marked as the error that it is, and a mark that
mypy does not need is an error of its own: so `make check` fails as soon as one of them type-checks.
"""

from __future__ import annotations

import tomllib

from mpcache.engines.fast import FastOps
from mpcache.ops import Operand, Ops, Value
from mpcache.runtime.shares import MaskedOperand, Share
from tests.support.paths import ROOT


def programs(ops: Ops, x: Value, w: Operand) -> None:
    ops.linear(x, w)
    ops.linear(x, x)  # type: ignore[arg-type]
    ops.linear(w, w)  # type: ignore[arg-type]
    ops.scores(x, x)  # type: ignore[arg-type]
    ops.weighted_sum(x, x)  # type: ignore[arg-type]
    ops.softmax(w, None)  # type: ignore[arg-type]
    _ = w + w  # type: ignore[operator]
    _ = w.sum(0)  # type: ignore[attr-defined]


def shares(ops: FastOps, x: Share, w: MaskedOperand) -> None:
    ops.linear(x, w)
    ops.linear(x, x)  # type: ignore[arg-type]
    ops.linear(w, w)  # type: ignore[arg-type]
    ops.topk(w, 1, [])  # type: ignore[arg-type]


def test_make_check_reads_this_file_and_wants_every_mark() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] and "tests" in settings["packages"]
    assert settings.get("warn_unused_ignores", True)
