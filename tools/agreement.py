"""Compare plain and private answers on unseen documents: where do their tokens differ, and why.

Usage: python tools/agreement.py [--samples 100] [--tokens 880] [--answer 6] [--policy SPEC ...]
       [--ray HOST:PORT|auto|local] [--journal FILE: go on after what is in it]

Each sample is a document with facts in it and one question about them, answered greedily by the plain
engine and by the three parties (their own code, in three threads of this process). Prints a table: how
many answers agree, the logits' differences, and for each disagreement how far apart the plain run's first
two candidates were at the first token that differs. On a terminal it fills as samples come; a file or pipe
gets one JSON line per sample before it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpcache.config import PublicConfig
from mpcache.console.live_table import live_table
from mpcache.demo.documents import make_document
from mpcache.engines.registry import PROTOCOLS
from mpcache.errors import MpcacheError
from mpcache.model import Model, demo_model_dir, load_model
from mpcache.policy import POLICIES
from mpcache.sweeping.runner import FAILED, Batch, cell_runner
from tests.support.agreement import compare

COLUMNS = {  # and how they are called while they fill
    "same answer": "same", "right: private, plain": "right",
    "logits differ by: median / 90 % / most": "logits differ by", "clusters that differ": "clusters differ",
    "margins where answers differ": "margins",
}  # fmt: skip
MEMORY = 2_500_000_000  # bytes of a worker: three parties in one process


@dataclass
class Tally:
    """One policy's samples.

    agree: samples whose private and plain answers are the same.  wrong: clusters chosen for no reason.
    changed, selections: clusters chosen that differ, and all.  right: private answers that are the
    fact's own, and plain ones.  differences: the largest of the logits, per sample.  margins: of
    disagreements.
    """

    policy: str
    agree: int = 0
    wrong: int = 0
    changed: int = 0
    selections: int = 0
    right: tuple[int, int] = (0, 0)
    differences: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def add(self, sample: dict[str, Any]) -> None:
        """Count one sample: a line that `main` prints."""
        self.agree += sample["agree"]
        self.wrong += sample["wrong"]
        self.changed += sample["changed"]
        self.selections += sample["selections"]
        private, plain = sample["right"]
        self.right = (self.right[0] + private, self.right[1] + plain)
        self.differences.append(sample["difference"])
        if not sample["agree"]:
            self.margins.append(sample["margin"])

    def cells(self) -> list[str]:
        """Return what COLUMNS has of it."""
        d = sorted(self.differences)
        n = len(d)
        quantiles = " / ".join(f"{d[min(n - 1, int(q * n))]:.3g}" for q in (0.5, 0.9, 1.0)) if d else "-"
        margins = ", ".join(f"{m:.3g}" for m in self.margins) or "-"
        clusters = f"{self.changed} of {self.selections}" if self.selections else "-"
        right = f"{self.right[0]}, {self.right[1]}"
        return [f"{self.agree} of {n}", right, quantiles, clusters, margins]


def unseen(model: Model, seed: int, tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Make a document, a question about it and its answer, as token ids."""

    def ids(text: str, bos: bool = False) -> list[int]:
        return model.tokenizer.encode(text, bos=bos)

    facts = 8 if tokens >= 400 else 3
    rng = random.Random(seed)
    document, pairs = make_document(rng, lambda text: len(ids(text)), tokens, facts)
    return ids(document, bos=True), ids(pairs[0][0]), ids(pairs[0][1])


@dataclass(frozen=True)
class Asked:
    """A document and its question, under some policies."""

    seed: int
    policies: tuple[str, ...]
    tokens: int
    answer: int
    protocol: str


def ask(asked: Asked, wanted: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield what each of the wanted policies gives."""
    torch.set_num_threads(1)
    model = _demo()
    context, question, answer = unseen(model, asked.seed, asked.tokens)
    for spec in (asked.policies[i] for i in wanted):
        start = time.perf_counter()
        result = compare(model, context, question, asked.answer, spec, asked.protocol)
        n = len(answer)
        yield {
            "policy": spec, "seed": asked.seed, "agree": result.private == result.plain,
            "right": [result.private[:n] == answer, result.plain[:n] == answer],
            "changed": result.changed, "selections": result.selections, "wrong": result.wrong,
            "difference": result.difference, "margin": result.margin, "score_error": result.score_error,
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip


@cache
def _demo() -> Model:
    return load_model(demo_model_dir())


def main() -> None:
    """Answer every sample under every policy, and print the lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=880, help="of the document")
    parser.add_argument("--answer", type=int, default=6, help="tokens of an answer")
    parser.add_argument("--policy", action="append", help="again for more [every private one]")
    parser.add_argument("--protocol", default="fast", choices=PROTOCOLS)
    parser.add_argument("--ray", help="HOST:PORT of a Ray cluster's head, auto, or local")
    parser.add_argument("--journal", type=Path, help="note each finished sample here, and go on after those")
    options = parser.parse_args()
    model = _demo()
    private = [name for name, policy in POLICIES.items() if not policy.plain_only]
    specs = options.policy or [PublicConfig().policy, *private]
    tallies = {spec: Tally(spec) for spec in specs}
    about = {"sweep": "agreement", "model": model.digest, "tokens": options.tokens,
             "answer": options.answer, "protocol": options.protocol}  # fmt: skip
    batches = [
        Batch(
            str(seed),
            tuple(specs),
            Asked(seed, tuple(specs), options.tokens, options.answer, options.protocol),
        )
        for seed in range(options.samples)
    ]
    piped = not sys.stdout.isatty()
    filling = {spec: Tally(spec) for spec in specs}

    def seen(seed: int, i: int, outcome: dict[str, Any]) -> None:
        if FAILED not in outcome:
            filling[specs[i]].add(outcome)
            for column, text in zip(COLUMNS.values(), filling[specs[i]].cells(), strict=True):
                runner.table.put((specs[i], column), text)

    try:
        with (
            cell_runner(options.ray, options.journal, about, ask, MEMORY) as runner,
            live_table("answering ...") as runner.table,
        ):
            places = [(spec, column) for spec in specs for column in COLUMNS.values()]
            runner.table.begin("private beside plain answers", "policy", places, len(specs) * len(batches))
            done: dict[int, list[dict[str, Any]]] = {}
            for seed, outcomes in runner.run(batches, ask, seen):
                done[seed] = outcomes
                for outcome in outcomes if piped else ():
                    print(json.dumps(outcome), flush=True)
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # at once: threads that compute make the interpreter's own end an abort
    except MpcacheError as error:
        sys.exit(f"error: {error}")
    for outcome in (outcome for seed in sorted(done) for outcome in done[seed] if FAILED not in outcome):
        tallies[outcome["policy"]].add(outcome)
    for failure in runner.failures:
        print(f"failed: {failure}", file=sys.stderr)
    for tally in tallies.values():
        if tally.wrong:
            print(f"{tally.policy}: {tally.wrong} clusters were chosen for no reason", file=sys.stderr)
    print(f"\n{options.tokens} tokens, answers of {options.answer}, protocol {options.protocol}\n")
    print(f"| policy | {' | '.join(COLUMNS)} |\n{'|---' * (1 + len(COLUMNS))}|")
    for spec, tally in tallies.items():
        print(f"| `{spec}` | {' | '.join(tally.cells())} |")
    if runner.failures:
        sys.exit(1)


if __name__ == "__main__":
    from tools import agreement  # by its name, which workers elsewhere import

    agreement.main()
