"""Measure private against plaintext answers on this machine: the table of docs/benchmarks.md.

    python tools/bench.py [--contexts 256 512 1000] [--protocols fast stock] [--model DIR] [--tokens 6]

Runs `mpcache compare` on documents of the given lengths (held-out verses with facts) and prints one
Markdown row for each policy and protocol. Latencies are this machine's, measured side by side in
one run; rounds and bytes are exact.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mpcache.demo.documents import make_document
from mpcache.model import demo_model_dir, load_tokenizer

HEAD = (
    "| context | policy | protocol | plaintext ms/token | private ms/token | rounds/token | "
    "online kB/token and party | offline kB/token | same tokens |\n|---|---|---|---|---|---|---|---|---|"
)


def compare(model: Path, document: str, question: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `mpcache compare --json` once and return its rows."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(document)
        file.flush()
        command = [sys.executable, "-m", "mpcache", "compare", "--json", "--no-stop-at-eos"]
        command += ["--model", str(model), "--context", file.name, "--question", question]
        command += ["--max-new-tokens", str(given.tokens)]
        for name in ("policy", "protocol"):
            for value in getattr(given, name):
                command += [f"--{name}", value]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    return rows


def main() -> None:
    """Print a row for each length, policy and protocol."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path, default=demo_model_dir())
    arguments.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1000])
    arguments.add_argument("--policy", nargs="+", default=["full", "mpcache"])
    arguments.add_argument("--protocol", nargs="+", default=["fast"])
    arguments.add_argument("--tokens", type=int, default=6)
    given = arguments.parse_args()
    tokenizer = load_tokenizer(given.model)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, bos=False))

    print(HEAD)
    for length in given.contexts:
        document, questions = make_document(random.Random(length), count, length, min(8, length // 32))
        for row in compare(given.model, document, questions[0][0], given):
            private, plain = row["private"], row["plaintext"]
            print(
                f"| {row['context_tokens']} | {row['policy']} | {row['protocol']} "
                f"| {plain['ms_per_token']:.0f} | {private['ms_per_token']:.0f} "
                f"| {private['rounds_per_token']:.0f} "
                f"| {private['online_bytes_per_token'] / 1e3:.0f} "
                f"| {private['offline_bytes_per_token'] / 1e3:.0f} "
                f"| {row['agreement']:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
