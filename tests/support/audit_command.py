"""`mpcache audit` in this process."""

from __future__ import annotations

import json
from typing import Any

import typer
from typer.testing import CliRunner, Result

from mpcache.audit import audit
from mpcache.errors import MpcacheError

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(audit)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), terminal_width=120)


def result_of(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def failure(*arguments: str) -> str:
    done = run(*arguments)
    assert isinstance(done.exception, MpcacheError), (done.exception, done.output)
    text = str(done.exception)
    assert "\n" not in text and len(text) < 400
    return text
