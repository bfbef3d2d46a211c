"""The audit as data: one row per policy, protocol, context and network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

from mpcache.choices import ProtocolName, Reveal
from mpcache.cost.choose import AUTO, pick
from mpcache.cost.pricing import price
from mpcache.cost.rates import RATES, Rates, modelled, offline_ms, pace_ms
from mpcache.cost.tally import Cost, Tally
from mpcache.errors import PolicyError
from mpcache.limits import check_padding
from mpcache.model import ModelShape
from mpcache.policy import parse_policy
from mpcache.report.units import duration, whole
from mpcache.sweeping.journal import Outcome
from mpcache.sweeping.runner import FAILED, Batch, CellRunner
from mpcache.transport.network import Profile

AuditRow = dict[str, Any]
Setting = tuple[str, str, int]  # policy, protocol, context in tokens


@dataclass(frozen=True)
class AuditGrid:
    """What is priced. policies: `NAME[:key=value,...]`; explicit: the user named them.

    pad: the question's length is public up to its multiples.
    """

    shape: ModelShape
    contexts: Sequence[int]
    policies: Sequence[str]
    networks: Sequence[Profile]
    protocols: Sequence[str]
    question: int
    new_tokens: int
    explicit: bool = True
    reveal: Reveal = Reveal.LOGITS
    pad: int = 1

    def about(self, by: str | None) -> dict[str, Any]:
        """Return what each cell depends on beside its own name: what a journal belongs to."""
        return {
            "sweep": "audit", "shape": self.shape.to_dict(), "by": by, "reveal": self.reveal.value,
            "networks": [network.name for network in self.networks], "question": self.question,
            "new_tokens": self.new_tokens, "pad": self.pad,
        }  # fmt: skip


@dataclass(frozen=True)
class Priced:
    """A setting's cost, and how fast this machine computes it."""

    cost: Cost
    rates: Rates


def price_rows(
    grid: AuditGrid,
    by: str | None = None,
    rates: Mapping[Setting, Rates] | None = None,
    note: Callable[[str], None] = lambda text: None,
    runner: CellRunner | None = None,
) -> list[AuditRow]:
    """Price the grid: a row per policy, protocol, context and network. Raises PolicyError.

    by: `layer` or `op`, which each row is broken down by.  rates: of each setting, where they were measured.
    note: hears what was left out and why.  runner: where the settings are priced, and kept.

    Units: rounds, bytes, ms, per generated token; `online_bytes` is sent by one computing party (the
    mean of both), `offline_bytes` by the dealer. `total_ms`: the larger of the modelled latency and the
    transfer of the dealer's bytes. `ratio_to_full`: that over the one of `full`.
    """
    asked = [SettingsAsked(grid, by, *place) for place in product(grid.contexts, grid.protocols)]
    batches = [Batch(one.shown, tuple(grid.policies), one) for one in asked]
    rows: dict[int, list[AuditRow]] = {}

    def here(one: SettingsAsked, wanted: Sequence[int]) -> Iterator[Outcome]:
        return one.outcomes(wanted, rates or {})

    runner, paces = runner or CellRunner(), " / ".join(network.name for network in grid.networks)
    places = [(spec, one.shown) for one in asked for spec in grid.policies]
    runner.table.begin(f"a generated token, {paces}", "policy", places, len(places))

    def seen(n: int, i: int, outcome: Outcome) -> None:
        runner.table.put(places[n * len(grid.policies) + i], _in_short(outcome))

    for n, outcomes in runner.run(batches, here, seen):
        rows[n] = []
        for outcome in outcomes:
            for text in outcome.get("notes", ()):
                note(text)
            if "left out" in outcome:
                where, why = f"at a context of {asked[n].context} tokens", outcome["left out"]
                if grid.explicit:
                    raise PolicyError(f"{where}, {why}")
                note(f"left out {where}: {why}")
            rows[n] += outcome.get("rows", [])
    found = [row for n in sorted(rows) for row in rows[n]]
    if AUTO in grid.protocols:  # rows of one protocol stand together, for tables
        found.sort(key=lambda row: (grid.contexts.index(row["context_tokens"]), row["protocol"]))
    return found


@dataclass(frozen=True)
class SettingsAsked:
    """The policies of a grid at one context and protocol: what a worker elsewhere is told."""

    grid: AuditGrid
    by: str | None
    context: int
    protocol: str

    @property
    def shown(self) -> str:
        """The column of these policies in the table that fills."""
        return f"{self.context} tokens, {self.protocol}"

    def outcomes(self, wanted: Sequence[int], rates: Mapping[Setting, Rates]) -> Iterator[Outcome]:
        """Yield each wanted policy's rows, or why it was left out; and notes."""
        grid, context = self.grid, self.context

        @cache  # the same on every network, and `full` beside every policy
        def priced(spec: str, protocol: str) -> Priced:
            cost = price_setting(grid, spec, context, protocol)
            return Priced(cost, rates.get((cost.policy.spec, protocol, context), RATES))

        for spec in (grid.policies[i] for i in wanted):
            notes: list[str] = []
            rows = []
            try:
                for network in grid.networks:
                    taken = resolved(grid, spec, context, self.protocol, network, notes.append)
                    one, full = priced(spec, taken), priced("full", taken)
                    rows.append(_row(one, context, network, full, self.by))
                yield {"notes": notes, "rows": rows}
            except PolicyError as error:
                yield {"notes": notes, "rows": rows, "left out": str(error)}


