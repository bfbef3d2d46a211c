"""Rows for people: one table per task and question, a policy a line, a budget a column."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mpcache.evaluate.results import EvalRow
from mpcache.policy.plan import FULL_PERCENT


def quality_tables(rows: Sequence[EvalRow]) -> list[Table]:
    """Lay out accuracy with its interval, or bits per byte; `secure` rows are a table of their own."""
    found = []
    kinds = dict.fromkeys((row["task"], row["question"], row["engine"]) for row in rows)
    for task, question, engine in kinds:
        mine = [r for r in rows if (r["task"], r["question"], r["engine"]) == (task, question, engine)]
        budgets = sorted({row["budget_percent"] for row in mine})
        judged = "" if mine[0]["judged"] is not False else ": not judged, the model cannot do it"
        table = Table(
            title=f"{task}, question {question}, {engine} engine, n = {max(r['n'] for r in mine)}{judged}",
            title_justify="left",
            title_style="bold",
        )
        table.add_column("policy", overflow="fold")
        for budget in budgets:
            table.add_column("all" if budget == FULL_PERCENT else f"{budget} %", justify="right")
        for policy in dict.fromkeys(row["policy"] for row in mine):
            cells = {row["budget_percent"]: cell_text(row) for row in mine if row["policy"] == policy}
            table.add_row(policy, *(cells.get(budget, "") for budget in budgets))
        found.append(table)
    return found


def cell_text(row: EvalRow) -> str:
    """Write a cell: 98 (90-100), in percent; 1.57 (39) for bits per byte.

    Secure rows add how many answers were the plain engine's, or how far the farthest sample was off the
    plain engine's bits per byte.
    """
    percent = f"{100 * row['accuracy']:.0f}"
    if "bits_per_byte" in row:
        text = f"{row['bits_per_byte']:.2f} ({percent})"
        return f"{text}, off {row['bits_per_byte_off']:.4f}" if "bits_per_byte_off" in row else text
    low, high = row["ci95"]
    text = f"{percent} ({100 * low:.0f}-{100 * high:.0f})"
    return f"{text}, agree {100 * row['agreement']:.0f}" if "agreement" in row else text


CAPTION = (
    "Answers right, in percent, and their 95 % interval (Wilson). bits: bits per byte, and the next tokens "
    "guessed right. Budgets: tokens of the context that a query attends to at most, in percent of it."
)
