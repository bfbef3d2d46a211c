"""Plots of an audit: cost by context, quality by cost. Markers and dashes tell lines apart in grey, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpcache.audit.priced_rows import AuditRow
from mpcache.cost.quality_file import TOGETHER
from mpcache.report.plots import figure_of, legend_below, style_of
from mpcache.report.units import duration, number, size

COSTS = {
    "total_ms_per_token": "time per token, modelled, network {network}",
    "offline_bytes_per_token": "dealer's bytes per token",
}


BY_CONTEXT = {  # by amount: what its axis says, and how its numbers are written
    "rounds_per_token": ("rounds per token", number),
    "online_bytes_per_token": ("online bytes per token and party", size),
    "offline_bytes_per_token": ("dealer's bytes per token", size),
    "total_ms_per_token": ("time per token, modelled, network {network}", duration),
}
TICKS = 5


def plot_contexts(audits: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw rounds, bytes and time by context: a line per policy, a row of panels per model. Raises BadInput.

    Of several networks and protocols the first is drawn.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    with figure_of(file, len(audits), len(BY_CONTEXT)) as (figure, panels):
        handles: dict[str, Any] = {}
        for line, audit in enumerate(audits):
            first = audit["rows"][0]
            rows = [row for row in audit["rows"] if row["network"] == first["network"]]
            rows = [row for row in rows if row["protocol"] == first["protocol"]]
            for panel, (cost, (label, said)) in zip(panels[line], BY_CONTEXT.items(), strict=True):
                for i, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
                    mine = [row for row in rows if row["policy"] == policy]
                    x, y = [row["context_tokens"] for row in mine], [row[cost] for row in mine]
                    (handles[policy],) = panel.plot(x, y, **style_of(i, policy))
                panel.set_xscale("log", base=2)
                panel.set_xticks(sorted({row["context_tokens"] for row in rows}))
                panel.xaxis.set_major_formatter(lambda tokens, _: number(tokens))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(MaxNLocator(TICKS))
                panel.yaxis.set_minor_locator(NullLocator())
                panel.yaxis.set_major_formatter(lambda amount, _, said=said: said(amount))
                panel.set_xlabel(f"{audit['shape']}: context, tokens", fontsize=8)
                panel.set_ylabel(label.format(network=first["network"]), fontsize=8)
                panel.tick_params(labelsize=8)
                panel.grid(alpha=0.3, which="both")
        legend_below(figure, handles, len(BY_CONTEXT))


def plot_cost(points: Sequence[AuditRow], file: Path, by_question: bool) -> None:
    """Draw the points of one context, network and protocol, asked after the document. Raises BadInput.

    Of a chat, all tasks together.  by_question: only what the full cache answers was judged, so it has all.
    """
    first = points[0]
    same = ("context_tokens", "network", "protocol")
    shown = [
        point
        for point in points
        if all(point[name] == first[name] for name in same)
        and point.get("question", "after") == "after"
        and "bits" not in point.get("task", "")
    ]
    tasks = list(dict.fromkeys(point.get("task", "") for point in shown))
    tasks = [TOGETHER] if TOGETHER in tasks else tasks
    policies = [name for name in dict.fromkeys(point["policy"] for point in shown) if name != "full"]
    with figure_of(file, len(COSTS), max(1, len(tasks))) as (figure, panels):
        figure.suptitle(
            f"context {first['context_tokens']:,} tokens, question after; bars: 95 %", fontsize=10
        )
        handles: dict[str, Any] = {}
        for column, task in enumerate(tasks):
            mine = [point for point in shown if point.get("task", "") == task]
            for line, (cost, label) in enumerate(COSTS.items()):
                handles |= _panel(panels[line, column], mine, policies, cost, 1.0 if by_question else None)
                panels[line, column].set_xlabel(label.format(network=first["network"]), fontsize=8)
            asked = sorted({point.get("n", 0) for point in mine if point["policy"] != "full"})
            n = "" if not asked else f", n = {asked[0]}" + (f" to {asked[-1]}" if len(asked) > 1 else "")
            panels[0, column].set_title(f"{task}{n}", fontsize=10)
        legend_below(figure, handles, min(4, max(1, len(tasks))))


def _panel(
    panel: Any,
    points: Sequence[Mapping[str, Any]],
    policies: Sequence[str],
    cost: str,
    full: float | None,
) -> dict[str, Any]:
    """Draw one task; a line per policy, its budgets in order.  full: its share, if not what its row says."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    handles: dict[str, Any] = {}
    for i, policy in enumerate(policies):
        mine = sorted((p for p in points if p["policy"] == policy), key=lambda p: p["budget_percent"])
        if not mine:
            continue
        ends = [point.get("ci95") or [point["accuracy"]] * 2 for point in mine]
        off = [
            [max(0.0, point["accuracy"] - end[0]) for point, end in zip(mine, ends, strict=True)],
            [max(0.0, end[1] - point["accuracy"]) for point, end in zip(mine, ends, strict=True)],
        ]
        handles[policy] = panel.errorbar(
            [point[cost] for point in mine], [point["accuracy"] for point in mine], yerr=off,
            elinewidth=0.6, alpha=0.9, **style_of(i, policy),
        )  # fmt: skip
    for point in points:
        if point["policy"] == "full":
            style = {"color": "black", "marker": "*", "markersize": 10, "linestyle": "none"}
            (handles["full"],) = panel.plot([point[cost]], [full or point["accuracy"]], **style)
    panel.set_xscale("log")
    write = duration if "ms" in cost else size
    panel.xaxis.set_major_locator(LogLocator(10, (1, 1.5, 2, 3, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: write(x)))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(-0.04, 1.04)
    panel.set_ylabel("exact answers", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    return handles
