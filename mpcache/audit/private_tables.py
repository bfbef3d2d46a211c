"""What a document of the client's own costs, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpcache.audit.cost_tables import CostTable
from mpcache.report.units import duration, number, size

EXPLAINED = (
    "online: bytes sent by each computing party; offline: by the dealer. token: one of the answer, with all "
    "of the document and with what is kept. pays from: tokens of an answer from which on the eviction costs "
    "less than it saves, in all bytes and in modelled time."
)
PARTS = {"reading": "reading", "eviction": "eviction", "token_with_all": "token, all", "token": "token, kept"}


def private_table(name: str, rows: Sequence[dict[str, Any]]) -> CostTable:
    """Lay out a line for each part of each row."""
    lines = []
    for row in rows:
        pays = [row[f"pays_from_tokens_by_{way}"] for way in ("bytes", "time")]
        paid = ", ".join("never" if n is None else str(n) for n in pays)
        tokens = ", ".join(str(row[f"{name}_tokens"]) for name in ("private", "chunk", "kept"))
        for part, told in PARTS.items():
            if (cost := row[part]) is None:
                continue
            amounts = [number(cost["rounds"]), size(cost["online_bytes"]), size(cost["offline_bytes"])]
            amounts += [duration(cost["modelled_ms"]), paid if part == "eviction" else ""]
            lines.append([row["private_policy"], tokens, row["protocol"], row["network"], told, *amounts])
    names = ["private policy", "tokens, at once, kept", "protocol", "network", "what", "rounds", "online"]
    names += ["offline", "time", "pays from"]
    text = ("private policy", "protocol", "network", "what")
    title = f"The client's own document, read and evicted on shares: {name}"
    return CostTable(title, names, [name not in text for name in names], lines)
