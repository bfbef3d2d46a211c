"""What a party's machine needs: memory, disk and bytes, by the cost engine and two measured constants."""

from __future__ import annotations

from typing import Any

from mpcache.choices import ProtocolName
from mpcache.cost.pricing import price
from mpcache.model.shape import ModelShape

# Measured with a model of 135 M parameters (docs/benchmarks.md), where the sum is within a tenth.
PROCESS = 380_000_000  # bytes: Python, torch and numba
BUFFERS = {"server": 250_000_000, "client": 170_000_000, "dealer": 250_000_000}  # bytes: frames on their way
HELD_OF_UPLOADED = 0.5  # the server's integers take 2 to 4 bytes each where their masks take 6
FLOAT = 4  # bytes of a weight while it is read


def sizing(
    shape: ModelShape, policy: str, context: int, question: int = 16, protocol: str = ProtocolName.FAST
) -> dict[str, Any]:
    """Return bytes of memory and disk by party, and what travels: once, for a question, for each token.

    Memory is an estimate for one session; each further one adds `session_bytes`. Raises PolicyError.
    """
    cost = price(shape, policy, context, question, protocol)
    setup, document = (cost.total(phase).uploaded for phase in ("setup", "context"))
    working = max(cost.total(phase).working for phase in cost.phases)
    session = cost.held - setup + working
    vocabulary = FLOAT * shape.vocab * shape.width  # the largest matrix, read as floats
    first, token = cost.total("question"), cost.total("decode")
    steps = max(1, cost.steps)
    return {
        "policy": cost.policy.spec,
        "protocol": cost.protocol,
        "context_tokens": context,
        "question_tokens": question,
        "memory_bytes": {
            "server": PROCESS + BUFFERS["server"] + round(HELD_OF_UPLOADED * setup) + vocabulary + session,
            "client": PROCESS + BUFFERS["client"] + session,
            "dealer": PROCESS + BUFFERS["dealer"] + setup + document,
        },
        "session_bytes": session,
        "dealer_disk_bytes": setup + document,
        "uploaded_once_bytes": setup + document,
        "dealer_question_bytes": first.offline,
        "dealer_token_bytes": token.offline // steps,
        "online_token_bytes": token.online // steps,
        "rounds_per_token": token.rounds // steps,
    }
