"""The command line of `mpcache calibrate`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from mpcache.console import terminal
from mpcache.console.inputs import read_text
from mpcache.console.options import JsonOption, ModelOption
from mpcache.errors import BadInput
from mpcache.evaluate.calibrate import CHECKED, calibrate, check_curve, texts
from mpcache.evaluate.score import EvalModel
from mpcache.evaluate.tasks import TASKS
from mpcache.model import demo_model_dir, load_model
from mpcache.policy.curve import HeadCurve, places
from mpcache.report.units import duration

DOCUMENT_TOKENS = 400  # of a document to calibrate on, where the model allows as many
CHECKED_TOKENS = 880  # of one that is asked about, likewise
KEPT_AT_LEAST = 0.9  # of fresh facts, at the default's budget, for a curve that is said to hold
DEFAULT_PERCENT = 20


def calibrate_model(
    model: ModelOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the curve goes. [beside the model, else the user's folder]")
    ] = None,
    documents: Annotated[int, typer.Option(help="Made of facts and of prose, in turn.")] = 8,
    context: Annotated[
        int | None, typer.Option(help=f"Tokens of each document, at most. [{DOCUMENT_TOKENS}]")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text to calibrate on, too, which is never served.")
    ] = None,
    answers: Annotated[int, typer.Option(help="Fresh facts asked to check the curve; 0: no check.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Make a model's curve for the policy `compact`: which heads lose how much where they keep less.

    Once per model, on text that is never served; then fresh facts are asked at several budgets.
    """
    for name, value, least in (("--documents", documents, 0), ("--answers", answers, 0)):
        if not least <= value <= 1000:
            raise BadInput(f"{name} is {value}; give {least} to 1000")
    if not documents and not text:
        raise BadInput("--documents is 0 and there is no --text: a curve needs text")
    given = [read_text(file) for file in text or ()]
    engine = EvalModel(
        load_model(demo_model_dir() if model is None else model),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    most = engine.model.shape.max_positions - TASKS["recall"].room
    tokens = min(DOCUMENT_TOKENS, most) if context is None else context
    if not 32 <= tokens <= max(32, most):
        raise BadInput(f"--context is {tokens}; give 32 to {most} tokens")
    start = time.perf_counter()
    with terminal.progress("starting ...") as (say, _):
        errors = calibrate(engine.model, texts(engine.model, documents, tokens, given), engine.device, say)
        curve = HeadCurve(engine.model.digest, errors, {})
        if answers:
            curve = replace(curve, check=check_curve(engine, curve, answers, min(CHECKED_TOKENS, most), say))
    file = write_curve(curve, engine.model.path, out)
    row = {"curve": str(file), "model_digest": curve.digest, "check": curve.check}
    if as_json:
        print(json.dumps(row))
    else:
        _show(curve)
    terminal.say(f"wrote {file} in {duration(1000 * (time.perf_counter() - start))}")


def write_curve(curve: HeadCurve, model: Path, out: Path | None) -> Path:
    """Write a curve where it was asked for, or beside the model, or apart. Raises BadInput."""
    failed = ""
    for file in [out] if out is not None else places(model, curve.digest):
        try:
            if out is None:
                file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(curve.to_json() + "\n", encoding="utf-8")
            return file
        except OSError as error:
            failed = f"{file}: cannot be written: {error.strerror}"
    raise BadInput(failed)


def _show(curve: HeadCurve) -> None:
    """Print how many tokens the greediest heads get, and what the check found."""
    out, heads = terminal.stdout(), curve.errors.shape[0] * curve.errors.shape[1]
    full, right = curve.check.get("full", 0), curve.check.get("right", {})
    table = Table(title="Who keeps the tokens of a document of 1000, and fresh facts", title_justify="left")
    for name in ("kept", "by the greediest tenth of the heads", "by the least greedy half", "facts right"):
        table.add_column(name, justify="right")
    for percent in CHECKED:
        counts = curve.counts(10 * percent, 1000).flatten().sort(descending=True).values
        tenth, half = counts[: max(1, heads // 10)].sum(), counts[heads // 2 :].sum()
        shares = (f"{100 * float(part) / float(counts.sum()):.0f} %" for part in (tenth, half))
        answered = f"{right[str(percent)]} of {full}" if right else "not asked"
        table.add_row(f"{percent} %", *shares, answered)
    terminal.print_table(out, table)
    if not right:
        return
    if 2 * full < curve.check["asked"]:
        terminal.say(
            f"note: the full cache itself answers {full} of {curve.check['asked']} of these facts: they say "
            "little; ask some of your own with `mpcache compare --policy full --policy compact`"
        )
    elif right[str(DEFAULT_PERCENT)] < KEPT_AT_LEAST * full:
        terminal.say(
            f"note: at {DEFAULT_PERCENT} % fewer than {100 * KEPT_AT_LEAST:.0f} % of the facts are kept: "
            "calibrate on more documents, or keep more"
        )
