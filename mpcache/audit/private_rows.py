"""What a document of the client's own costs: to read it, to evict it, and each token of an answer then."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import product
from typing import Any

from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.cost.pricing import price
from mpcache.cost.rates import compute_ms, phase_ms
from mpcache.cost.reading import reading_plan
from mpcache.cost.tally import Cost, Tally, sum_tallies
from mpcache.limits import bind_policy
from mpcache.model import ModelShape
from mpcache.phases import EVICTION, private_chunk
from mpcache.transport.network import Profile

CONTEXT = 16  # tokens of a server without a document: what frames the client's


def price_document(
    shape: ModelShape, tokens: Sequence[int], policies: Sequence[str], protocols: Sequence[str],
    networks: Sequence[Profile], question: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield a row for each length, policy, protocol and network. Raises BadInput or PolicyError.

    Units: rounds, bytes, ms; `online` is sent by one computing party, the mean of both.
    """
    priced = cache(partial(price, shape, question=question))
    for n, spec, protocol, network in product(tokens, policies, protocols, networks):
        public = PublicConfig(
            policy="full", private_policy=spec, protocol=ProtocolName(protocol), network=network.name
        )
        bound = bind_policy(shape, public, CONTEXT, question, 2, n)
        plan = reading_plan(shape, public, CONTEXT, n, protocol)
        whole = reading_plan(
            shape, public.model_copy(update={"private_policy": "full"}), CONTEXT, n, protocol
        )
        mine, full = (priced(bound, protocol=protocol, reading=one)
                      for one in (plan, whole))  # fmt: skip
        reading = sum_tallies(
            step for name, steps in mine.phases.items() if private_chunk(name) for step in steps.items()
        )
        evicting, later, before = mine.total(EVICTION), mine.total("decode"), full.total("decode")
        yield {
            "private_tokens": n,
            "private_policy": spec,
            "kept_tokens": plan.kept,
            "chunk_tokens": plan.chunks[0],
            "protocol": protocol,
            "network": network.name,
            "reading": _part(reading, network, len(plan.chunks)),
            "eviction": _part(evicting, network) if plan.eviction is not None else None,
            "token": _part(later, network),
            "token_with_all": _part(before, network),
            "pays_from_tokens_by_bytes": _pays(_bytes(evicting), _bytes(before) - _bytes(later)),
            "pays_from_tokens_by_time": _pays(
                phase_ms(evicting, network), phase_ms(before, network) - phase_ms(later, network)
            ),
            "peak_bytes": _peak(mine),
        }


def _part(tally: Tally, network: Profile, phases: int = 1) -> dict[str, Any]:
    return {
        "rounds": tally.rounds,
        "online_bytes": tally.online,
        "offline_bytes": tally.offline,
        "modelled_ms": round(phase_ms(tally, network), 3),
        "modelled_compute_ms": round(compute_ms(tally), 3),
        "phases": phases,
    }


def _bytes(tally: Tally) -> float:
    return 2 * tally.online + tally.offline


def _pays(cost: float, saving: float) -> int | None:
    """Return how many tokens it takes; None: it never pays."""
    return math.ceil(cost / saving) if saving > 0 else None


def _peak(cost: Cost) -> int:
    return cost.held + max(sum_tallies(steps.items()).working for steps in cost.phases.values())
