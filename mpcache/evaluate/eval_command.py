"""The command line of `mpcache eval`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mpcache.config import PublicConfig, load_settings
from mpcache.console import terminal
from mpcache.console.inputs import listed
from mpcache.console.live_table import live_table
from mpcache.console.options import (
    DocumentAsOption,
    JournalOption,
    JsonOption,
    ModelOption,
    RawOption,
    SweepRayOption,
    chat_overrides,
)
from mpcache.console.terminal import Say
from mpcache.errors import BadInput
from mpcache.evaluate.chat_sweep import GATES, ChatSweep, ask_reading
from mpcache.evaluate.chat_tasks import CHAT_TASKS
from mpcache.evaluate.plot import plot
from mpcache.evaluate.quality_tables import CAPTION, quality_tables
from mpcache.evaluate.results import Results
from mpcache.evaluate.score import EvalModel
from mpcache.evaluate.secure import confirm_privately
from mpcache.evaluate.secure_chat import confirm_talks
from mpcache.evaluate.sweep import (
    FULL,
    EvalGrid,
    ask_sample,
    bind_at_budget,
    run_sweep,
    take_sample,
    worker_memory,
)
from mpcache.evaluate.tasks import TASKS
from mpcache.model import demo_model_dir, load_model
from mpcache.model.framing import make_framing
from mpcache.policy import POLICIES
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.plots import check_plot
from mpcache.sweeping.runner import CellRunner, Work, cell_runner
from mpcache.transport.network import NETWORKS

QUESTIONS = ("inside", "after")
ALL = "all"
USUAL = (
    "compact",
    "snapkv",
    "h2o",
    "quest",
    "mpcache",
    "random",
    "oracle",
)  # beside full: an hour, not a day
DOCUMENT_TOKENS = 880  # tokens of a document, where the model allows as many


def evaluate(
    model: ModelOption = None,
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Of {','.join(TASKS)}; of a model with a chat template {','.join(CHAT_TASKS)}. [all]"
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"NAME[:key=value,...]; may be given several times; {ALL}: each one there is. "
            f"[{', '.join(USUAL)}, and the commands' default]"
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Context tokens that are attended to, in percent, with commas.")
    ] = "5,10,20,40",
    question: Annotated[
        str, typer.Option(help="inside: at the end of what is evicted; after: unseen by it.")
    ] = ",".join(QUESTIONS),
    samples: Annotated[
        int, typer.Option(help="Answers per task, policy and budget; of a chat, over all tasks.")
    ] = 50,
    gate: Annotated[
        str,
        typer.Option(
            help="Of a chat: judge the questions that the full cache answers, or tasks of which it answers "
            "nearly all: question or task."
        ),
    ] = GATES[0],
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
    context: Annotated[
        int | None, typer.Option(help=f"Tokens of a document, at most. [{DOCUMENT_TOKENS}]")
    ] = None,
    secure: Annotated[
        int,
        typer.Option(help="So many samples, of a chat conversations, of each row through the parties, too."),
    ] = 0,
    network: Annotated[
        str | None, typer.Option(help=f"With --secure, but for bits and chats: {NETWORKS}.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw quality against budget: .svg, .pdf or .png.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Of a chat: write the JSON here after each document, too.")
    ] = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    ray: SweepRayOption = None,
    journal: JournalOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the answer quality of each policy at equal budgets, on the plain engine.

    On a terminal the table fills as answers come. Ctrl-C ends the sweep and keeps what is done.
    """
    for name, value, least in (("--samples", samples, 1), ("--secure", secure, 0), ("--seed", seed, 0)):
        if not least <= value <= 10**6:
            raise BadInput(f"{name} is {value}; give {least} to 1000000")
    if network is not None and not secure:
        raise BadInput("--network slows the parties' links; it needs --secure N")
    if gate not in GATES:
        raise BadInput(f"--gate {gate!r} is not known; give {' or '.join(GATES)}")
    overrides = {"public.network": network} | chat_overrides(raw, document_as, None)
    public = load_settings(None, overrides).public
    questions = listed("--question", question, QUESTIONS)
    budgets = _percents(budget)
    specs = _specs(policy or [*USUAL, PublicConfig().policy])
    if plot_file is not None:
        check_plot(plot_file)
    engine = EvalModel(
        load_model(demo_model_dir() if model is None else model),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    chat = engine.model.tokenizer.chat_template is not None and not raw
    known = CHAT_TASKS if chat else TASKS
    tasks = [known[name] for name in listed("--task", task or ",".join(known), known)]
    if not any(q in t.questions for t in tasks for q in questions):
        raise BadInput(f"--question {question}: task {task} is asked after the context only")
    grid = EvalGrid(
        tuple(tasks),
        tuple(questions),
        tuple(spec for spec in specs if spec != FULL),
        tuple(budgets),
        samples,
        seed,
        _context(context, engine.model.shape.max_positions, max(t.room for t in tasks)),
    )
    report = EvalReport(engine, grid, gate if chat else "task")
    ask: Callable[[Say, CellRunner], None]
    confirm: Callable[[Say], None]
    if chat:
        framing = make_framing(engine.model.tokenizer, engine.model.shape, False, public.document_as, True)
        keep = lambda: report.write(out, False)  # noqa: E731
        sweep = ChatSweep(engine, framing, grid, gate, report.results, keep, public.document_as)
        sweep.document(0)  # all is checked before the first question is asked
        ask = sweep.run
        confirm = lambda say: confirm_talks(sweep, secure, public.network, say)  # noqa: E731
    else:
        for each in tasks:
            take_sample(engine, each, "after", grid, 0)
        ask = lambda say, runner: run_sweep(engine, grid, report.results, say, runner)  # noqa: E731
        confirm = lambda say: confirm_privately(engine, grid, secure, public.network, report.results, say)  # noqa: E731
    for spec in [spec for spec in policy or () if spec != ALL]:  # of all there are, some may be left out
        _check(engine, spec, grid)

    complete = False
    about = grid.about(chat, public.document_as) | {"model_digest": engine.model.digest}
    work: Work = ask_reading if chat else ask_sample
    with cell_runner(ray, journal, about, work, worker_memory(engine.model.shape)) as runner:
        try:
            with live_table("starting ...") as runner.table:
                ask(runner.table.say, runner)
                if secure:
                    confirm(runner.table.say)
            complete = not runner.failures
        finally:  # also when it was interrupted, or a party failed
            for failure in runner.failures:
                report.results.note(f"failed: {failure}")
            report.write(out, complete)
            report.show(plot_file, as_json, complete)
        runner.check()


@dataclass
class EvalReport:
    """What a sweep found, and of what. gate: `question` or `task`."""

    engine: EvalModel
    grid: EvalGrid
    gate: str
    results: Results = field(default_factory=Results)

    @property
    def name(self) -> str:
        """The model's name."""
        path = self.engine.model.path
        return "demo" if path == demo_model_dir() else path.name

    def to_dict(self, complete: bool) -> dict[str, Any]:
        """Return what --json prints."""
        model, grid = self.engine.model, self.grid
        return {
            "model": self.name,
            "model_digest": model.digest,
            "context_tokens": grid.context,
            "samples": grid.samples,
            "seed": grid.seed,
            "gate": self.gate,
            "complete": complete,
            "command": shlex.join(["mpcache", *sys.argv[1:]]),
            "notes": self.results.notes,
            "rows": self.results.rows(),
        }

    def write(self, file: Path | None, complete: bool) -> None:
        """Write it, whole or not at all. Raises BadInput."""
        if file is None:
            return
        new = file.with_name(f".{file.name}.new")
        try:
            new.write_text(json.dumps(self.to_dict(complete)) + "\n", encoding="utf-8")
            new.replace(file)
        except OSError as error:
            raise BadInput(f"{file}: cannot be written: {error.strerror or error}") from None

    def show(self, plot_file: Path | None, as_json: bool, complete: bool) -> None:
        """Print tables or JSON, and draw the plot."""
        rows = self.results.rows()
        for note in self.results.notes:
            terminal.say(f"note: {note}")
        if not complete:
            terminal.say("note: ended early; these rows stand on what was done until then")
        if as_json:
            print(json.dumps(self.to_dict(complete)))
        else:
            out = terminal.stdout()
            for table in quality_tables(rows):
                terminal.print_table(out, table)
            if rows:
                out.print(CAPTION, style="dim")
        if plot_file is not None and rows:
            plot(rows, plot_file, f"{self.name}, documents of {self.grid.context:,} tokens")
            terminal.say(f"wrote {plot_file}")


def _specs(given: Sequence[str]) -> list[str]:
    """Name each policy once, and each one there is for `all`."""
    every = [*POLICIES, PublicConfig().policy]
    return list(dict.fromkeys(spec for one in given for spec in (every if one == ALL else [one])))


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
