"""Answer quality beside cost: the rows of `mpcache eval --json`, priced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product

from mpcache.audit.priced_rows import AuditGrid, AuditRow, price_setting, resolved
from mpcache.choices import ProtocolName
from mpcache.cost.rates import modelled, pace_ms
from mpcache.errors import PolicyError
from mpcache.policy import parse_policy
from mpcache.policy.plan import FULL_PERCENT
from mpcache.report.clock import Clock

FIELDS = ("task", "question", "n", "engine")  # beside what is checked


def points(
    evaluated: Sequence[AuditRow], grid: AuditGrid, note: Callable[[str], None], other: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[AuditRow]:  # fmt: skip
    """Price each evaluated row at each context, protocol and network of the grid.

    A point is a row's accuracy beside what one token costs there; a budget is in percent of that context.
    note: hears what has no price, and why.  other: the model that was evaluated, if it is not the one that
    is priced; each point says so.  say: hears how far it is.
    """
    found: list[AuditRow] = []
    unpriced: dict[str, None] = {}
    price = cache(partial(price_setting, grid))  # every task has the same settings
    settings = {(row["policy"], row.get("budget_percent", FULL_PERCENT)) for row in evaluated}
    clock, heard = Clock(len(settings) * len(grid.contexts) * len(grid.protocols)), set()
    for row, context, protocol in product(evaluated, grid.contexts, grid.protocols):
        budget = row.get("budget_percent", FULL_PERCENT)
        if (asked := (row["policy"], budget, context, protocol)) not in heard:
            heard.add(asked)
            far = f"setting {len(heard)} of {clock.whole}"
            say(f"prices beside quality, {far}: {row['policy']} at {budget:g} %{clock.left()}")
        try:
            policy = parse_policy(row["policy"]).at_percent(budget, context, grid.shape)
            price(policy.spec, context, ProtocolName.FAST)
        except PolicyError as error:
            unpriced[f"no price beside its quality: {row['policy']} at {budget:g} %: {error}"] = None
            continue
        for network in grid.networks:
            taken = resolved(grid, policy.spec, context, protocol, network)
            cost = price(policy.spec, context, taken)
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
