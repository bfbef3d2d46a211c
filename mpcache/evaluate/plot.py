"""Quality against budget, one panel per task and question, as an SVG file. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpcache.errors import BadInput
from mpcache.evaluate.results import EvalRow
from mpcache.policy.plan import FULL_PERCENT

COLUMNS = 3


def check_plot(file: Path) -> None:
    """Check before anything is computed that a plot can be drawn. Raises BadInput."""
    if find_spec("matplotlib") is None:
        raise BadInput("--plot needs matplotlib, which is not installed: pip install 'mpcache[plot]'")
    if file.suffix != ".svg":
        raise BadInput(f"--plot {file}: give a name that ends in .svg")
    if file.is_dir() or not file.parent.is_dir():
        raise BadInput(f"--plot {file}: there is no folder {file.parent} to put a file of this name in")


def plot(rows: Sequence[EvalRow], file: Path) -> None:
    """Draw the plain rows of judged tasks; the full cache is the dashed line. Raises BadInput."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mpcache"  # the same rows give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    shown = [row for row in rows if row["engine"] == "plain" and row["judged"]]
    kinds = list(dict.fromkeys((row["task"], row["question"]) for row in shown))
    policies = [p for p in dict.fromkeys(row["policy"] for row in shown) if p != "full"]
    columns = min(COLUMNS, max(1, len(kinds)))
    lines = -(-max(1, len(kinds)) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.3 * lines + 0.8), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for panel, kind in zip(axes.flat, kinds, strict=False):
        mine = [row for row in shown if (row["task"], row["question"]) == kind]
        handles |= _panel(panel, mine, policies)
        panel.set_title(f"{kind[0]}, question {kind[1]}", fontsize=10)
    for panel in axes.flat[len(kinds) :]:
        panel.set_axis_off()
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=4,
            fontsize=8,
            frameon=False,
        )
    try:
        figure.savefig(file, format="svg", metadata={"Date": None})
    except OSError as error:
        raise BadInput(f"{file}: cannot be written: {error.strerror or error}") from None
    finally:
        pyplot.close(figure)


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
        style = {"linewidth": 2.4 if policy.startswith("mpcache") else 1.2, "color": f"C{i % 10}"}
        style |= {"marker": "os^vD<>Ph*"[i % 10], "markersize": 4}
        (handles[policy],) = panel.plot(
            [r["budget_percent"] for r in mine], [r[value] for r in mine], **style
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [f"{b} %" for b in budgets])
    panel.minorticks_off()
    panel.set_xlabel("attended tokens, of the context", fontsize=8)
    panel.set_ylabel("bits per byte" if by_bits else "exact answers", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    if not by_bits:
        panel.set_ylim(-0.04, 1.04)
    return handles
