"""Which protocol the latency model speaks for: the choice behind `--protocol auto`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpcache.choices import ProtocolName, Reveal
from mpcache.cost.pricing import price
from mpcache.cost.rates import answer_ms
from mpcache.cost.reading import reading_ms
from mpcache.engines.registry import PROTOCOLS
from mpcache.errors import PolicyError
from mpcache.model import ModelShape
from mpcache.policy import BoundPolicy, parse_policy
from mpcache.report.units import duration
from mpcache.transport.network import NO_NETWORK, Profile

AUTO = ProtocolName.AUTO
CHOICES = (*PROTOCOLS, AUTO)  # what --protocol takes
# The same program; how a top-k and softmax compare differs. The first wins a tie.
_FAST = (ProtocolName.FAST, ProtocolName.FAST_BITS)


@dataclass(frozen=True)
class ProtocolChoice:
    """protocol: the quickest.  ms: of a whole answer with each that was weighed."""

    protocol: ProtocolName
    network: str
    ms: Mapping[ProtocolName, float]

    def __str__(self) -> str:
        """Say what was picked, and why."""
        mine = f"{duration(self.ms[self.protocol])} an answer by the model"
        rest = (f"{duration(ms)} with {name}" for name, ms in self.ms.items() if name != self.protocol)
        return f"picked {self.protocol} for network {self.network}: {mine}, {', '.join(rest)}"


def pick(
    shape: ModelShape, policy: BoundPolicy, context: int, question: int, tokens: int, network: Profile | None,
    bits: int = 16, reveal: Reveal = Reveal.LOGITS, grid: int = 1, private: int = 0,
) -> ProtocolChoice:  # fmt: skip
    """Choose how to compare: the quicker of key trees and digits, for an answer of `tokens` tokens.

    private: tokens of a document of the client's own, which is read first.

    Key trees take the fewest rounds; digits a few more in each top-k and softmax, and far fewer of the
    dealer's bytes. The choice follows from public sizes alone, in tokens: all parties pick the same. Where
    the document decides later what stays, it is made as for all of it.
    """
    where = network or NO_NETWORK
    try:
        policy = policy.priced(shape)
    except PolicyError:
        policy = parse_policy("full").bind(policy.plan.context, shape)
    ms = {
        protocol: reading_ms(shape, context, private, protocol, network, bits)
        + answer_ms(
            price(shape, policy, context, question, protocol, bits=bits, reveal=reveal, grid=grid),
            where,
            tokens,
        )
        for protocol in _FAST
    }
    return ProtocolChoice(min(_FAST, key=ms.__getitem__), where.name, ms)
