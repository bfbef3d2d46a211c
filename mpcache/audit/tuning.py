"""`mpcache audit --tune`: the cheapest setting whose measured quality holds, among all that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from mpcache.audit.cost_tables import CostTable
from mpcache.audit.priced_rows import AuditGrid
from mpcache.cost.planner import Situation, tune
from mpcache.cost.quality_file import Quality
from mpcache.report.units import duration

Tuned = dict[str, Any]


def tuned(quality: Quality, grid: AuditGrid, at_least: float) -> list[Tuned]:
    """Choose for each context, protocol and network of the grid. Raises PolicyError."""
    found = []
    for context, protocol, network in product(grid.contexts, grid.protocols, grid.networks):
        where = Situation(
            grid.shape, context, grid.question, grid.new_tokens, network, protocol, reveal=grid.reveal
        )
        choice = tune(quality, where, at_least)
        found.append(
            {
                "context_tokens": context, "protocol": protocol, "network": network.name,
                "new_tokens": grid.new_tokens, "at_least": at_least, "policy": choice.spec,
                "why": choice.why, "weighed": [asdict(each) for each in choice.weighed],
            }
        )  # fmt: skip
    return found


def tuning_tables(choices: Sequence[Tuned]) -> Iterator[CostTable]:
    """Make a table of each choice: the settings that hold by time, then the others."""
    names = ["policy", "of the tokens", "answers kept, at least", "in task", "n", "an answer"]
    for choice in choices:
        title = f"context {choice['context_tokens']:,} tokens, network {choice['network']}: {choice['why']}"
        lines = []
        for each in choice["weighed"]:
            without = "more than needed" if each["least"] >= choice["at_least"] else "not good enough"
            time = without if each["ms"] is None else duration(each["ms"])
            kept = f"{100 * each['least']:.0f} %"
            lines.append(
                [each["spec"], f"{each['percent']:g} %", kept, each["task"], str(each["asked"]), time]
            )
        yield CostTable(title, names, [name not in ("policy", "in task") for name in names], lines)
