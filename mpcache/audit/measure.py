"""Real runs beside the model: three party processes for each setting, and what they show.

Each setting is run once on each network, which the calibrated model is compared with, and without a
network before and after each of these: all such runs together calibrate the model's computation, so that
a load that changes meets both alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mpcache.audit.priced_rows import AuditGrid, AuditRow, Setting, price_setting
from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.console.inputs import read_text
from mpcache.console.terminal import Say
from mpcache.cost.rates import RATES, Rates, modelled
from mpcache.demo import DEMO_DOCUMENT
from mpcache.errors import BadInput
from mpcache.limits import bind_policy
from mpcache.model import load_tokenizer
from mpcache.model.tokenizer import Tokenizer
from mpcache.padding import padded_length
from mpcache.phases import is_decode
from mpcache.rank import Rank
from mpcache.report.account import Reports, p95
from mpcache.report.units import whole
from mpcache.transport.network import NO_NETWORK
from mpcache_parties.launch import run_quietly

Key = tuple[str, str, int, str]  # a setting, and a network


@dataclass(frozen=True)
class Measured:
    """One answer of three real parties.

    token_ms: the client's decode steps; the rest is per decode step, as in `audit.priced_rows`.
    first_token_ms: from the context on.
    """

    token_ms: Sequence[float]
    first_token_ms: float
    rounds: float
    online: float
    offline: float

    @staticmethod
    def of(reports: Reports) -> Measured:
        server, client, dealer = (reports[rank] for rank in Rank)
        online = (server.per_token("sent") + client.per_token("sent")) / 2
        # The dealer may have dealt for steps that were not taken, so its own mean is another one.
        taken = [dealer.phases[name] for name in client.phases if is_decode(name)]
        return Measured(
            [phase.ms for phase in client.steps()],
            client.phases["context"].ms + client.phases["question"].ms,
            client.per_token("rounds"),
            online,
            statistics.fmean(phase.offline_sent for phase in taken),
        )

    @property
    def ms(self) -> float:
        return statistics.median(self.token_ms)

    def with_another(self, run: Measured) -> Measured:
        """Two runs of one setting as one: the traffic is the same, the times are those of both."""
        first = (self.first_token_ms + run.first_token_ms) / 2
        return replace(self, token_ms=[*self.token_ms, *run.token_ms], first_token_ms=first)


def plan(grid: AuditGrid, rows: Sequence[AuditRow]) -> list[tuple[Key, PublicConfig]]:
    """List the runs that these rows need, in order.

    The runs of a setting without a network stand around its others.

    Raises BadInput where a setting could not run, before the first of them does.
    """
    settings = dict.fromkeys((row["policy"], row["protocol"], row["context_tokens"]) for row in rows)
    networks = [NO_NETWORK.name]
    for network in dict.fromkeys(
        network.name for network in grid.networks if network.name != NO_NETWORK.name
    ):
        networks += [network, NO_NETWORK.name]
    runs = []
    for (spec, protocol, context), network in product(settings, networks):
        public = PublicConfig(
            policy=spec, protocol=ProtocolName(protocol), network=network, max_new_tokens=grid.new_tokens,
            reveal=grid.reveal, length_grid=grid.pad,
        )  # fmt: skip
        bind_policy(grid.shape, public, context, padded_length(grid.question, grid.pad))
        runs.append(((spec, protocol, context, network), public))
    return runs


def measure(
    runs: Sequence[tuple[Key, PublicConfig]], question: int, model: Path, say: Say = lambda text: None
) -> Iterator[tuple[Key, Measured]]:
    """Run the parties, one run after the other, on texts of the right lengths; yields each as it ends.

    question: tokens.  model: a folder with weights. Raises BadInput, PartyFailed, or what a signal
    raises; no process is left then.
    """
    tokenizer, source = load_tokenizer(model), read_text(DEMO_DOCUMENT)
    asked = text_of(tokenizer, source[len(source) // 2 :], question, bos=False)
    documents: dict[int, str] = {}
    for done, (key, public) in enumerate(runs, 1):
        spec, protocol, context, network = key
        if context not in documents:
            documents[context] = text_of(tokenizer, source, context, bos=True)
        say(f"run {done} of {len(runs)}: {spec}, {protocol}, {context} tokens, network {network}")
        yield key, Measured.of(run_quietly(public, model, documents[context], asked))


def text_of(tokenizer: Tokenizer, source: str, n: int, bos: bool) -> str:
    """Make a text of exactly n tokens from what `source` says, again and again. Raises BadInput."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, bos))

    text = source
    while count(text) < n:
        text += source
    low, high = 0, len(text)  # the shortest beginning with at least n tokens, as far as that is monotone
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(text[:middle]) >= n else (middle + 1, high)
    near = sorted(range(max(1, low - 40), min(len(text), low + 40) + 1), key=lambda end: abs(end - low))
    for beginning in (text[:end] for end in near):
        if count(beginning) == n and beginning.strip():
            return beginning
    raise BadInput(f"no text of exactly {n} tokens was found for this tokenizer; measure another length")


