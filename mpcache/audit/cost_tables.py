"""The audit for people: tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mpcache.audit.priced_rows import AuditRow
from mpcache.report.units import BYTES, DURATIONS, Unit, duration, in_one_unit, number, size

PARTS = {"layer": "layers", "op": "ops"}


@dataclass(frozen=True)
class CostTable:
    """A table in words, as every output shows it. numeric: of each column, whether it stands to the right."""

    title: str
    names: Sequence[str]
    numeric: Sequence[bool]
    lines: Sequence[Sequence[str]]

    def for_people(self) -> Table:
        """Lay it out for a terminal."""
        table = Table(
            title=self.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        columns = zip(self.names, self.numeric, zip(*self.lines, strict=True), strict=True)
        for i, (name, right, cells) in enumerate(columns):
            if i == 0:
                table.add_column(name, overflow="fold", min_width=12)
                continue
            widest = max(map(len, (name, *cells)))  # rich would break a name at its blank
            table.add_column(name, justify="right" if right else "left", no_wrap=True, min_width=widest)
        for line in self.lines:
            table.add_row(*line)
        return table


def cost_tables(rows: Sequence[AuditRow], model: str = "") -> Iterator[CostTable]:
    """Make a table per protocol and context: a row per policy, with times and ratio per network.

    A column has one unit, which its name gives. A cell is empty where `auto` picked another protocol on that
    network. model: for the titles.
    """
    of_model = f"{model}, " if model else ""
    for (protocol, context), group in groupby(rows, lambda r: (r["protocol"], r["context_tokens"])):
        mine = list(group)
        networks = list(dict.fromkeys(r["network"] for r in mine))
        policies: dict[str, dict[str, AuditRow]] = {}
        for row in mine:
            policies.setdefault(row["policy"], {})[row["network"]] = row
        firsts = [next(iter(of.values())) for of in policies.values()]
        columns = [
            ("policy", [row["policy"] for row in firsts]),
            ("kept/used", [f"{row['kept_tokens']}/{row['attended_tokens']}" for row in firsts]),
            ("rounds", [number(row["rounds_per_token"]) for row in firsts]),
            _column("online", [row["online_bytes_per_token"] for row in firsts], BYTES),
            _column("offline", [row["offline_bytes_per_token"] for row in firsts], BYTES),
        ]
        for network in networks:
            there = [of.get(network) for of in policies.values()]
            columns += [
                _column(network, [row["total_ms_per_token"] if row else None for row in there], DURATIONS),
                _column("dealer", [row["offline_transfer_ms"] if row else None for row in there], DURATIONS),
                ("ratio", [f"{row['ratio_to_full']:.2f}" if row else "" for row in there]),
            ]
        columns.append(("leaks", [row["leakage"] for row in firsts]))
        names = [name for name, _ in columns]
        numeric = [name not in ("policy", "leaks") for name in names]
        lines = list(zip(*(cells for _, cells in columns), strict=True))
        title = f"{of_model}context {context:,} tokens, protocol {protocol}: one generated token"
        yield CostTable(title, names, numeric, lines)


def _column(name: str, values: Sequence[float | None], units: Sequence[Unit]) -> tuple[str, list[str]]:
    unit, cells = in_one_unit([value for value in values if value is not None], units)
    known = iter(cells)
    return f"{name}, {unit}", ["" if value is None else next(known) for value in values]


def measured_tables(rows: Sequence[AuditRow]) -> Iterator[CostTable]:
    """Make a table per protocol and context: modelled and measured, a line per policy and network."""
    names = ["policy", "network", "modelled", "measured", "diff", "p95", "first token", "rounds", "online"]
    names.append("offline")
    for (protocol, context), group in groupby(rows, lambda r: (r["protocol"], r["context_tokens"])):
        lines = []
        for row in group:
            modelled = row["total_ms_per_token"]
            bound = "*" if row["offline_transfer_ms"] > row["modelled_ms_per_token"] else ""
            cells = [row["policy"], row["network"], duration(modelled) + bound]
            if row["measured_ms_per_token"] is None:
                lines.append([*cells, "not run", *[""] * (len(names) - 4)])
                continue
            cells += [duration(row["measured_ms_per_token"]), f"{100 * row['difference']:+.0f} %"]
            cells += [duration(row["measured_ms_p95"]), duration(row["measured_first_token_ms"])]
            for name, show in (("rounds", number), ("online_bytes", size), ("offline_bytes", size)):
                found, exact = row[f"measured_{name}_per_token"], row[f"{name}_per_token"]
                cells.append(show(found) + ("" if found == exact else f" not {show(exact)}"))
            lines.append(cells)
        title = f"context {context:,} tokens, protocol {protocol}: measured beside modelled"
        yield CostTable(title, names, [name not in ("policy", "network") for name in names], lines)


def verdict(result: Mapping[str, Any]) -> Iterator[str]:
    """Say in lines what the measurement tells about the model."""
    rounds = [rate["round_ms"] for rate in result["calibration"]]
    if rounds:
        yield (
            f"calibrated without a network, {len(rounds)} setting{'s' * (len(rounds) != 1)}: computation and "
            f"messages take {min(rounds):.2f} to {max(rounds):.2f} ms per round on this machine"
        )
    for network, error in result["model_error"].items():
        yield (
            f"model against {error['runs']} run{'s' * (error['runs'] != 1)} on {network}: off by "
            f"{100 * error['mean']:.0f} % on average, {100 * error['largest']:.0f} % at most"
        )
    if result["runs"]["measured"] < result["runs"]["planned"]:
        yield f"stopped after {result['runs']['measured']} of {result['runs']['planned']} runs"
    yield (
        "measured: median over decode steps. diff: measured over modelled, less one. rounds and bytes as the "
        "parties' ledgers have them; * where the dealer's bytes take longer than the token."
    )


def breakdowns(rows: Sequence[AuditRow], by: str) -> Iterator[CostTable]:
    """Show which layer or operation pays, per policy, protocol and context; the network does not matter."""
    seen = set()
    for row in rows:
        key = row["policy"], row["protocol"], row["context_tokens"]
        if key in seen:
            continue
        seen.add(key)
        parts = [(label(part, by), part) for part in row[PARTS[by]]]
        if by == "layer":
            parts = _alike(parts) + [("outside", row["outside_layers"])]
        totals = [max(1, row[f"{name}_bytes_per_token"]) for name in ("online", "offline")]
        lines = []
        for name, part in parts:
            online, offline = part["online_bytes"], part["offline_bytes"]
            times = part.get("times", 1)
            lines.append([
                name, number(part["rounds"]),
                size(online), f"{100 * online * times / totals[0]:.1f}",
                size(offline), f"{100 * offline * times / totals[1]:.1f}",
            ])  # fmt: skip
        title = f"{row['policy']}, context {row['context_tokens']:,}, {row['protocol']}, by {by}"
        yield CostTable(title, [by, "rounds", "online", "%", "offline", "%"], [False, *[True] * 5], lines)


def label(part: AuditRow, by: str) -> str:
    """Name a part of a row: its operation, or its layer."""
    if by == "op":
        return str(part["op"])
    return f"{part['layer']}{' (shares selection)' if part['shares_selection'] else ''}"


def _alike(parts: Sequence[tuple[str, AuditRow]]) -> list[tuple[str, AuditRow]]:
    """Put neighbouring layers of the same cost into one line, with the amounts of each."""
    merged: list[tuple[str, AuditRow]] = []

    def cost_of(item: tuple[str, AuditRow]) -> Any:
        return {k: v for k, v in item[1].items() if k != "layer"}

    for _, group in groupby(parts, cost_of):
        first, *rest = group
        name = f"{first[0]} to {rest[-1][0]}, each" if rest else first[0]
        merged.append((name, first[1] | {"times": 1 + len(rest)}))
    return merged
