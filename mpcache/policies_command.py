"""`mpcache policies [NAME]`: which policies there are, and all of one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from mpcache.console import terminal
from mpcache.console.options import JsonOption
from mpcache.policy import POLICIES
from mpcache.policy.describe import PolicyFacts, describe
from mpcache.policy.plan import written
from mpcache.policy.registry import policy_class

out = terminal.stdout()
PLAIN, PRIVATE = "in plaintext", "private"


def policies(
    name: Annotated[str | None, typer.Argument(help="One of them, to be told all of it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the policies, or tell all of one: mechanism, source, options with their ranges, leak class."""
    if name is not None:
        facts = describe(policy_class(name))
        if as_json:
            print(json.dumps(asdict(facts)))
        else:
            _tell(facts)
    elif as_json:
        print(json.dumps({"policies": [_row(one) for one in POLICIES]}))
    else:
        _list()


def _row(name: str) -> dict[str, object]:
    cls = POLICIES[name]
    return {
        "name": name,
        "leaks": cls.leaks,
        "may_leak": cls.may_leak,
        "private": not cls.plain_only,
        "evicts": cls.evicts,
        "selects": cls.selects,
        "needs": cls.needs,
        "options": {option: f.default for option, f in cls.options().items()},
        "source": cls.source,
    }


def side(evicts: bool, selects: bool) -> str:
    """Say where in A|B a policy may stand."""
    return " or ".join(part for part, able in (("A", evicts), ("B", selects)) if able)


def reveals(leaks: str, may_leak: str) -> str:
    """Say what a policy reveals."""
    return leaks + (f"; {may_leak}" if may_leak else "")


def _list() -> None:
    table = Table("policy", "runs", "of A|B", "leaks", "options with their defaults", show_lines=True)
    table.columns[0].max_width = 42
    for name, cls in POLICIES.items():
        options = [f"{option}={written(f.default)}" for option, f in cls.options().items()]
        table.add_row(
            f"[bold]{name}[/]: {cls.source}\nneeds {cls.needs}",
            PLAIN if cls.plain_only else PRIVATE,
            side(cls.evicts, cls.selects),
            reveals(cls.leaks, cls.may_leak),
            ", ".join(options) or "none",
        )
    terminal.print_table(out, table)
    out.print(
        "Write NAME or NAME:key=value,... A budget is a count, or a ratio with a point: 0.25.\n"
        "A|B: A evicts the context once, B selects from what is left at every step: 'snapkv:cap=256|quest'.\n"
        "`mpcache policies NAME` tells all of one."
    )


def _tell(facts: PolicyFacts) -> None:
    """Print one policy."""
    for paragraph in facts.mechanism:
        out.print(paragraph, markup=False, highlight=False)
        out.print()
    rows = {
        "source": facts.source,
        "runs": PRIVATE if facts.private else PLAIN,
        "reveals": reveals(facts.leaks, facts.may_leak),
        "needs": facts.needs,
        "of A|B": side(facts.evicts, facts.selects) or "neither",
        "example": facts.example,
    }
    for key, value in rows.items():
        out.print(f"{key:<8} {value}", markup=False, highlight=False)
    if not facts.options:
        return
    table = Table("option", "default", "allowed", "meaning", show_lines=True)
    for one in facts.options:
        table.add_row(one.name, one.default, one.allowed, one.meaning)
    out.print()
    terminal.print_table(out, table)
