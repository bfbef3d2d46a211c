"""Print rounds and bytes of one decoder layer, by the ledger, without any party running.

    python tools/layer_cost.py [--context 1024] [--protocol fast|fast-bits|stock] [POLICY ...]

The layer is the one that the alternatives were measured on: D = 512, 8 heads of 64, FFN 2048, Llama
style, everything secret. Prints each kind of layer of a policy (one that selects, one that shares).
"""

from __future__ import annotations

import argparse

from mpcache.engines.registry import PROTOCOLS, engine
from mpcache.ledger import Entry
from mpcache.model import ModelShape
from mpcache.policy import parse_policy
from mpcache.rank import Rank
from mpcache.runtime.party import ShapeParty
from mpcache.session import Session

SHAPE = ModelShape(
    layers=6, width=512, heads=8, kv_heads=8, head_dim=64, ffn=2048, vocab=1000, max_positions=1 << 17,
    norm="rms", norm_eps=1e-5, activation="silu", gated=True, positions="rope",
)  # fmt: skip
PAPER = "mpcache:n_keep=1.0,coarse=32,fine=16,coarse_keep=0.5,fine_keep=0.2"
STEP = "decode1"


def layers(
    spec: str, context: int, protocol: str, shape: ModelShape = SHAPE, rank: Rank = Rank.SERVER
) -> list[dict[str, Entry]]:
    """Return per layer what each of its operations costs one party in one decode step."""
    party = ShapeParty(rank)
    ops = engine(protocol, Rank.SERVER, device="meta")
    session = Session(ops, party, shape, parse_policy(spec).bind(context, shape).priced(shape))
    session.setup(None)
    session.context(None, None)
    session.chunk(None, 1)
    session.chunk(None, 1)
    costs: list[dict[str, Entry]] = [{} for _ in range(shape.layers)]
    for name, entry in party.ledger.steps.items():
        phase, _, rest = name.partition("/")
        layer, _, op = rest.partition("/")
        if phase == STEP and layer.startswith("layer"):
            costs[int(layer.removeprefix("layer"))].setdefault(op, Entry()).__iadd__(entry)
    return costs


def main() -> None:
    """Print what the layers of each policy cost."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--context", type=int, default=1024)
    arguments.add_argument("policies", nargs="*", default=["full", PAPER])
    arguments.add_argument("--protocol", choices=PROTOCOLS, default="fast")
    given = arguments.parse_args()
    for spec in given.policies:
        shown: set[tuple[int, int]] = set()
        theirs = layers(spec, given.context, given.protocol, rank=Rank.CLIENT)
        for number, ops in enumerate(layers(spec, given.context, given.protocol)):
            total, client = Entry(), sum(entry.offline_received for entry in theirs[number].values())
            for entry in ops.values():
                total += entry
            if (total.rounds, total.sent) in shown:
                continue
            shown.add((total.rounds, total.sent))
            print(
                f"{given.protocol}, {spec} at {given.context}, layer {number}: {total.rounds} rounds, "
                f"{(total.sent + total.received) / 2e6:.3f} MB online (mean of both), offline "
                f"{total.offline_received / 1e6:.2f} MB to the server, {client / 1e6:.2f} to the client"
            )
            for op, entry in ops.items():
                offline = entry.offline_received
                print(
                    f"    {op:<20} {entry.rounds:>3} rounds {entry.sent:>9} B sent {entry.received:>9} B "
                    f"received {offline:>10} B"
                )


if __name__ == "__main__":
    main()