def _in_short(outcome: Outcome) -> str:
    """Write the times of a setting's rows, or why there are none, into one cell."""
    if FAILED in outcome:
        return FAILED
    times = [duration(row["total_ms_per_token"]) for row in outcome["rows"]]
    return " / ".join(times) or "left out"


def ask_settings(asked: SettingsAsked, wanted: Sequence[int]) -> Iterator[Outcome]:
    """Do so at a worker elsewhere."""
    return asked.outcomes(wanted, {})


def resolved(
    grid: AuditGrid, spec: str, context: int, protocol: str, network: Profile,
    note: Callable[[str], None] = lambda text: None,
) -> str:  # fmt: skip
    """Return the protocol that `auto` stands for here; any other one as it is. Raises PolicyError."""
    if protocol != AUTO:
        return protocol
    bound = price_setting(grid, spec, context, ProtocolName.FAST).policy
    choice = pick(
        grid.shape, bound, context, grid.question, grid.new_tokens, network, reveal=grid.reveal, grid=grid.pad
    )
    note(f"{bound.spec} at {context} tokens: {choice}")
    return choice.protocol


def price_setting(grid: AuditGrid, spec: str, context: int, protocol: str) -> Cost:
    """Price one setting of the grid. Raises PolicyError."""
    policy = parse_policy(spec)
    if policy.in_the_clear:
        raise PolicyError(f"policy {policy.spec}: runs in plaintext only, so it has no price")
    bound = policy.bind(context, grid.shape)
    if grid.pad > 1:
        check_padding(grid.shape, policy)
    return price(
        grid.shape, bound, context, grid.question, protocol, grid.new_tokens, reveal=grid.reveal,
        grid=grid.pad,
    )  # fmt: skip


def _row(one: Priced, context: int, network: Profile, full: Priced, by: str | None) -> AuditRow:
    priced = one.cost
    plan, policy, steps = priced.policy.plan, priced.policy.policy, priced.steps
    tally, first = priced.total("decode"), priced.total("question")
    ms = modelled(one.cost, network, one.rates)
    total, base = (pace_ms(each.cost, network, each.rates) for each in (one, full))
    row: AuditRow = {
        "policy": policy.spec,
        "protocol": priced.protocol,
        "network": network.name,
        "round_trip_ms": network.rtt_ms,
        "mbps": network.mbps if network.mbps < math.inf else None,
        "context_tokens": context,
        "kept_tokens": plan.kept,
        "attended_tokens": plan.attended,
        **_three(tally, steps, "_per_token"),
        "modelled_ms_per_token": round(sum(ms.values()), 3),
        "total_ms_per_token": round(total, 3),
        "ratio_to_full": round(total / base, 4),
        "leakage": policy.leak,
        "modelled_parts_ms": {name: round(value, 3) for name, value in ms.items()},
        "offline_transfer_ms": round(offline_ms(priced, network), 3),
        "question": _three(first, 1, ""),
        "setup_bytes": _sent(priced.total("setup")),
        "setup_bytes_warm": _sent(priced.total("setup"), held=True),
        "context_bytes": _sent(priced.total("context")),
        "context_bytes_warm": _sent(priced.total("context"), held=True),
        "counts_per_token": {name: _mean(value, steps) for name, value in _counts(tally).items()},
        "peak_bytes": priced.peak,
    }
    if by == "layer":
        shared = priced.shares_selection()
        layers = priced.by_layer("decode")
        row["outside_layers"] = _three(layers.pop(None, Tally()), steps, "")
        row["layers"] = [
            {"layer": i, "shares_selection": i in shared, **_three(layer, steps, "")}
            for i, layer in layers.items()
            if i is not None
        ]
    if by == "op":
        row["ops"] = [{"op": name, **_three(op, steps, "")} for name, op in priced.by_op("decode").items()]
    return row


def _three(tally: Tally, steps: int, suffix: str) -> dict[str, int | float]:
    return {
        f"rounds{suffix}": _mean(tally.rounds, steps),
        f"online_bytes{suffix}": _mean(tally.online, steps),
        f"offline_bytes{suffix}": _mean(tally.offline, steps),
    }


def _counts(tally: Tally) -> dict[str, int]:
    names = ("comparisons", "multiplications", "lookups", "multiply_adds")
    return {name: value for name, value in asdict(tally).items() if name in names}


def _sent(tally: Tally, held: bool = False) -> int:
    """Bytes of all parties together. held: the dealer holds already what the server would upload."""
    return tally.server_sent + tally.client_sent + tally.offline + (0 if held else tally.uploaded)


def _mean(amount: float, steps: int) -> int | float:
    """Per step, to three decimals."""
    return whole(round(amount / steps, 3))
