"""The command line of `mpcache check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mpcache.check.model_findings import check_model
from mpcache.config import load_settings
from mpcache.console import terminal
from mpcache.console.inputs import check_stdin
from mpcache.console.options import (
    DocumentAsOption,
    JsonOption,
    ModelOption,
    NetworkOption,
    NewTokensOption,
    PolicyOption,
    ProtocolOption,
    QuestionFileOption,
    QuestionOption,
    RawOption,
    chat_overrides,
    public_overrides,
)
from mpcache.errors import BadInput, LinkError, ModelError
from mpcache_parties.link_check import LinkFinding, check_links, rank_in


def check(
    model: ModelOption = None,
    context: Annotated[
        Path | None, typer.Option(help="With --model: a document, whose values are held against the ranges.")
    ] = None,
    question: QuestionOption = None,
    question_file: QuestionFileOption = None,
    policy: PolicyOption = None,
    protocol: ProtocolOption = None,
    network: NetworkOption = None,
    max_new_tokens: NewTokensOption = None,
    raw: RawOption = False,
    document_as: DocumentAsOption = None,
    config: Annotated[Path | None, typer.Option(help="Public settings and addresses, a YAML file.")] = None,
    identity: Annotated[
        Path | None, typer.Option(help="Folder of a party's key and certificate: the links use TLS.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=0, max=2, help="Whose links are tried. [whose key is in --identity, or 1: client]"),
    ] = None,
    listen: Annotated[str | None, typer.Option(help="Server, dealer: HOST:PORT that it binds.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, whatever the addresses.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a model, or every link and certificate of a config, before a run; with both given, both.

    --model: is it supported, can its chat template be used, what does it take, do its values on --context
    stay in range.
    Else, and with --config: the parties that are dialled must run, or wait. No session begins, and none is
    disturbed.
    """
    if model is None and (context or question or question_file):
        raise BadInput("--context, --question and --question-file need --model; without it links are checked")
    check_stdin(context, question_file)
    overrides = public_overrides(policy, protocol, network, max_new_tokens, None)
    overrides |= chat_overrides(raw, document_as)
    settings = load_settings(config, {"addresses.bind": listen} | overrides)
    failed: list[int] = []
    found: list[LinkFinding] = []
    if model is not None:
        with terminal.progress("reading the model ...") as (say, _):
            found += check_model(model, context, question, question_file, settings, say)
        failed += [ModelError.exit_code for each in found if each.ok is False]
    if model is None or config is not None or identity is not None:
        links = check_links(rank_in(identity, rank), settings, identity, insecure)
        failed += [LinkError.exit_code for each in links if each.ok is False]
        found += links
    if as_json:
        print(json.dumps({"checks": [asdict(each) for each in found]}))
    else:
        terminal.print_table(terminal.stdout(), _table(found))
    if failed:
        raise typer.Exit(failed[0])


def _table(found: list[LinkFinding]) -> Table:
    table = Table("", "where", "found", "")
    for each in found:
        word = {True: "ok", False: "[bold red]failed[/]", None: "not known here"}[each.ok]
        table.add_row(each.what, escape(each.where), escape(each.found), word)
    return table
