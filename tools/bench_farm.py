"""Time the dealing of batches of tapes in this process and by 1, 2, ... workers of a Ray cluster.

Usage: python tools/bench_farm.py [--batches 4] [--tokens 8] [--context 200] [--workers 0,1,2]
       [--shape smollm2-135m] [--store DIR-OR-URL] [--ray HOST:PORT]

The demo model, or a known shape, policy full. With fewer batches than workers a batch is dealt by several, each
of which deals some layers. What is dealt is sealed, as a farm does it, and read back; nobody takes it, so
that the receivers' own work (they seal it once more) is not in the figures. Workers have started before the
clock does: the first batch of a cold one waits for them. `first` is when the first phase of a token is there.
"""

from __future__ import annotations

import argparse
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpcache.choices import ProtocolName
from mpcache.cluster import Cluster
from mpcache.config import PublicConfig
from mpcache.errors import MpcacheError
from mpcache.model import demo_model_dir, load_model
from mpcache.report.units import size
from mpcache.runtime.party import COMPUTING
from mpcache.runtime.rng import fresh_seed
from mpcache_parties.facts import Facts, facts_of, facts_of_model
from mpcache_parties.farm import BatchOrder, Farm, deal_batch
from mpcache_parties.prepare import read_by_shapes
from mpcache_parties.private_inputs import Document
from mpcache_parties.state import sealed


def public_facts(tokens: int, context: int) -> tuple[Facts, PublicConfig]:
    """Return what the parties would have agreed on."""
    model = load_model(demo_model_dir())
    public = PublicConfig(policy="full", max_new_tokens=tokens, protocol=ProtocolName.FAST)
    asked = {"question_tokens": 8, "new_tokens": tokens, "private_tokens": 0}
    own = Document(model, list(range(1, context + 1)))
    return facts_of({"model": facts_of_model(own, public), "question": asked}, public), public


def main() -> None:
    """Print a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--workers", default="0,1,2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts, public = public_facts(options.tokens, options.context)
    print("| workers | s a batch | bytes a batch | bytes a second |\n|---|---|---|---|")
    for workers in map(int, options.workers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            if workers:
                farm = Farm(Cluster.join("local", workers), Path(folder))
                list(farm.batches(workers, facts, public, read_by_shapes))  # starts the workers
                for file in Path(folder).iterdir():
                    file.unlink()
            start, total = time.perf_counter(), 0
            if workers:
                for _, phases in farm.batches(options.batches, facts, public, read_by_shapes):
                    for _, messages in phases:
                        total += sum(t.nbytes for message in messages for t in message["tensors"])
            else:
                key = secrets.token_bytes(sealed.KEY_BYTES)
                for _ in range(options.batches):
                    seeds = {rank: fresh_seed() for rank in COMPUTING}
                    name = secrets.token_hex(16)
                    order = BatchOrder(facts, public, read_by_shapes, name, seeds, Path(folder), key)
                    for phase in deal_batch(order):
                        total += order.file(phase).stat().st_size
                        order.file(phase).unlink()
            seconds = time.perf_counter() - start
            if workers:
                farm.close()
        cells = (
            f"{seconds / options.batches:.2f} | {size(total // options.batches)} | {size(total / seconds)}"
        )
        print(f"| {workers or 'none'} | {cells} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except MpcacheError as error:
        sys.exit(f"error: {error}")
