"""Rows for people: one table per task and question, a policy a line, a budget a column."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mpcache.evaluate.results import EvalRow, budget_name, cell_text


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
            table.add_column(budget_name(budget), justify="right")
        for policy in dict.fromkeys(row["policy"] for row in mine):
            cells = {row["budget_percent"]: cell_text(row) for row in mine if row["policy"] == policy}
            table.add_row(policy, *(cells.get(budget, "") for budget in budgets))
        found.append(table)
    return found


CAPTION = (
    "Answers right, in percent, and their 95 % interval (Wilson). bits: bits per byte, and the next tokens "
    "guessed right. Budgets: tokens of the context that a query attends to at most, in percent of it."
)
