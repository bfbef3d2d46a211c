"""The network between the parties: what it is modelled as, and how a link is made as slow.

Model: a round waits for half a round trip, and for its bytes at the bandwidth of one direction. A
`Shaper` applies the same to a real link, so a latency measured over it is a measured one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from mpcache.errors import ConfigError


@dataclass(frozen=True)
class Profile:
    """A network. rtt_ms: round-trip time.  mbps: bandwidth of each direction, in 10^6 bits per second."""

    name: str
    rtt_ms: float
    mbps: float

    @property
    def one_way_ms(self) -> float:
        return self.rtt_ms / 2

    def transfer_ms(self, n: float) -> float:
        """Return how long n bytes take in one direction, delay apart, in ms."""
        return n * 8 / (self.mbps * 1000)

    def ms(self, rounds: float, n: float, compute_ms: float = 0.0) -> float:
        """Return the modelled latency in ms: rounds, n bytes in the busier direction, and computation."""
        return rounds * self.one_way_ms + self.transfer_ms(n) + compute_ms

    def __str__(self) -> str:
        return (
            self.name if self.name == self.spec else f"{self.name} ({self.rtt_ms:g} ms, {self.mbps:g} Mbps)"
        )

    @property
    def spec(self) -> str:
        """RTT_MS:MBPS."""
        return f"{self.rtt_ms:g}:{self.mbps:g}"


PROFILES = {"lan": Profile("lan", 0.5, 1000), "wan": Profile("wan", 40, 100)}
NO_NETWORK = Profile("none", 0, float("inf"))  # as the cost model takes `none`: no delay, any bandwidth
NETWORKS = f"{', '.join(('none', *PROFILES))} or RTT_MS:MBPS"  # what `parse_network` takes, in words


def parse_network(text: str) -> Profile | None:
    """Read `lan`, `wan` or RTT_MS:MBPS, such as `10:200`; None for `none`. Raises ConfigError.

    RTT_MS: 0 or more. MBPS: above 0. Both in digits, with a decimal point where one is needed.
    """
    if text == NO_NETWORK.name:
        return None
    if text in PROFILES:
        return PROFILES[text]
    match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text, re.ASCII)
    if match is None or float(match[2]) == 0:
        raise ConfigError(f"network {text!r} is not known; give {NETWORKS}, as in 10:200")
    return Profile(text, float(match[1]), float(match[2]))


class Shaper:
    """One direction of a link: it says when a message that arrives may be taken.

    A shaper stands at the receiving end and knows that end's clock only. A message of n bytes that arrives
    at time t occupies the line until max(t, the line is free) + n / bandwidth and is there half a
    round trip later. Times are seconds of a monotonic clock.
    """

    def __init__(self, profile: Profile, clock: Callable[[], float] = time.monotonic) -> None:
        self._delay_s = profile.one_way_ms / 1000
        self._s_per_byte = profile.transfer_ms(1) / 1000
        self._clock = clock
        self._free = -float("inf")

    def due(self, n: int) -> float:
        """Return when a message of n bytes that has just arrived is there, in seconds of the clock."""
        self._free = max(self._clock(), self._free) + n * self._s_per_byte
        return self._free + self._delay_s


def shaper(network: str) -> Shaper | None:
    """Make a new shaper for one direction; None where there is nothing to shape. Raises ConfigError."""
    profile = parse_network(network)
    return Shaper(profile) if profile is not None else None
