"""The command line of `mpcache audit`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcache.audit import measure as measuring
from mpcache.audit.cost_tables import breakdowns, cost_tables, measured_tables, verdict, write_csv
from mpcache.audit.explain import explain_policy
from mpcache.audit.option_sweep import secure_policies, sweep_options
from mpcache.audit.page import write_page
from mpcache.audit.priced_rows import AuditGrid, price_rows, resolved
from mpcache.audit.quality import points, read_quality
from mpcache.console import terminal
from mpcache.console.inputs import listed
from mpcache.console.options import (
    MODEL_FORMS,
    JsonOption,
    PadOption,
    PoliciesOption,
    RevealOption,
    read_reveal,
)
from mpcache.cost.choose import CHOICES
from mpcache.errors import BadInput, ModelError, MpcacheError
from mpcache.model import ModelShape, demo_model_dir, find_model, load_shape
from mpcache.model.shapes import NAMES, config_of
from mpcache.model.sources import is_gguf
from mpcache.padding import padded_length
from mpcache.transport.network import NO_NETWORK, parse_network

CONTEXTS = (512, 1024, 2048, 4096)
MEASURED_TOKENS = 7  # answered in each run of --measure: six decode steps


def audit(
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            "--model",
            help=f"demo, a config.json, or {', '.join(NAMES)}. Or {MODEL_FORMS[0].lower()}{MODEL_FORMS[1:]}.",
        ),
    ] = "demo",
    context: Annotated[
        str | None, typer.Option(help="Context lengths in tokens, as in 512,1024. [what the model allows]")
    ] = None,
    policy: PoliciesOption = None,
    network: Annotated[str, typer.Option(help="Of none, lan, wan and RTT_MS:MBPS, with commas.")] = "lan,wan",
    protocol: Annotated[
        str,
        typer.Option(help="Of fast, fast-bits, auto (picks one of these by network) and stock, with commas."),
    ] = "fast",
    question: Annotated[int, typer.Option(help="Length of the question, in tokens.")] = 16,
    new_tokens: Annotated[
        int | None,
        typer.Option(help="Length of the answer: costs are means over its decode steps. [2, measured: 7]"),
    ] = None,
    reveal: RevealOption = None,
    pad: PadOption = None,
    by: Annotated[str | None, typer.Option(help="layer or op: break each row down.")] = None,
    sweep_: Annotated[
        list[str] | None, typer.Option("--sweep", help="key=v1,v2: a grid; may be given several times.")
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(help="Results of `mpcache eval --json`, shown against cost.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows here, too.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here.")] = None,
    explain: Annotated[str | None, typer.Option(help="A policy: its plan and its openings in words.")] = None,
    measure: Annotated[
        bool, typer.Option(help="Run the parties, too, and put what they take beside what is modelled.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Price each eviction setting in rounds, bytes and time: exact, with no party running."""
    if explain is not None:
        others = {
            "--measure": measure, "--json": as_json, "--policy": policy, "--sweep": sweep_, "--by": by,
            "--csv": csv, "--report": report, "--quality": quality, "--pad": pad,
        }  # fmt: skip
        if extra := [name for name, given in others.items() if given]:
            raise BadInput(f"--explain prints one plan in words and runs nothing: leave out {extra[0]}")
    if new_tokens is None:
        new_tokens = MEASURED_TOKENS if measure else 2
    revealed = read_reveal(reveal)
    if by not in (None, "layer", "op"):
        raise BadInput(f"--by {by!r} is not known; give layer or op")
    for option, tokens in (("--question", question), ("--new-tokens", new_tokens), ("--pad", pad)):
        if tokens is not None and tokens < 1:
            raise BadInput(f"{option} is {tokens}; give 1 or more tokens")
    name, model = shape_of(shape)
    protocols = listed("--protocol", protocol, CHOICES)
    folder = _weights_of(shape) if measure else None
    contexts = _contexts(context, shape, model, question + max(2, new_tokens))
    networks = [parse_network(text) or NO_NETWORK for text in listed("--network", network)]
    if explain is not None:
        if len(protocols) > 1 or (context and len(contexts) > 1):
            raise BadInput("--explain prints one plan: give one --protocol and one --context")
        grid = AuditGrid(
            model, contexts, [explain], networks, protocols, question, max(2, new_tokens), reveal=revealed
        )
        taken = resolved(grid, explain, contexts[0], protocols[0], networks[0], _note)
        for line in explain_policy(model, explain, contexts[0], question, taken):
            print(line)
        return
    grid = AuditGrid(
        model,
        contexts,
        _policies(policy, sweep_ or []),
        networks,
        protocols,
        question,
        max(2, new_tokens),
        explicit=bool(policy or sweep_),
        reveal=revealed,
        pad=pad or 1,
    )
    of, evaluated = read_quality(quality) if quality else ("", [])
    for path in (csv, report):
        if path is not None:
            _check_writable(path)
    # The page shows where the cost comes from, whatever the table shows.
    needed = by or ("op" if report else None)
    found = price_rows(grid, needed, note=_note)
    result: dict[str, Any] = {
        "shape": name,
        "model": model.to_dict(),
        "question_tokens": padded_length(question, grid.pad),
        "new_tokens": grid.new_tokens,
        "command": shlex.join(["mpcache", *sys.argv[1:]]),
        "rows": found,
    }
    if evaluated:
        result["quality"] = evaluated
        other = None if of == name else of or "a model that its file does not name"
        if other is not None:
            _note(f"the accuracy is that of {other}, the cost that of {name}")
        result["quality_points"] = points(evaluated, grid, _note, other)
    stopped: MpcacheError | None = None
    if folder is not None:
        stopped = _measured(result, grid, folder, needed)
    _show(result, by, needed, csv, report, as_json)
    if stopped is not None:
        raise stopped


