"""How long a setting takes on a network, by the model, and which protocol that speaks for.

The model: rounds x RTT / 2 + bytes / bandwidth + computation (mpcache.transport.network). What the dealer sends
is sent ahead, beside the online phase: it delays a token where its transfer takes longer than the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpcache.cost.tally import PROTOCOLS, Cost, cost
from mpcache.model import ModelShape
from mpcache.policy import BoundPolicy
from mpcache.transport.network import Profile, Rates

AUTO = "auto"
CHOICES = (*PROTOCOLS, AUTO)  # what --protocol takes
_FAST = ("fast", "fast-bits")  # the same program; how a top-k compares differs. The first wins a tie.
RATES = Rates()
NONE = Profile("none", 0, float("inf"))


def modelled(priced: Cost, network: Profile, rates: Rates = RATES, phase: str = "decode") -> dict[str, float]:
    """Latency of one token (of `decode`: the mean of its steps) in ms: its rounds, its bytes, its
    computation."""
    tally, steps = priced.total(phase), priced.steps if phase == "decode" else 1
    compute = rates.ms(tally.rounds, tally.multiply_adds, tally.key_blocks, tally.random_bytes)
    return {
        "rounds": tally.rounds * network.one_way_ms / steps,
        "bytes": network.transfer_ms(tally.critical) / steps,
        "compute": compute / steps,
    }


def offline_ms(priced: Cost, network: Profile, phase: str = "decode") -> float:
    """How long the dealer's bytes for one token take to the server, who gets most of them, in ms."""
    steps = priced.steps if phase == "decode" else 1
    return network.transfer_ms(priced.total(phase).server_offline / steps)


def answer_ms(priced: Cost, network: Profile, tokens: int) -> float:
    """A whole answer, from the context on, with a dealer who starts then: the question's tape and the
    question, and then for each token what takes longer, its tape or itself. ms."""
    first = offline_ms(priced, network, "question") + sum(
        modelled(priced, network, phase="question").values()
    )
    pace = max(offline_ms(priced, network), sum(modelled(priced, network).values()))
    return first + (tokens - 1) * pace


@dataclass(frozen=True)
class Choice:
    """protocol: the quickest.  ms: of a whole answer with each that was weighed."""

    protocol: str
    network: str
    ms: Mapping[str, float]

    def __str__(self) -> str:
        """What was picked, and why."""
        mine = f"{self.ms[self.protocol] / 1000:.3g} s an answer by the model"
        rest = (f"{ms / 1000:.3g} s with {name}" for name, ms in self.ms.items() if name != self.protocol)
        return f"picked {self.protocol} for network {self.network}: {mine}, {', '.join(rest)}"


def pick(
    shape: ModelShape, policy: BoundPolicy, context: int, question: int, tokens: int, network: Profile | None,
    bits: int = 16, reveal: str = "logits",
) -> Choice:  # fmt: skip
    """How to compare: key trees take the fewest rounds, digits a ninth of the dealer's bytes for a round more
    in each top-k. From public sizes (tokens) alone, so all parties pick the same. Raises PolicyError."""
    where = network or NONE
    ms = {
        protocol: answer_ms(
            cost(shape, policy, context, question, protocol, bits=bits, reveal=reveal), where, tokens
        )
        for protocol in _FAST
    }
    return Choice(min(_FAST, key=ms.__getitem__), where.name, ms)
