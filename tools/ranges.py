"""Measure how near a model's values come to the ranges of `--protocol fast`, on documents with questions.

    python tools/ranges.py --documents 5 [--policy full --policy mpcache] [--model DIR] [--lenient]

The debug engine (mpcache/engines/checked.py) answers every question greedily; the first value out of
its range ends the run with its operation and step. --lenient goes on and shows it in the table.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from mpcache.answer import answer, bind_to_document
from mpcache.demo.documents import make_document
from mpcache.engines.checked import CheckedOps, Range, Ranges
from mpcache.errors import MpcacheError
from mpcache.model import Model, demo_model_dir, load_model
from mpcache.model.prefill import prefill
from mpcache.policy import POLICIES, parse_policy
from mpcache.sampling import Sampling
from mpcache.session import Session
from mpcache_kernels import backend

ANSWER_TOKENS = 6  # " 4831." and the end of the line
DEFAULT = (*(name for name, cls in POLICIES.items() if not cls.plain_only), "mpcache:score=bound,share=none")


def documents(model: Model, n: int, tokens: int, questions: int) -> Iterator[tuple[list[int], list[str]]]:
    """Yield n documents of about `tokens` tokens from seeds 0, 1, ..., each with its first questions."""

    def count(text: str) -> int:
        return len(model.tokenizer.encode(text, bos=False))

    for seed in range(n):
        text, asked = make_document(random.Random(seed), count, tokens, 8)
        yield model.tokenizer.encode(text, bos=True), [question for question, _ in asked[:questions]]


def check(model: Model, spec: str, context: list[int], question: str, ranges: Ranges) -> None:
    """Answer a question under a policy, and note the values in `ranges`.

    Raises OutOfRange where those are strict.
    """
    policy = parse_policy(spec).bind(len(context), model.shape)
    filled = prefill(model, context, window=policy.window)
    kernels = backend("cpu")
    policy, _ = bind_to_document(policy, model.shape, filled, kernels)
    session = Session(CheckedOps(), ranges, model.shape, policy)
    session.setup(model.weights)
    session.context(filled, kernels)
    ids = model.tokenizer.encode(question, bos=False)
    with torch.no_grad():
        for _ in answer(session, ids, ANSWER_TOKENS, Sampling().chooser(), ()):
            pass


def rows(ranges: Ranges) -> Iterator[str]:
    """Yield a Markdown table, the tightest bound first."""
    yield "| operation | observed | bound | spare bits | where |"
    yield "|---|---|---|---|---|"
    for r in ranges:
        yield f"| {r.operation} | {_seen(r)} | {_bound(r)} | {r.spare_bits:.1f} | {r.step} |"


def _seen(r: Range) -> str:
    return f"{r.largest:.4g}" if r.low is None else f"{r.smallest:.4g} to {r.largest:.4g}"


def _bound(r: Range) -> str:
    return f"{r.high:.6g}" if r.low is None else f"{r.low:.4g} to {r.high:.6g}"


def main() -> None:
    """Answer every question under every policy, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--questions", type=int, default=2, help="per document")
    parser.add_argument("--tokens", type=int, default=880, help="of each document")
    parser.add_argument("--lenient", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        model = load_model(options.model or demo_model_dir())
        ranges = Ranges(strict=not options.lenient)
        answered = 0
        for spec in options.policy or DEFAULT:
            for context, questions in documents(model, options.documents, options.tokens, options.questions):
                for question in questions:
                    check(model, spec, context, question, ranges)
                    answered += 1
    except MpcacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print("\n".join(rows(ranges)))
    print(f"{answered} answers, {' '.join(options.policy or DEFAULT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
