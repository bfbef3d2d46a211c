"""Quality against budget, one panel per task and question. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpcache.evaluate.results import EvalRow
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.plots import figure_of, legend_below, style_of

COLUMNS = 2  # a paper's text width


def plot(rows: Sequence[EvalRow], file: Path, about: str) -> None:
    """Draw the plain rows of judged tasks; the full cache is the dashed line. Raises BadInput.

    about: of which model and documents they are.
    """
    shown = [row for row in rows if row["engine"] == "plain" and row["judged"]]
    kinds = list(dict.fromkeys((row["task"], row["question"]) for row in shown))
    policies = [p for p in dict.fromkeys(row["policy"] for row in shown) if p != "full"]
    columns = min(COLUMNS, max(1, len(kinds)))
    lines = -(-max(1, len(kinds)) // columns)
    with figure_of(file, lines, columns) as (figure, axes):
        figure.suptitle(f"{about}; bars: 95 %")
        handles: dict[str, Any] = {}
        for panel, kind in zip(axes.flat, kinds, strict=False):
            mine = [row for row in shown if (row["task"], row["question"]) == kind]
            handles |= _panel(panel, mine, policies)
            panel.set_title(f"{kind[0]}, question {kind[1]}{_asked(mine)}")
        for panel in axes.flat[len(kinds) :]:
            panel.set_axis_off()
        legend_below(figure, handles)


def _asked(rows: Sequence[EvalRow]) -> str:
    """Say how many answers each point stands on."""
    found = sorted({row["n"] for row in rows if row["policy"] != "full" and "bits_per_byte" not in row})
    if not found:
        return ""
    return f", n = {found[0]}" + (f" to {found[-1]}" if len(found) > 1 else "")


def _panel(panel: Any, rows: Sequence[EvalRow], policies: Sequence[str]) -> dict[str, Any]:
    """One task; the lines by policy."""
    by_bits = "bits_per_byte" in rows[0]
    value = "bits_per_byte" if by_bits else "accuracy"
    budgets = sorted({row["budget_percent"] for row in rows} - {FULL_PERCENT})
    handles: dict[str, Any] = {}
    for row in rows:
        if row["policy"] == "full":
            handles["full"] = panel.axhline(row[value], color="black", linestyle="--", linewidth=1)
    for i, policy in enumerate(policies):
        mine = sorted((row for row in rows if row["policy"] == policy), key=lambda r: r["budget_percent"])
        ends = [r["ci95"] for r in mine] if not by_bits else [[r[value]] * 2 for r in mine]
        off = [
            [max(0.0, r[value] - end[0]) for r, end in zip(mine, ends, strict=True)],
            [max(0.0, end[1] - r[value]) for r, end in zip(mine, ends, strict=True)],
        ]
        handles[policy] = panel.errorbar(
            [r["budget_percent"] for r in mine], [r[value] for r in mine], yerr=off, elinewidth=0.6,
            **style_of(i, policy),
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [f"{b} %" for b in budgets])
    panel.minorticks_off()
    panel.set_xlabel("attended tokens, of the context")
    panel.set_ylabel("bits per byte" if by_bits else "exact answers")
    panel.grid(alpha=0.3)
    if not by_bits:
        panel.set_ylim(-0.04, 1.04)
    return handles
