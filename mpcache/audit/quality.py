"""Answer quality beside cost: the rows of `mpcache eval --json`, priced."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mpcache.audit.priced_rows import AuditGrid, AuditRow, price_setting, resolved
from mpcache.choices import ProtocolName
from mpcache.cost.rates import modelled, pace_ms
from mpcache.errors import BadInput, PolicyError
from mpcache.policy import parse_policy
from mpcache.policy.plan import FULL_PERCENT

FIELDS = ("task", "question", "n", "engine")  # beside what is checked


def read_quality(path: Path) -> tuple[str, list[AuditRow]]:
    """Read rows with `policy` and `accuracy` (0 to 1), as `mpcache eval --json` prints them.

    The model's name comes with them, empty where the file has none.

    Raises BadInput, or PolicyError where a row names a policy that is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON"
        raise BadInput(f"{path}: cannot be read: {why}") from None
    listed = data.get("rows") if isinstance(data, dict) else data
    rows = listed if isinstance(listed, list) else []
    if not rows or not all(map(_is_quality, rows)):
        raise BadInput(
            f"{path}: holds no rows with policy, accuracy (0 to 1) and budget_percent, as "
            "`mpcache eval --json` prints them"
        )
    for row in rows:
        parse_policy(row["policy"])
    model = data.get("model") if isinstance(data, dict) else None
    return model[:80] if isinstance(model, str) else "", rows


def _is_quality(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("policy"), str):
        return False
    budget, ends = row.get("budget_percent", FULL_PERCENT), row.get("ci95", [0, 1])
    return (
        _between(row.get("accuracy"), 1)
        and _between(budget, FULL_PERCENT)
        and isinstance(ends, list)
        and len(ends) == 2
        and all(_between(end, 1) for end in ends)
    )


def _between(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def points(
    evaluated: Sequence[AuditRow], grid: AuditGrid, note: Callable[[str], None], other: str | None = None
) -> list[AuditRow]:
    """Price each evaluated row at each context, protocol and network of the grid.

    A point is a row's accuracy beside what one token costs there; a budget is in percent of that context.
    note: hears what has no price, and why.  other: the model that was evaluated, if it is not the one that
    is priced; each point says so.
    """
    found: list[AuditRow] = []
    unpriced: dict[str, None] = {}
    for row, context, protocol in product(evaluated, grid.contexts, grid.protocols):
        budget = row.get("budget_percent", FULL_PERCENT)
        try:
            policy = parse_policy(row["policy"]).at_percent(budget, context, grid.shape)
            price_setting(grid, policy.spec, context, ProtocolName.FAST)
        except PolicyError as error:
            unpriced[f"no price beside its quality: {row['policy']} at {budget:g} %: {error}"] = None
            continue
        for network in grid.networks:
            taken = resolved(grid, policy.spec, context, protocol, network)
            cost = price_setting(grid, policy.spec, context, taken)
            tally = cost.total("decode")
            found.append(
                {
                    **{name: row[name] for name in FIELDS if name in row},
                    "accuracy_of": other,
                    "policy": row["policy"],
                    "budget_percent": budget,
                    "accuracy": row["accuracy"],
                    "ci95": row.get("ci95"),
                    "priced": policy.spec,
                    "protocol": taken,
                    "network": network.name,
                    "context_tokens": context,
                    "modelled_ms_per_token": round(sum(modelled(cost, network).values()), 3),
                    "total_ms_per_token": round(pace_ms(cost, network), 3),
                    "rounds_per_token": tally.rounds / cost.steps,
                    "online_bytes_per_token": tally.online / cost.steps,
                    "offline_bytes_per_token": tally.offline / cost.steps,
                }
            )
    for text in unpriced:
        note(text)
    return found
