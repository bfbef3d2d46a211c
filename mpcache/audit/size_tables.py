"""`mpcache audit --sizing`: what each party's machine needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mpcache.audit.cost_tables import CostTable
from mpcache.audit.exports import print_tables
from mpcache.console.inputs import listed
from mpcache.cost.sizing import sizing
from mpcache.engines.registry import PROTOCOLS
from mpcache.model import ModelShape
from mpcache.report.units import number, size

EXPLAINED = (
    "Memory is an estimate for one session, within a tenth for a model of 135 M parameters; each further "
    "session adds the column of that name at server and client. disk: the dealer's, with --setup-dir. "
    "first, token: what the dealer sends for a question and for a token; online: each party's, a token."
)
Asked = tuple[str, ModelShape, Sequence[int]]  # a model's name, its shape, contexts in tokens


def show_sizing(
    asked: Sequence[Asked], policies: Sequence[str], question: int, protocol: str, form: str, as_json: bool
) -> None:
    """Print a row per model, policy, protocol and context. Raises BadInput or PolicyError."""
    protocols = listed("--protocol", protocol, PROTOCOLS)
    rows = [
        {"model": name, **sizing(shape, policy, context, question, way)}
        for name, shape, contexts in asked
        for policy in policies
        for way in protocols
        for context in contexts
    ]
    if as_json:
        print(json.dumps({"sizing": rows}))
        return
    print_tables([_table(rows)], rows, form, EXPLAINED)


def _table(rows: Sequence[dict[str, Any]]) -> CostTable:
    names = ["model", "policy", "context", "server", "client", "dealer", "session", "disk", "first", "token"]
    names += ["online", "rounds"]
    lines = []
    for row in rows:
        policy = row["policy"] if row["protocol"] == "fast" else f"{row['policy']}, {row['protocol']}"
        amounts = [*row["memory_bytes"].values(), row["session_bytes"], row["dealer_disk_bytes"]]
        amounts += [row[f"{name}_bytes"] for name in ("dealer_question", "dealer_token", "online_token")]
        line = [row["model"], policy, number(row["context_tokens"]), *map(size, amounts)]
        lines.append([*line, number(row["rounds_per_token"])])
    numeric = [name not in ("model", "policy") for name in names]
    return CostTable("What each party's machine needs", names, numeric, lines)
