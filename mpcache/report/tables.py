"""What `mpcache generate` and `mpcache compare` show people: the cost card, and private beside plaintext."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from mpcache.report.units import duration, number, size


def card(run: Mapping[str, Any]) -> Table:
    """Lay out the cost card of one `summary`: private and plaintext side by side."""
    private, plain = run["private"], run["plaintext"]
    table = Table(
        title=f"Cost card: policy {run['policy']}, protocol {run['protocol']}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    table.add_column("private", justify="right", style="cyan")
    table.add_column("plaintext", justify="right")
    kept = sorted(set(run["kept_tokens"]))
    stay = " to " if len(kept) > 2 else " or "
    rows: Iterable[tuple[str, str, str]] = [
        ("tokens answered", str(len(run["token_ids"])), str(len(run["plaintext_token_ids"]))),
        ("same tokens", f"{100 * run['agreement']:.0f} %", ""),
        (
            "context tokens, kept",
            f"{run['context_tokens']}, {stay.join(map(str, sorted({kept[0], kept[-1]})))}",
            "the same",
        ),
        *_document_rows(run["client_document"]),
        ("prefill and eviction", duration(run["prefill_ms"]), duration(plain["prefill_ms"])),
        ("kernels of the plaintext path", run["kernels"], plain["kernels"]),
        (
            "first token, from the context on",
            duration(private["first_token_ms"]),
            duration(plain["first_token_ms"]),
        ),
        ("time per token", duration(private["ms_per_token"]), duration(plain["ms_per_token"])),
        ("rounds per token", number(private["rounds_per_token"]), ""),
        ("online bytes per token and party", size(private["online_bytes_per_token"]), ""),
        ("offline bytes per token (dealer)", size(private["offline_bytes_per_token"]), ""),
        ("set-up (once per model)", f"{size(run['setup_bytes'])}, {duration(run['setup_ms'])}", ""),
        ("context transfer (once per document)", size(run["context_bytes"]), ""),
        ("leakage beyond public sizes", run["leakage"], "everything"),
    ]
    if run["length_grid"] > 1:
        length = f"{run['question_tokens']}, padded to a multiple of {run['length_grid']}"
        rows = [("question tokens, as the others see", length, "as they are"), *rows]
    for row in rows:
        table.add_row(*row)
    return table


def _document_rows(document: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Say what reading and evicting the client's document took."""
    if document is None:
        return []

    def told(part: Mapping[str, Any]) -> str:
        return (
            f"{duration(part['ms'])}, {number(part['rounds'])} rounds,\n"
            f"{size(part['online_bytes'])} online, {size(part['offline_bytes'])} offline"
        )

    chunks, at_once = document["chunks"], document["chunk_tokens"]
    rows = [
        ("client's document, kept", f"{document['tokens']}, {document['kept']}", "the same"),
        (f"its reading, in {chunks} chunk{'s' * (chunks != 1)} of {at_once}", told(document["reading"]), ""),
    ]
    if document["eviction"] is not None:
        rows.append(("its eviction", told(document["eviction"]), ""))
    return rows


def comparison(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out each run in two rows: private, by the protocol's name, and plain."""
    table = Table(
        title="Private against plaintext",
        title_justify="left",
        title_style="bold",
        caption="first token: from the context on. Bytes per token: online of one computing party, "
        "offline of the dealer. agree: tokens equal to the plain answer's.",
        caption_justify="left",
    )
    for name in ("policy", "run"):
        table.add_column(name, overflow="fold")
    for name in ("kept", "prefill", "first token", "ms/token", "p95", "rounds", "online", "offline", "agree"):
        table.add_column(name, justify="right")
    for run in runs:
        private, plain = run["private"], run["plaintext"]
        kept = f"{max(run['kept_tokens'])}/{run['context_tokens']}"

        def times(one: Mapping[str, Any]) -> list[str]:
            names = ("first_token_ms", "ms_per_token_median", "ms_per_token_p95")
            return [duration(one[name]) for name in names]

        traffic = [
            number(private["rounds_per_token"]),
            size(private["online_bytes_per_token"]),
            size(private["offline_bytes_per_token"]),
        ]
        agree = f"{100 * run['agreement']:.0f} %"
        table.add_row(
            run["policy"],
            run["protocol"],
            kept,
            duration(run["prefill_ms"]),
            *times(private),
            *traffic,
            agree,
        )
        table.add_row("", "plain", "", duration(plain["prefill_ms"]), *times(plain), end_section=True)
    return table