def calibrated(runs: Mapping[Key, Measured], grid: AuditGrid) -> dict[Setting, Rates]:
    """Fit this machine's rates to each setting's runs without a network: the median of all their tokens.

    What such a token takes beyond the work that its counts tell is put on its rounds: calls, messages,
    and waiting for a core that another party, or the dealer, has. A setting that was not run takes the
    mean of its protocol's (`full`, for ratios).
    """
    found: dict[Setting, Rates] = {}
    for (spec, protocol, context, network), run in runs.items():
        if network == NO_NETWORK.name:
            priced = price_setting(grid, spec, context, protocol)
            tally, steps = priced.total("decode"), priced.steps
            work = modelled(priced, NO_NETWORK, replace(RATES, round_ms=0))["compute"]
            round_ms = (run.ms - work) * steps / tally.rounds
            times = min(1.0, run.ms / work)  # a machine that does the work alone in less time
            found[spec, protocol, context] = RATES.slower(times, max(0.0, round_ms))
    for protocol in {way for _, way, _ in found}:
        mine = [rates for (_, way, _), rates in found.items() if way == protocol]
        for context in grid.contexts if mine else ():
            mean = replace(RATES, round_ms=statistics.fmean(rates.round_ms for rates in mine))
            found.setdefault(("full", protocol, context), mean)
    return found


def put_beside(rows: Sequence[AuditRow], runs: Mapping[Key, Measured]) -> None:
    """Add what was measured to each row, and None where it was not.

    `difference`: measured over modelled time, less one. A dealer whose bytes take longer than the token
    sets the pace (`offline_transfer_ms`), so the larger of the two is what a measurement is held against.
    """
    for row in rows:
        run = runs.get((row["policy"], row["protocol"], row["context_tokens"], row["network"]))
        row["measured_ms_per_token"] = round(run.ms, 3) if run else None
        row["measured_ms_p95"] = round(p95(run.token_ms), 3) if run else None
        row["measured_first_token_ms"] = round(run.first_token_ms, 3) if run else None
        row["measured_rounds_per_token"] = whole(round(run.rounds, 3)) if run else None
        row["measured_online_bytes_per_token"] = whole(round(run.online, 3)) if run else None
        row["measured_offline_bytes_per_token"] = whole(round(run.offline, 3)) if run else None
        pace = row["total_ms_per_token"]
        row["difference"] = round(run.ms / pace - 1, 4) if run else None


def errors(rows: Sequence[AuditRow]) -> dict[str, Any]:
    """Sum up, per shaped network, the runs, and the mean and the largest absolute difference."""
    by_network: dict[str, list[float]] = {}
    for row in rows:
        if row["network"] != NO_NETWORK.name and row["difference"] is not None:
            by_network.setdefault(row["network"], []).append(abs(row["difference"]))
    return {
        name: {
            "runs": len(found),
            "mean": round(statistics.fmean(found), 4),
            "largest": round(max(found), 4),
        }
        for name, found in by_network.items()
    }
