"""Time the dealing of batches of tapes in this process and by 1, 2, ... workers of a Ray cluster.

Usage: python tools/bench_farm.py [--batches 4] [--tokens 8] [--context 200] [--workers 0,1,2]
       [--shape smollm2-135m] [--store DIR-OR-URL]

The demo model, or a known shape; policy full. With fewer batches than workers a batch is dealt by several
workers, each of which deals some layers. What is dealt is sealed, as a farm does it, and read back; nobody
takes it, so that the receivers' own work (they seal it once more) is not in the figures. Workers have dealt
a short batch before the clock starts: the first one of a cold worker waits for imports and compiled loops.
memory: of the largest worker, at its peak, and what the farm asked of the cluster for it.
"""

from __future__ import annotations

import argparse
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpcache.choices import ProtocolName
from mpcache.cluster import HERE, Cluster
from mpcache.config import PublicConfig
from mpcache.cost.tally import Cost
from mpcache.errors import MpcacheError
from mpcache.model import demo_model_dir, load_shape
from mpcache.model.shapes import NAMES, config_of
from mpcache.report.units import size
from mpcache.runtime.party import COMPUTING
from mpcache.runtime.rng import fresh_seed
from mpcache_parties.facts import Facts, facts_of
from mpcache_parties.farm import BatchOrder, Farm, ReadByShapes, deal_portion
from mpcache_parties.portions import portions_of, worker_bytes
from mpcache_parties.prepare import price_batch, read_by_shapes
from mpcache_parties.state import sealed
from mpcache_parties.state.spool import Spool

QUESTION = 8  # tokens


def arguments_of(
    shape: str | None, tokens: int, context: int
) -> tuple[Facts, PublicConfig, ReadByShapes, Cost]:
    """Return what `Farm.batches` is given, by what the parties would have agreed on."""
    known = load_shape(demo_model_dir() if shape is None else config_of(shape))
    public = PublicConfig(policy="full", max_new_tokens=tokens, protocol=ProtocolName.FAST)
    asked = {"question_tokens": QUESTION, "new_tokens": tokens, "private_tokens": 0}
    model = {"shape": known.to_dict(), "context_tokens": context}
    facts = facts_of({"model": model, "question": asked}, public)
    return facts, public, read_by_shapes, price_batch(facts, public)


def peak_bytes(seconds: float) -> Iterator[int]:
    """Return a worker's memory at its peak, so far. seconds: to stay, so that each worker is asked once."""
    time.sleep(seconds)
    yield 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def take_all(batches: Iterator[tuple[BatchOrder, Iterator[tuple[str, list[dict[str, Any]]]]]]) -> int:
    """Take what is dealt; return its bytes."""
    messages = (m for _, phases in batches for _, dealt in phases for m in dealt)
    return sum(t.nbytes for message in messages for t in message["tensors"])


def dealt_here(batches: int, facts: Facts, public: PublicConfig, spool: Spool) -> int:
    """Deal in this process; return the bytes."""
    total, key = 0, secrets.token_bytes(sealed.KEY_BYTES)
    for _ in range(batches):
        seeds = {rank: fresh_seed() for rank in COMPUTING}
        order = BatchOrder(facts, public, read_by_shapes, secrets.token_hex(16), seeds, spool, key)
        total += take_all(iter([(order, ((phase, order.take(phase)) for phase in deal_portion(order)))]))
    return total


def main() -> None:
    """Print a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--shape", choices=NAMES)
    parser.add_argument("--store")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = options.batches
    asked = arguments_of(options.shape, options.tokens, options.context)
    short = arguments_of(options.shape, 1, options.context)
    print("| workers | portions | s a batch | bytes a batch | bytes a second | memory |")
    print("|---|---|---|---|---|---|")
    for workers in map(int, options.workers.split(",")):
        spool = Spool.at(options.store)
        if not workers:
            dealt_here(1, *short[:2], spool)
            start = time.perf_counter()
            total = dealt_here(batches, *asked[:2], spool)
            seconds, memory, portions = time.perf_counter() - start, "-", 1
            spool.close()
        else:
            cluster = Cluster.join(HERE, workers)
            with closing(Farm(cluster, spool)) as farm:
                take_all(farm.batches(workers, *short))
                start = time.perf_counter()
                total = take_all(farm.batches(batches, *asked))
                seconds = time.perf_counter() - start
                peaks = [n for _, n in cluster.stream(peak_bytes, [(1.0,)] * workers) if n is not None]
            shares = portions_of(asked[3], workers // batches)
            memory, portions = f"{size(max(peaks))} of {size(worker_bytes(asked[3], shares))}", len(shares)
        cells = f"{seconds / batches:.2f} | {size(total // batches)} | {size(total / seconds)} | {memory}"
        print(f"| {workers or 'none'} | {portions} | {cells} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except MpcacheError as error:
        sys.exit(f"error: {error}")
