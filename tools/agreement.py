"""Compare plain and private answers on unseen documents: where do their tokens differ, and why.

Usage: python tools/agreement.py [--samples 100] [--tokens 880] [--answer 6] [--policy SPEC ...]

Each sample is a document with facts in it and one question about them, answered greedily by the plain
engine and by the three parties (their own code, in three threads of this process). Prints one JSON line
per sample and, at the end, a table: how many answers agree, the logits' differences, and for each
disagreement how far apart the plain run's first two candidates were at the first token that differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpcache.config import PublicConfig
from mpcache.demo.documents import make_document
from mpcache.engines.registry import PROTOCOLS
from mpcache.model import Model, demo_model_dir, load_model
from mpcache.policy import POLICIES
from tests.support.agreement import compare


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

    def row(self) -> str:
        """Return a row of the Markdown table."""
        d = sorted(self.differences)
        n = len(d)
        quantiles = " / ".join(f"{d[min(n - 1, int(q * n))]:.3g}" for q in (0.5, 0.9, 1.0)) if d else "-"
        margins = ", ".join(f"{m:.3g}" for m in self.margins) or "-"
        clusters = f"{self.changed} of {self.selections}" if self.selections else "-"
        right = f"{self.right[0]}, {self.right[1]}"
        return f"| `{self.policy}` | {self.agree} of {n} | {right} | {quantiles} | {clusters} | {margins} |"


def unseen(model: Model, seed: int, tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Make a document, a question about it and its answer, as token ids."""

    def ids(text: str, bos: bool = False) -> list[int]:
        return model.tokenizer.encode(text, bos=bos)

    facts = 8 if tokens >= 400 else 3
    rng = random.Random(seed)
    document, pairs = make_document(rng, lambda text: len(ids(text)), tokens, facts)
    return ids(document, bos=True), ids(pairs[0][0]), ids(pairs[0][1])


def main() -> None:
    """Answer every sample under every policy, and print the lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=880, help="of the document")
    parser.add_argument("--answer", type=int, default=6, help="tokens of an answer")
    parser.add_argument("--policy", action="append", help="again for more [every private one]")
    parser.add_argument("--protocol", default="fast", choices=PROTOCOLS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(demo_model_dir())
    private = [name for name, policy in POLICIES.items() if not policy.plain_only]
    tallies = []
    for spec in options.policy or [PublicConfig().policy, *private]:
        tally = Tally(spec)
        tallies.append(tally)
        for seed in range(options.samples):
            context, question, answer = unseen(model, seed, options.tokens)
            start = time.perf_counter()
            result = compare(model, context, question, options.answer, spec, options.protocol)
            same = result.private == result.plain
            tally.agree += same
            tally.wrong += result.wrong
            tally.changed += result.changed
            tally.selections += result.selections
            n = len(answer)
            right = (result.private[:n] == answer, result.plain[:n] == answer)
            tally.right = (tally.right[0] + right[0], tally.right[1] + right[1])
            tally.differences.append(result.difference)
            if not same:
                tally.margins.append(result.margin)
            line = {
                "policy": spec, "seed": seed, "agree": same, "right": right, "changed": result.changed,
                "selections": result.selections, "wrong": result.wrong, "difference": result.difference,
                "margin": result.margin, "score_error": result.score_error,
                "seconds": round(time.perf_counter() - start, 1),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
        if tally.wrong:
            print(f"{spec}: {tally.wrong} clusters were chosen for no reason", file=sys.stderr)
    print(f"\n{options.tokens} tokens, answers of {options.answer}, protocol {options.protocol}\n")
    print("| policy | same answer | right: private, plain | logits differ by: median / 90 % / most |"
          " clusters that differ | margins where answers differ |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    for tally in tallies:
        print(tally.row())


if __name__ == "__main__":
    main()
