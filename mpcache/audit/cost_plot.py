"""Plots of an audit: cost by context, quality by cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpcache.audit.priced_rows import AuditRow
from mpcache.cost.quality_file import TOGETHER, Quality
from mpcache.report.plots import COUNTS, figure_of, legend_below, log_axis, style_of
from mpcache.report.units import BYTES, DURATIONS, Unit, duration, number, size

# By amount: what its axis says, its units, and how its numbers are written.
Axis = tuple[str, Sequence[Unit], Callable[[float], str]]
BY_CONTEXT: Mapping[str, Axis] = {
    "rounds_per_token": ("rounds per token", COUNTS, number),
    "online_bytes_per_token": ("online bytes per token and party", BYTES, size),
    "offline_bytes_per_token": ("dealer's bytes per token", BYTES, size),
    "total_ms_per_token": ("time per token, modelled, {network}", DURATIONS, duration),
}
COSTS = {name: BY_CONTEXT[name] for name in ("total_ms_per_token", "offline_bytes_per_token")}
BEST = "nothing cheaper is as good"  # the frontier, in the legend


def plot_contexts(audits: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw rounds, bytes and time by context: a line per policy, a column per model. Raises BadInput.

    Of several networks and protocols the first is drawn.
    """
    with figure_of(file, len(BY_CONTEXT), len(audits), sharex="col") as (figure, panels):
        handles: dict[str, Any] = {}
        for column, audit in enumerate(audits):
            first = audit["rows"][0]
            rows = [
                row
                for row in audit["rows"]
                if all(row[name] == first[name] for name in ("network", "protocol"))
            ]
            for panel, (cost, axis) in zip(panels[:, column], BY_CONTEXT.items(), strict=True):
                for i, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
                    mine = [row for row in rows if row["policy"] == policy]
                    x, y = [row["context_tokens"] for row in mine], [row[cost] for row in mine]
                    (handles[policy],) = panel.plot(x, y, **style_of(i, policy))
                panel.set_yscale("log")
                panel.set_ylabel(axis[0].format(network=first["network"]))
                log_axis(panel.yaxis, panel.get_ylim(), *axis[1:], most=8)
                panel.grid(alpha=0.3)
            _contexts(panels[-1, column], sorted({row["context_tokens"] for row in rows}))
            panels[0, column].set_title(f"{audit['shape']}, protocol {first['protocol']}")
        legend_below(figure, handles)


def _contexts(panel: Any, tokens: Sequence[int]) -> None:
    """Let the axis that a column's panels share name the contexts."""
    from matplotlib.ticker import NullLocator

    panel.set_xscale("log", base=2)
    panel.set_xticks(tokens)
    panel.xaxis.set_major_formatter(lambda n, _: number(n))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("context, tokens")


def plot_cost(points: Sequence[AuditRow], file: Path, shape: str, measured: Quality) -> None:
    """Draw the points of one context, network and protocol, asked after the document. Raises BadInput.

    Of a chat, all tasks together.  shape: the model that is priced.  measured: what the accuracy is of; where
    only what the full cache answers was judged, the full cache has all.
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
    length = f", {measured.context:,} tokens" if measured.context else ""
    lines, columns = (len(tasks), len(COSTS)) if len(tasks) > 1 else (len(COSTS), 1)
    with figure_of(file, lines, columns, sharey=True) as (figure, panels):
        figure.suptitle(
            f"accuracy: {measured.model or 'a model without a name'}{length}; bars: 95 %\n"
            f"cost: {shape}, {first['context_tokens']:,} tokens, protocol {first['protocol']}"
        )
        handles: dict[str, Any] = {}
        for task, of_task in zip(tasks, panels.reshape(-1, len(COSTS)), strict=False):
            mine = [point for point in shown if point.get("task", "") == task]
            asked = sorted({point.get("n", 0) for point in mine if point["policy"] != "full"})
            n = "" if not asked else f", n = {asked[0]}" + (f" to {asked[-1]}" if len(asked) > 1 else "")
            for panel, (cost, axis) in zip(of_task, COSTS.items(), strict=True):
                handles |= _panel(panel, mine, policies, cost, 1.0 if measured.by_question else None)
                panel.set_title(f"{task or 'all'}{n}, question after")
                panel.set_xscale("log")
                panel.set_xlabel(axis[0].format(network=first["network"]))
                log_axis(panel.xaxis, panel.get_xlim(), *axis[1:], most=6)
        for panel in panels[:, 0]:
            panel.set_ylabel("exact answers")
        legend_below(figure, handles)


def _panel(
    panel: Any,
    points: Sequence[Mapping[str, Any]],
    policies: Sequence[str],
    cost: str,
    full: float | None,
) -> dict[str, Any]:
    """Draw one task; a line per policy, its budgets in order.  full: its share, if not what its row says."""
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
    whole = [(point[cost], full or point["accuracy"]) for point in points if point["policy"] == "full"]
    if whole:
        style = {"color": "black", "marker": "*", "markersize": 8, "linestyle": "none"}
        (handles["full"],) = panel.plot(*zip(*whole, strict=True), **style)
    found = [(p[cost], p["accuracy"]) for p in points if p["policy"] != "full"]
    if best := list(frontier([*found, *whole])):
        style = {"color": "black", "linestyle": (0, (5, 3)), "linewidth": 0.7, "zorder": 3}
        (handles[BEST],) = panel.plot(*zip(*best, strict=True), **style)
    panel.set_ylim(-0.04, 1.04)
    panel.grid(alpha=0.3)
    return handles


def frontier(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the points (cost, accuracy) that are better than all that cost no more, from the cheapest on."""
    best = -1.0
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > best:
            best = accuracy
            yield cost, accuracy
