"""The command line of `mpcache audit`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mpcache.audit import measure as measuring
from mpcache.audit.audit_shapes import contexts_of, lengths_of, shape_of, weights_of
from mpcache.audit.cost_plot import plot_contexts, plot_cost
from mpcache.audit.cost_tables import breakdowns, cost_tables, measured_tables, verdict
from mpcache.audit.explain_document import explain_document, explained_document
from mpcache.audit.explain_text import explain_policy, explained_policy
from mpcache.audit.exports import FORMATS, csv_lines, print_tables, write_csv
from mpcache.audit.option_sweep import secure_policies, sweep_options
from mpcache.audit.page import write_page
from mpcache.audit.priced_rows import AuditGrid, AuditRow, ask_settings, price_rows, resolved
from mpcache.audit.private_rows import price_document
from mpcache.audit.private_tables import EXPLAINED as PRIVATE_EXPLAINED
from mpcache.audit.private_tables import private_table
from mpcache.audit.quality import points
from mpcache.audit.size_tables import show_sizing
from mpcache.audit.tuning import Tuned, tuned, tuning_tables
from mpcache.choices import ProtocolName
from mpcache.cluster import ClusterError
from mpcache.console import terminal
from mpcache.console.inputs import listed
from mpcache.console.live_table import live_table
from mpcache.console.options import (
    MODEL_FORMS,
    JournalOption,
    JsonOption,
    PadOption,
    PoliciesOption,
    RevealOption,
    SweepRayOption,
    read_reveal,
)
from mpcache.cost.choose import CHOICES
from mpcache.cost.planner import AT_LEAST
from mpcache.cost.quality_file import Quality, read_quality
from mpcache.cost.sizing import PROCESS
from mpcache.errors import BadInput, MpcacheError
from mpcache.model import ModelShape
from mpcache.model.shapes import NAMES
from mpcache.padding import padded_length
from mpcache.report.plots import check_plot
from mpcache.sweeping.runner import cell_runner
from mpcache.transport.network import NO_NETWORK, parse_network

EXPLAINED = (
    "Per generated token. kept/used: context tokens in the cache, and those a query attends to. online: "
    "bytes sent by each computing party; offline: by the dealer, ahead. A time is the larger of two: the "
    "modelled rounds x RTT/2 + bytes / bandwidth + computation, and the dealer's bytes / bandwidth "
    "(dealer); ratio: that time to full's."
)
MEASURED_TOKENS = 7  # answered in each run of --measure: six decode steps


def audit(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            "--model",
            help=f"demo, a config.json, or {', '.join(NAMES)}. Or {MODEL_FORMS[0].lower()}{MODEL_FORMS[1:]}. "
            "May be given several times. [demo]",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens, as in 512,1024; 512..32k doubles. [what the model allows]"
        ),
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
        Path | None,
        typer.Option(help="Results of `mpcache eval --json`, shown against cost; of each --policy, or all."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="With --quality: pick the cheapest setting whose quality holds."),
    ] = False,
    at_least: Annotated[
        float, typer.Option(help="With --tune: the share of the full cache's answers to keep in every task.")
    ] = AT_LEAST,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Draw cost by context, or quality by cost with --quality: .svg, .pdf or .png."
        ),
    ] = None,
    private_context: Annotated[
        str | None,
        typer.Option(help="Price a document of the client's own instead, of so many tokens, as in 128,512."),
    ] = None,
    private_policy: Annotated[
        list[str] | None,
        typer.Option(help="What stays of it; may be given several times. [full, mpcache:n_keep=0.25]"),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows here, too.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here.")] = None,
    explain: Annotated[str | None, typer.Option(help="A policy: its plan and its openings in words.")] = None,
    measure: Annotated[
        bool, typer.Option(help="Run the parties, too, and put what they take beside what is modelled.")
    ] = False,
    sizing_: Annotated[
        bool, typer.Option("--sizing", help="What each party's machine needs, for each model and context.")
    ] = False,
    ray: SweepRayOption = None,
    journal: JournalOption = None,
    form: Annotated[str, typer.Option("--format", help=f"Of the tables: {', '.join(FORMATS)}.")] = FORMATS[0],
    as_json: JsonOption = False,
) -> None:
    """Price each eviction setting in rounds, bytes and time: exact, with no party running."""
    flags = {
        "--measure": measure, "--policy": policy, "--sweep": sweep_, "--by": by, "--csv": csv, "--pad": pad,
        "--report": report, "--quality": quality, "--tune": tune, "--plot": plot_file,
    }  # fmt: skip
    rest = {"--context": context, "--new-tokens": new_tokens, "--reveal": reveal, "--sizing": sizing_,
            "--journal": journal, "--ray": ray}  # fmt: skip
    _check_alone(private_context, private_policy, explain, flags, rest)
    if new_tokens is None:
        new_tokens = MEASURED_TOKENS if measure else 2
    torch.set_num_threads(1)  # all tensors are small or have no data: threads would wait for each other
    revealed = read_reveal(reveal)
    _check(by, form, {"--question": question, "--new-tokens": new_tokens, "--pad": pad})
    more = question + max(2, new_tokens)
    given, *others_given = shape or ["demo"]
    if sizing_:
        named = [(one, *shape_of(one)) for one in shape or ["demo"]]
        asked = [(name, s, contexts_of(context, one, s, more)) for one, name, s in named]
        return show_sizing(asked, policy or ["full"], question, protocol, form, as_json)
    if others_given:
        single = {"--explain": explain, "--measure": measure, "--report": report, "--quality": quality,
                  "--tune": tune, "--private-context": private_context, "--journal": journal}  # fmt: skip
        _alone(single, "{} is for one model: give one --shape")
    name, model = shape_of(given)
    protocols = listed("--protocol", protocol, CHOICES)
    if private_context is not None:
        document = private_context, private_policy, network, question
        return _price_document(name, model, document, protocols, explain, "json" if as_json else form)
    folder = weights_of(given) if measure else None
    contexts = contexts_of(context, given, model, more)
    networks = [parse_network(text) or NO_NETWORK for text in listed("--network", network)]
    if explain is not None and (len(protocols) > 1 or (context and len(contexts) > 1)):
        raise BadInput("--explain prints one plan: give one --protocol and one --context")
    specs = _policies(policy, sweep_ or []) if explain is None else [explain]
    grid = AuditGrid(
        model, contexts, specs, networks, protocols, question, max(2, new_tokens),
        explicit=bool(policy or sweep_), reveal=revealed, pad=pad or 1,
    )  # fmt: skip
    if explain is not None:
        taken = resolved(grid, explain, contexts[0], protocols[0], networks[0], _note)
        return _explain(model, explain, contexts[0], question, taken, as_json)
    measured = _quality(quality, tune, at_least, plot_file)
    if tune:
        return _show_tuned(tuned(measured, grid, at_least), name, model, "json" if as_json else form)
    for path in filter(None, (csv, report)):
        _check_writable(path)
    # The page shows where the cost comes from, whatever the table shows.
    needed = by or ("op" if report else None)
    failed: list[MpcacheError] = []
    result = _result(name, grid, _priced(grid, needed, ray, journal, failed))
    failed += [] if folder is None or failed else _measured(result, grid, folder, needed)
    results = [result]
    for other in others_given:
        name, model = shape_of(other)
        other_grid = replace(grid, shape=model, contexts=contexts_of(context, other, model, more))
        results.append(_result(name, other_grid, _priced(other_grid, needed, ray, None, failed)))
    if plot_file is not None and not measured.rows:
        plot_contexts(results, plot_file)
        terminal.say(f"wrote {plot_file}")
    if not as_json:  # before what may take long
        _show(results, by, csv, form)
    if measured.rows:
        _add_quality(result, measured, grid, policy, plot_file)
    if report:
        write_page(report, result, needed)
        terminal.say(f"wrote {report}")
    if as_json:
        _show(results, by, csv, "json")
    if failed:
        raise failed[0]


def _priced(
    grid: AuditGrid, by: str | None, ray: str | None, journal: Path | None, failed: list[MpcacheError]
) -> list[AuditRow]:
    """Price a grid, here or on the cluster that --ray names. failed: is told of settings that have no row."""
    with cell_runner(ray, journal, grid.about(by), ask_settings, PROCESS) as runner:
        with live_table("pricing ...") as runner.table:
            rows = price_rows(grid, by, None, _note, runner)
        for failure in runner.failures:
            _note(f"failed: {failure}")
        try:
            runner.check()
        except ClusterError as error:
            failed.append(error)
        return rows


def _alone(others: Mapping[str, Any], words: str) -> None:
    """Refuse flags that do not go with another one. Raises BadInput."""
    if extra := [name for name, given in others.items() if given]:
        raise BadInput(words.format(extra[0]))


def _check_alone(
    private: str | None, rules: list[str] | None, explain: str | None, flags: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> None:  # fmt: skip
    """Refuse what --explain and --private-context do not look at. Raises BadInput."""
    if private is not None:
        _alone({**flags, **rest}, "--private-context prices a document of the client's own: leave out {}")
    elif rules:
        raise BadInput("--private-policy is for a document of the client's own: give --private-context, too")
    elif explain is not None:
        _alone(flags, "--explain prints one plan in words and runs nothing: leave out {}")


def _explain(shape: ModelShape, spec: str, context: int, question: int, protocol: str, as_json: bool) -> None:
    """Print a plan in words, or as data. Raises PolicyError."""
    asked = shape, spec, context, question, protocol
    if as_json:
        print(json.dumps(explained_policy(*asked)))
    else:
        print(*explain_policy(*asked), sep="\n")


def _check(by: str | None, form: str, lengths: Mapping[str, int | None]) -> None:
    """Check flags by themselves. Raises BadInput."""
    if by not in (None, "layer", "op"):
        raise BadInput(f"--by {by!r} is not known; give layer or op")
    for option, tokens in lengths.items():
        if tokens is not None and tokens < 1:
            raise BadInput(f"{option} is {tokens}; give 1 or more tokens")
    if form not in FORMATS:
        raise BadInput(f"--format {form!r} is not known; give {', '.join(FORMATS)}")


def _quality(file: Path | None, tune: bool, at_least: float, plot_file: Path | None) -> Quality:
    """Check what belongs to --quality, and read it. Raises BadInput or PolicyError."""
    if file is None and tune:
        raise BadInput("--tune needs --quality FILE, which `mpcache eval --json` makes")
    if not 0 < at_least <= 1:
        raise BadInput(f"--at-least is {at_least}; give a share above 0 and up to 1")
    if plot_file is not None:
        check_plot(plot_file)
    return Quality([]) if file is None else read_quality(file)


def _show_tuned(choices: list[Tuned], name: str, model: ModelShape, form: str) -> None:
    """Print what --tune has weighed and picked."""
    if form == "json":
        print(json.dumps({"shape": name, "model": model.to_dict(), "tuned": choices}))
        return
    rows = [{"shape": name, **choice, **each} for choice in choices for each in choice["weighed"]]
    print_tables(list(tuning_tables(choices)), rows, form, "")


def _add_quality(
    result: dict[str, Any],
    measured: Quality,
    grid: AuditGrid,
    policy: list[str] | None,
    plot_file: Path | None,
) -> None:
    """Put answer quality beside its cost, of the policies that were named, or of all; and draw it."""
    result["quality"] = list(measured.rows)
    result["quality_of"] = {"model": measured.model, "context_tokens": measured.context}
    name = result["shape"]
    other = None if measured.model == name else measured.model or "a model that its file does not name"
    if other is not None:
        _note(f"the accuracy is that of {other}, the cost that of {name}")
    wanted = [row for row in measured.rows if not policy or row["policy"] in ("full", *policy)]
    notes: list[str] = []
    with terminal.progress("prices beside quality ...") as (say, _):
        result["quality_points"] = points(wanted, grid, notes.append, other, say)
    if notes:
        more = f", and {len(notes) - 1} more like it" if len(notes) > 1 else ""
        _note(f"{notes[0]}{more}")
    if plot_file is not None and result["quality_points"]:
        plot_cost(result["quality_points"], plot_file, name, measured)
        terminal.say(f"wrote {plot_file}")


def _price_document(
    name: str, model: ModelShape, asked: tuple[str, list[str] | None, str, int], protocols: list[str],
    explain: str | None, form: str,
) -> None:  # fmt: skip
    """Price, or explain, a document of the client's own. asked: its lengths, policies, networks, question."""
    lengths, policies, network, question = asked
    tokens = lengths_of("--private-context", lengths)
    if others := [one for one in protocols if one not in (ProtocolName.FAST, ProtocolName.FAST_BITS)]:
        raise BadInput(f"--private-context is priced for fast and fast-bits, not for {others[0]}")
    if explain is None:
        networks = [parse_network(text) or NO_NETWORK for text in listed("--network", network)]
        policies = policies or ["full", "mpcache:n_keep=0.25"]
        rows = list(price_document(model, tokens, policies, protocols, networks, question))
        if form == "json":
            return print(json.dumps({"shape": name, "model": model.to_dict(), "private_rows": rows}))
        return print_tables([private_table(name, rows)], rows, form, PRIVATE_EXPLAINED)
    if len(tokens) > 1 or len(protocols) > 1:
        raise BadInput("--explain prints one plan: give one --protocol and one --private-context")
    if form == "json":
        return print(json.dumps(explained_document(model, explain, tokens[0], question, protocols[0])))
    print(*explain_document(model, explain, tokens[0], question, protocols[0]), sep="\n")