def _measured(result: dict[str, Any], grid: AuditGrid, model: Path, by: str | None) -> MpcacheError | None:
    """Measure the rows of `result`, and price them again at this machine's speed.

    What ended it early, if anything did after the first run: then the rest stays unmeasured.
    """
    planned = measuring.plan(grid, result["rows"])
    runs: dict[measuring.Key, measuring.Measured] = {}
    done, stopped = 0, None
    try:
        for key, run in measuring.measure(planned, grid.question, model, terminal.say):
            runs[key] = runs[key].with_another(run) if key in runs else run
            done += 1
    except MpcacheError as error:
        if not runs:
            raise
        stopped = error
    rates = measuring.calibrated(runs, grid)
    found = result["rows"] = price_rows(grid, by, rates)
    measuring.put_beside(found, runs)
    result["runs"] = {"planned": len(planned), "measured": done}
    result["calibration"] = [
        {"policy": spec, "protocol": protocol, "context_tokens": context, **asdict(rate)}
        for (spec, protocol, context), rate in rates.items()
    ]
    result["model_error"] = measuring.errors(found)
    return stopped


def _show(
    result: dict[str, Any],
    by: str | None,
    paged: str | None,
    csv: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Everything that was asked for: files, then JSON or tables. paged: what the page is broken down by."""
    found = result["rows"]
    if csv:
        write_csv(csv, found, by)
    if report:
        write_page(report, result, paged)
    if as_json:
        print(json.dumps(result))
        return
    out = terminal.stdout()
    for table in [*cost_tables(found), *(breakdowns(found, by) if by else ())]:
        terminal.print_table(out, table)
    out.print(
        "Per generated token. kept/used: context tokens in the cache, and those a query attends to. online: "
        "bytes sent by each computing party; offline: by the dealer, ahead. A time is the larger of two: the "
        "modelled rounds x RTT/2 + bytes / bandwidth + computation, and the dealer's bytes / bandwidth "
        "(dealer); ratio: that time to full's.",
        style="dim",
    )
    if "runs" in result:
        out.print()
        for table in measured_tables(found):
            terminal.print_table(out, table)
        for line in verdict(result):
            out.print(line, soft_wrap=True)
    for path in (csv, report):
        if path:
            terminal.say(f"wrote {path}")


def shape_of(text: str) -> tuple[str, ModelShape]:
    """Find a shape and its name: demo, a packaged one, or a folder. Raises BadInput or ModelError."""
    if text == "demo":
        return text, load_shape(demo_model_dir())
    if text in NAMES:
        return text, load_shape(config_of(text))
    try:
        path = find_model(text, weights=False)
    except ModelError as error:
        raise BadInput(f"{error}; or one of demo, {', '.join(NAMES)}") from None
    return path.name or text, load_shape(path)


def _weights_of(given: str) -> Path:
    """Find the model behind --shape, which the parties need. Raises BadInput or ModelError."""
    if given not in NAMES:
        path = demo_model_dir() if given == "demo" else find_model(given)
        if is_gguf(path) or any(path.glob("*.safetensors")):
            return path
    raise BadInput(
        f"--measure runs the parties, and --shape {given} has no weights; give demo, or a model with weights"
    )


def _policies(given: list[str] | None, sweeps: list[str]) -> list[str]:
    return sweep_options(list(dict.fromkeys(given)) if given else secure_policies(), sweeps)


def _contexts(text: str | None, given: str, shape: ModelShape, more: int) -> list[int]:
    """Read context lengths that the model can take, with `more` tokens after them. Raises BadInput.

    A packaged shape with rotary positions may be priced beyond its lengths, since such positions can be
    stretched at no cost. A model with weights could not run there.
    """
    limit = shape.max_positions - more
    if limit < 1:
        raise BadInput(f"question and answer make {more} tokens, the model allows {shape.max_positions}")
    if text is None:
        return [c for c in CONTEXTS if c <= limit] or [limit]
    contexts = []
    for item in listed("--context", text):
        if not re.fullmatch(r"\d{1,9}", item, re.ASCII) or int(item) < 1:
            raise BadInput(f"--context {item!r} is not a number of tokens; as in 512,1024")
        contexts.append(int(item))
    beyond = [c for c in contexts if c > limit]
    if beyond and (given not in NAMES or shape.positions != "rope"):
        raise BadInput(
            f"--context {beyond[0]} is beyond the model, which takes up to {limit} tokens besides question "
            f"and answer ({more})"
        )
    if beyond:
        trained = shape.max_positions
        _note(f"{given} was trained for {trained} tokens; beyond, rotary positions are taken as stretched")
    return contexts


def _check_writable(path: Path) -> None:
    """Before anything is computed. Leaves no file behind that was not there."""
    there = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror or error}") from None
    if not there:
        path.unlink()


def _note(text: str) -> None:
    terminal.say(f"note: {text}")
