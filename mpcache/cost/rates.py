"""From counts to milliseconds: how fast a party computes, and how long a token takes on a network.

The model: rounds x RTT / 2 + bytes / bandwidth + computation (`mpcache.transport.network.Profile`). The
dealer sends ahead, beside the online phase: its bytes delay a token where their transfer takes longer than
the token.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpcache.cost.tally import Cost, Tally
from mpcache.transport.network import Profile


@dataclass(frozen=True)
class Rates:
    """How fast a party computes, for the model's third term: per second, on one core.

    The defaults are what one core of a common server does with this package; they tell how policies
    compare, not how long your machine takes: `mpcache audit --measure` fits them to that.
    round_ms: what a round costs in calls and messages on one machine, without any network.
    """

    multiply_adds: float = 0.7e9
    key_blocks: float = 25e6
    random_bytes: float = 1.2e9
    round_ms: float = 1.0

    def ms(self, rounds: int, multiply_adds: int, key_blocks: int, random_bytes: int) -> float:
        """Return how long these amounts of work take, in ms."""
        seconds = (
            multiply_adds / self.multiply_adds
            + key_blocks / self.key_blocks
            + random_bytes / self.random_bytes
        )
        return 1000 * seconds + rounds * self.round_ms

    def slower(self, times: float, round_ms: float) -> Rates:
        """Return the rates of a machine that takes `times` as long for all work, and `round_ms` a round."""
        return Rates(self.multiply_adds / times, self.key_blocks / times, self.random_bytes / times, round_ms)


RATES = Rates()


def compute_ms(tally: Tally, rates: Rates = RATES) -> float:
    """Return how long the busier computing party computes, in ms."""
    return rates.ms(tally.rounds, tally.multiply_adds, tally.key_blocks, tally.random_bytes)


def phase_ms(tally: Tally, network: Profile) -> float:
    """Return how long a phase takes, in ms: itself, or its tape where that takes longer."""
    online = tally.rounds * network.one_way_ms + network.transfer_ms(tally.critical) + compute_ms(tally)
    return max(online, network.transfer_ms(tally.server_offline))


def modelled(priced: Cost, network: Profile, rates: Rates = RATES, phase: str = "decode") -> dict[str, float]:
    """Return the latency of one token in ms, by its rounds, its bytes and its computation.

    phase: `decode` gives the mean of its steps; any other phase is taken as a whole.
    """
    tally, steps = priced.total(phase), priced.steps if phase == "decode" else 1
    compute = compute_ms(tally, rates)
    return {
        "rounds": tally.rounds * network.one_way_ms / steps,
        "bytes": network.transfer_ms(tally.critical) / steps,
        "compute": compute / steps,
    }


def offline_ms(priced: Cost, network: Profile, phase: str = "decode") -> float:
    """Return how long the dealer's bytes for one token take to the server, who gets most of them, in ms."""
    steps = priced.steps if phase == "decode" else 1
    return network.transfer_ms(priced.total(phase).server_offline / steps)


def pace_ms(priced: Cost, network: Profile, rates: Rates = RATES) -> float:
    """Return what a token takes in a long answer, in ms: itself or its tape, whichever takes longer."""
    return max(offline_ms(priced, network), sum(modelled(priced, network, rates).values()))


def answer_ms(priced: Cost, network: Profile, tokens: int) -> float:
    """Return how long a whole answer of `tokens` tokens takes from the context on, in ms.

    The dealer starts then: the question's tape and the question come first, and then for each token
    whichever takes longer, its tape or itself.
    """
    first = offline_ms(priced, network, "question") + sum(
        modelled(priced, network, phase="question").values()
    )
    return first + (tokens - 1) * pace_ms(priced, network)