def _measured(result: dict[str, Any], grid: AuditGrid, model: Path, by: str | None) -> list[MpcacheError]:
    """Measure the rows of `result`, and price them again at this machine's speed.

    Returns what ended it early, if anything did after the first run: then the rest stays unmeasured.
    """
    planned = measuring.plan(grid, result["rows"])
    runs: dict[measuring.Key, measuring.Measured] = {}
    done, stopped = 0, list[MpcacheError]()
    try:
        for key, run in measuring.measure(planned, grid.question, model, terminal.say):
            runs[key] = runs[key].with_another(run) if key in runs else run
            done += 1
    except MpcacheError as error:
        if not runs:
            raise
        stopped.append(error)
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


def _result(name: str, grid: AuditGrid, rows: list[AuditRow]) -> dict[str, Any]:
    """Return the JSON of one model's audit."""
    return {
        "shape": name,
        "model": grid.shape.to_dict(),
        "question_tokens": padded_length(grid.question, grid.pad),
        "new_tokens": grid.new_tokens,
        "version": version("mpcache"),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["mpcache", *sys.argv[1:]]),
        "rows": rows,
    }


def _show(results: Sequence[dict[str, Any]], by: str | None, csv: Path | None, form: str) -> None:
    """Write the CSV file, then JSON or tables. form: one of FORMATS, or json."""
    lines = [line for result in results for line in csv_lines(result, by)]
    if csv:
        write_csv(csv, lines)
    named = len(results) > 1 or form != FORMATS[0]  # a table that leaves the terminal says of what it is
    tables = [
        table for each in results for table in cost_tables(each["rows"], each["shape"] if named else "")
    ]
    for each in results if by else ():
        tables += breakdowns(each["rows"], by or "")
    if form == "json":
        print(json.dumps(results[0] if len(results) == 1 else {"audits": results}))
    else:
        print_tables(tables, lines, form, EXPLAINED)
        _show_measured(results, form)
    if csv:
        terminal.say(f"wrote {csv}")


def _show_measured(results: Sequence[Mapping[str, Any]], form: str) -> None:
    for result in results:
        if "runs" in result and form != "csv":  # CSV rows hold what was measured
            print_tables(list(measured_tables(result["rows"])), [], form, "\n".join(verdict(result)))


def _policies(given: list[str] | None, sweeps: list[str]) -> list[str]:
    return sweep_options(list(dict.fromkeys(given)) if given else secure_policies(), sweeps)


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
