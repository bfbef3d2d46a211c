"""The command line of `mpcache eval`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mpcache.config import PublicConfig, load_settings
from mpcache.console import terminal
from mpcache.console.inputs import listed
from mpcache.console.options import JsonOption, ModelOption
from mpcache.errors import BadInput
from mpcache.evaluate.plot import check_plot, plot
from mpcache.evaluate.quality_tables import CAPTION, quality_tables
from mpcache.evaluate.results import Results
from mpcache.evaluate.score import EvalModel
from mpcache.evaluate.secure import confirm_privately
from mpcache.evaluate.sweep import FULL, EvalGrid, bind_at_budget, run_sweep, take_sample
from mpcache.evaluate.tasks import TASKS
from mpcache.model import demo_model_dir, load_model
from mpcache.policy import POLICIES
from mpcache.policy.plan import FULL_PERCENT
from mpcache.transport.network import NETWORKS

QUESTIONS = ("inside", "after")
DOCUMENT_TOKENS = 880  # tokens of a document, where the model allows as many


def evaluate(
    model: ModelOption = None,
    task: Annotated[str, typer.Option(help="Of these, with commas.")] = ",".join(TASKS),
    policy: Annotated[
        list[str] | None,
        typer.Option(help="NAME[:key=value,...]; may be given several times. [all, and the default]"),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Context tokens that are attended to, in percent, with commas.")
    ] = "5,10,20,40",
    question: Annotated[
        str, typer.Option(help="inside: at the end of what is evicted; after: unseen by it.")
    ] = ",".join(QUESTIONS),
    samples: Annotated[int, typer.Option(help="Answers per task, policy and budget.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
    context: Annotated[
        int | None, typer.Option(help=f"Tokens of a document, at most. [{DOCUMENT_TOKENS}]")
    ] = None,
    secure: Annotated[
        int, typer.Option(help="So many samples of each row through the three parties, too.")
    ] = 0,
    network: Annotated[str | None, typer.Option(help=f"With --secure, but for bits: {NETWORKS}.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Quality against budget, an SVG file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the answer quality of each policy at equal budgets, on the plain engine.

    Ctrl-C ends the sweep and keeps what is done.
    """
    for name, value, least in (("--samples", samples, 1), ("--secure", secure, 0), ("--seed", seed, 0)):
        if not least <= value <= 10**6:
            raise BadInput(f"{name} is {value}; give {least} to 1000000")
    if network is not None and not secure:
        raise BadInput("--network slows the parties' links; it needs --secure N")
    public = load_settings(None, {"public.network": network}).public
    tasks = [TASKS[name] for name in listed("--task", task, TASKS)]
    questions = listed("--question", question, QUESTIONS)
    budgets = _percents(budget)
    specs = list(dict.fromkeys(policy or [*POLICIES, PublicConfig().policy]))
    if plot_file is not None:
        check_plot(plot_file)
    engine = EvalModel(
        load_model(demo_model_dir() if model is None else model),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    grid = EvalGrid(
        tuple(tasks),
        tuple(questions),
        tuple(spec for spec in specs if spec != FULL),
        tuple(budgets),
        samples,
        seed,
        _context(context, engine.model.shape.max_positions, max(t.room for t in tasks)),
    )
    if not any(q in t.questions for t in tasks for q in questions):
        raise BadInput(f"--question {question}: task {task} is asked after the context only")
    for each in tasks:  # all is checked before the first question is asked
        take_sample(engine, each, "after", grid, 0)
    for spec in policy or ():  # of all there are, some may be left out
        _check(engine, spec, grid)

    results, complete = Results(), False
    try:
        with terminal.progress("starting ...") as (say, _):
            run_sweep(engine, grid, results, say)
            if secure:
                confirm_privately(engine, grid, list(results.cells), secure, public.network, results, say)
        complete = True
    finally:  # also when it was interrupted, or a party failed
        _show(results, grid, engine, plot_file, as_json, complete)


def _show(
    results: Results, grid: EvalGrid, engine: EvalModel, plot_file: Path | None, as_json: bool, complete: bool
) -> None:
    rows = results.rows()
    for note in results.notes:
        terminal.say(f"note: {note}")
    if not complete:
        terminal.say("note: ended early; these rows stand on what was done until then")
    if as_json:
        result: dict[str, Any] = {
            "model": "demo" if engine.model.path == demo_model_dir() else engine.model.path.name,
            "model_digest": engine.model.digest,
            "context_tokens": grid.context,
            "samples": grid.samples,
            "seed": grid.seed,
            "complete": complete,
            "command": shlex.join(["mpcache", *sys.argv[1:]]),
            "notes": results.notes,
            "rows": rows,
        }
        print(json.dumps(result))
    else:
        out = terminal.stdout()
        for table in quality_tables(rows):
            terminal.print_table(out, table)
        if rows:
            out.print(CAPTION, style="dim")
    if plot_file is not None and rows:
        plot(rows, plot_file)
        terminal.say(f"wrote {plot_file}")


def _check(engine: EvalModel, spec: str, grid: EvalGrid) -> None:
    """Raise PolicyError for a policy that cannot be set to the largest of the budgets."""
    percent = FULL_PERCENT if spec == FULL else max(grid.budgets)
    bind_at_budget(engine, spec, percent, grid.context).count_from_model(engine.model)


def _context(given: int | None, allowed: int, room: int) -> int:
    """Return the tokens of a document. Raises BadInput."""
    context = min(DOCUMENT_TOKENS, allowed - room - 1) if given is None else given
    if not 32 <= context < allowed:
        raise BadInput(f"--context is {context}; the model takes 32 to {allowed - room} with these tasks")
    return context


def _percents(text: str) -> list[int]:
    items = listed("--budget", text)
    if not all(re.fullmatch(r"[1-9]\d?", item, re.ASCII) for item in items):
        raise BadInput(f"--budget {text!r}: give whole percents from 1 to {FULL_PERCENT - 1}, as in 5,20")
    return sorted(map(int, items))
