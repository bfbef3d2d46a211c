"""Measure private answers about a document of the client's own: a table of docs/benchmarks.md.

    python -m tools.bench_document [--model DIR] [--tokens 6] [--private 128,512] [--private-policy SPEC ...]
                                   [--protocol P]

Prints a Markdown row for each length and each rule by which the document is evicted, private against
plaintext in one run; without --model the weights are random, as in tools/bench_size.py. Linux, as it reads
/proc.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from mpcache.choices import ProtocolName
from mpcache.model import load_tokenizer
from tools.bench_size import PARTIES, make_model, run_generate, text_of

PRIVATE_HEAD = (
    "| own tokens, kept | chunks | reading, plaintext s | private s | ratio | rounds | online, dealer's MB "
    "| eviction, s | rounds | online, dealer's MB | token, plaintext ms | private ms | ratio "
    "| online, dealer's MB | same tokens | CPU s, server, client, dealer | memory GB, the same |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def measure_private(model: Path, given: argparse.Namespace, tokens: int, rule: str) -> str:
    """Run one answer about a document of so many tokens, and return its row."""
    document = text_of(load_tokenizer(model), tokens)
    flags = ["--policy", "full", "--private-policy", rule, "--protocol", given.protocol]
    answered = run_generate(model, given, {"--private-context": document}, *flags)
    found, cpu, peak = answered.found, answered.cpu, answered.peak
    private, plain, own = found["private"], found["plaintext"], found["client_document"]
    reading, eviction = own["reading"], own["eviction"]
    token, plain_token = private["ms_per_token_median"], plain["ms_per_token_median"]
    same = sum(a == b for a, b in zip(found["token_ids"], found["plaintext_token_ids"], strict=True))

    def sizes(part: dict[str, Any], more: str = "") -> str:
        return f"{part[f'online_bytes{more}'] / 1e6:.2f}, {part[f'offline_bytes{more}'] / 1e6:.1f}"

    evicted = (
        "| | "
        if eviction is None
        else (f"{eviction['ms'] / 1e3:.1f} | {eviction['rounds']} | {sizes(eviction)}")
    )
    return (
        f"| {own['tokens']}, {own['kept']} | {own['chunks']} | {plain['prefill_ms'] / 1e3:.2f} "
        f"| {reading['ms'] / 1e3:.1f} | {reading['ms'] / plain['prefill_ms']:.0f} "
        f"| {reading['rounds']} | {sizes(reading)} | {evicted} "
        f"| {plain_token:.0f} | {token:.0f} | {token / plain_token:.1f} | {sizes(private, '_per_token')} "
        f"| {same} of {len(found['token_ids'])} "
        f"| {', '.join(f'{cpu[name]:.1f}' for name in PARTIES)} "
        f"| {', '.join(f'{peak[name]:.1f}' for name in PARTIES)} |"
    )


def main() -> None:
    """Print the table's head and its rows."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--question", type=int, default=14)
    arguments.add_argument("--tokens", type=int, default=6)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--private", default="128,512", help="tokens of the document")
    arguments.add_argument("--private-policy", action="append", help="[full, mpcache:n_keep=0.25]")
    arguments.add_argument("--protocol", default=ProtocolName.FAST)
    given = arguments.parse_args()
    print(PRIVATE_HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if (model := given.model) is None:
            make_model(model := Path(folder), given.layers)
        rules = given.private_policy or ["full", "mpcache:n_keep=0.25"]
        for tokens, rule in product(map(int, given.private.split(",")), rules):
            print(measure_private(model.resolve(), given, tokens, rule), flush=True)


if __name__ == "__main__":
    main()
