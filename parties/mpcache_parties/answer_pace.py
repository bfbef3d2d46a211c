"""Tell the one who asks how long an answer takes: beforehand by the cost engine, then layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from threading import Thread

from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.cost.pricing import price
from mpcache.cost.rates import modelled, offline_ms, pace_ms
from mpcache.errors import MpcacheError
from mpcache.phases import ChunkPlace
from mpcache.report.units import duration
from mpcache.transport.network import NO_NETWORK, parse_network
from mpcache_parties.facts import TYPICAL_QUESTION, Facts

SAY_EVERY_S = 2.0
TOKEN_EVERY_S = 10.0

# Phase, layer, layers, those of all parts of a long question, and ms that are left if known.
Told = Callable[[str, int, int, float | None], None]


class Foretold(Thread):
    """What an answer will take, by the latency model: worked out beside what else there is to wait for."""

    def __init__(self, facts: Facts, public: PublicConfig) -> None:
        super().__init__(daemon=True)
        self._facts, self._public, self._text = facts, public, ""
        self.start()

    def run(self) -> None:
        """Price the answer. CrypTen's own protocols, and what has no price, get no estimate."""
        facts, public = self._facts, self._public
        if facts.protocol == ProtocolName.STOCK or not facts.policy.plan_is_public:
            return
        try:
            asked = facts.question or TYPICAL_QUESTION
            cost = price(
                facts.shape, facts.policy, question=asked, protocol=facts.protocol,
                bits=public.fraction_bits, reveal=public.reveal, grid=public.length_grid,
                reading=replace(facts.reading, chunks=(facts.private,) * bool(facts.private)),
            )  # fmt: skip
        except MpcacheError:
            return
        network = parse_network(public.network) or NO_NETWORK
        first = offline_ms(cost, network, "question") + sum(
            modelled(cost, network, phase="question").values()
        )
        of = "" if facts.question else f" of a question of {cost.question} tokens"
        pace = duration(pace_ms(cost, network))
        self._text = f"on idle cores about {duration(first)} to the first token{of}, then {pace} each"

    def told(self) -> str:
        """Return the estimate in words; empty where there is none."""
        self.join()
        return self._text


class LayerPace:
    """Hears when a layer of a chunk begins; tells how long the chunk still takes, by its layers so far."""

    def __init__(self, tell: Told) -> None:
        self.layers = 0  # of the model, once that is known
        self._tell = tell
        self._phase, self._began = "", 0.0

    def __call__(self, phase: str, layer: int, part: int, parts: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began = phase, now
        done, layers = (part - 1) * self.layers + layer, parts * self.layers
        left = 1000 * (now - self._began) * (layers - done) / done if done else None
        self._tell(phase, done, layers, left)


def in_words(phase: str, layer: int, layers: int, left_ms: float | None) -> str:
    """Say where a chunk is: `question: layer 12 of 30, about 3.1 s left`."""
    place = ChunkPlace.of(phase)
    what = phase if place is None else f"token {place.step + 1}" if place.step else "question"
    left = "" if left_ms is None else f", about {duration(left_ms)} left"
    return f"{what}: layer {layer + 1} of {layers}{left}"


def answer_said(say: Callable[[str], None], tokens: int) -> Told:
    """Return what says how far an answer of at most `tokens` tokens is, now and then.

    Tokens show themselves: only one that is long in coming is told.
    """
    said, first, began = time.monotonic(), 0, 0.0  # first, began: the first decode step heard of

    def tell(phase: str, layer: int, layers: int, left_ms: float | None) -> None:
        nonlocal said, first, began
        place, now = ChunkPlace.of(phase), time.monotonic()
        if place is None:
            return
        if place.step and not first:
            first, began = place.step, now
        if now - said < (TOKEN_EVERY_S if place.step else SAY_EVERY_S):
            return
        said, rest = now, ""
        if place.step and (done := place.step - first + layer / layers):
            left = 1000 * (now - began) / done * (tokens - place.step - layer / layers)
            rest = f"; at most {duration(left)} to the answer's end" if left > 0 else ""
        say(f"client: {in_words(phase, layer, layers, left_ms)}{rest}")

    return tell
