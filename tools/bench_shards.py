"""Time products with the server's matrices in this process and over 1, 2, ... actors of a Ray cluster.

Usage: python tools/bench_shards.py [--model DIR] [--shape llama-2-7b --layers 4] [--actors 0,1,2,4]
       [--rows 1] [--ray local]

With --shape the weights are random ones of that shape, of so many layers, written to a folder that goes
again. Prints, for each number of actors (0: none), the memory of this process and of the actors once all is
loaded, the ms of a product of one row with each matrix of a layer and with the vocabulary's, and the
ms of a call whose product is nothing. The products are compared with those without actors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file

from mpcache.cluster import HERE
from mpcache.errors import MpcacheError
from mpcache.model import ModelShape, load_shape
from mpcache.model.loading import stored_weights
from mpcache.model.shapes import NAMES
from mpcache.rank import Rank
from mpcache.report.units import size
from mpcache.runtime.ring import matmul, narrow_rows
from mpcache.runtime.shares import encode
from mpcache.session import arranged_layer
from mpcache_parties.shard import Shard
from mpcache_parties.sharding import Shards

BITS, REPEATS = 16, 15
NAMED = ("qkv", "o", "up", "down")
SHAPES = Path(__file__).resolve().parents[1] / "mpcache" / "model" / "shapes"


def random_model(folder: Path, name: str, layers: int) -> Path:
    """Write a Llama of a known shape with random weights, a tensor at a time."""
    config = json.loads((SHAPES / f"{name}.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    shape = load_shape(folder)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"model.embed_tokens": (shape.vocab, shape.width), "lm_head": (shape.vocab, shape.width)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for part, outputs in (("q", q), ("k", kv), ("v", kv)):
            sizes[f"{at}.self_attn.{part}_proj"] = outputs, shape.width
        sizes[f"{at}.self_attn.o_proj"] = shape.width, q
        sizes[f"{at}.mlp.gate_proj"] = sizes[f"{at}.mlp.up_proj"] = shape.ffn, shape.width
        sizes[f"{at}.mlp.down_proj"] = shape.width, shape.ffn
    norms = [
        f"model.layers.{i}.{norm}_layernorm" for i in range(layers) for norm in ("input", "post_attention")
    ]
    index: dict[str, str] = {}
    for number, (tensor, dims) in enumerate(sizes.items()):
        file = f"model-{number}.safetensors"
        made = {f"{tensor}.weight": (torch.randn(dims) * 0.02).bfloat16()}
        if number == 0:
            made |= {f"{norm}.weight": torch.ones(shape.width) for norm in [*norms, "model.norm"]}
        save_file(made, folder / file)
        index |= dict.fromkeys(made, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def here(model: Path, shape: ModelShape) -> dict[str, Any]:
    """Hold every matrix in this process; return those of the first layer, and the head."""
    weights = stored_weights(model)
    kept: list[Any] = []
    found: dict[str, Any] = {}
    for number in range(shape.layers):
        layer = arranged_layer(weights, number)
        for name in NAMED:
            real = layer(name)
            kept.append(narrow_rows(tuple(real.shape), lambda rows, real=real: encode(real[rows], BITS)))  # type: ignore[misc]
            found.setdefault(name, kept[-1])
    for name in ("embed", "lm_head"):
        real = getattr(weights, name)
        kept.append(narrow_rows(tuple(real.shape), lambda rows, real=real: encode(real[rows], BITS)))  # type: ignore[misc]
    return found | {"lm_head": kept[-1], "all": kept}


def there(shards: Shards, model: Path, shape: ModelShape) -> dict[str, Any]:
    """Spread every matrix over actors; return the same."""
    weights = shards.weights(SimpleNamespace(shape=shape, path=model), BITS)  # type: ignore[arg-type]
    kept: list[Any] = []
    found: dict[str, Any] = {}
    for number in range(shape.layers):
        layer = weights.layer(number)
        for name in NAMED:
            kept.append(layer(name))
            kept[-1].largest()
            found.setdefault(name, kept[-1])
    for name in ("embed", "lm_head"):
        kept.append(weights.vocabulary(name))
        kept[-1].largest()
    return found | {"lm_head": kept[-1], "all": kept}


def median_ms(run: Callable[[], object]) -> float:
    """Return the median of some runs."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def timed(matrices: dict[str, Any], rows: int) -> tuple[list[str], list[torch.Tensor]]:
    """Return ms, and a product, of each matrix."""
    cells, products = [], []
    for name in (*NAMED, "lm_head"):
        w = matrices[name]
        x = torch.arange(rows * w.shape[0]).reshape(rows, -1) * 0x9E3779B97F4A7C15 % (1 << 40)
        products.append(matmul(x, w))
        cells.append(f"{median_ms(lambda x=x, w=w: matmul(x, w)):.2f}")  # type: ignore[misc]
    return cells, products


def row(
    actors: int, address: str, model: Path, shape: ModelShape, rows: int
) -> tuple[str, list[torch.Tensor]]:
    """Measure one number of actors."""
    before = Shard().settle()[0]
    start = time.perf_counter()
    if not actors:
        matrices = here(model, shape)
        seconds = time.perf_counter() - start
        cells, products = timed(matrices, rows)
        mine, spread, empty = Shard().settle()[0], "-", "-"
    else:
        shards = Shards.open(address, actors, Rank.SERVER, lambda text: None)
        try:
            start = time.perf_counter()
            matrices = there(shards, model, shape)
            seconds = time.perf_counter() - start
            cells, products = timed(matrices, rows)
            mine = Shard().settle()[0]
            held = shards.ask("settle", [()] * actors)
            spread = f"{size(max(now for now, _ in held))}, {size(max(most for _, most in held))}"
            empty = f"{median_ms(lambda: shards.ask('settle', [()] * actors)):.2f}"
            del matrices
        finally:
            shards.close()
    times = " | ".join([f"{seconds:.0f}", *cells, empty])
    return f"| {actors or 'none'} | {size(before)}, {size(mine)} | {spread} | {times} |", products


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=NAMES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--actors", default="0,1,2,4")
    parser.add_argument("--rows", type=int, default=1, help="of what is multiplied: tokens")
    parser.add_argument("--ray", default=HERE)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or random_model(Path(folder), options.shape or NAMES[0], options.layers)
        shape = load_shape(model)
        print(f"{shape.layers} layers, width {shape.width}, products of {options.rows} rows\n")
        print("| actors | this process: before, after | an actor: now, most | load s | "
              + " | ".join(f"{name} ms" for name in (*NAMED, "lm_head")) + " | empty call ms |")  # fmt: skip
        print("|---" * (5 + len(NAMED) + 1) + "|")
        first: list[torch.Tensor] | None = None
        for actors in map(int, options.actors.split(",")):
            line, products = row(actors, options.ray, model, shape, options.rows)
            print(line, flush=True)
            first = first or products
            if not all(torch.equal(a, b) for a, b in zip(first, products, strict=True)):
                sys.exit(f"error: the products of {actors} actors differ")


if __name__ == "__main__":
    try:
        main()
    except MpcacheError as error:
        sys.exit(f"error: {error}")
