"""What a session took, per party and all together, as one JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from mpcache.answer import PlainAnswer
from mpcache.ledger import Entry
from mpcache.phases import EVICTION, ChunkPlace, is_decode, private_chunk
from mpcache.rank import Rank
from mpcache.report.units import whole

Reports = Mapping[Rank, "Report"]


@dataclass
class Phase:
    """One phase at one party. Units: ms, rounds, payload bytes; offline is traffic with the dealer.

    ms: on the clock.  cpu_ms: of computation, on all threads of the party.
    """

    ms: float = 0.0
    cpu_ms: float = 0.0
    rounds: int = 0
    sent: int = 0
    received: int = 0
    offline_sent: int = 0
    offline_received: int = 0

    @property
    def traffic(self) -> Entry:
        """Its rounds and bytes."""
        return Entry(**{each.name: getattr(self, each.name) for each in fields(Entry)})


class Finish(StrEnum):
    """What an answer ended with."""

    STOP = "stop"  # its end token
    LENGTH = "length"  # as many tokens as were asked for
    STOPPED = "stopped"  # the one who asked had heard enough


@dataclass(frozen=True)
class TurnReport:
    """The client's account of one turn. Units: ms, rounds, bytes.

    question_tokens: that were taken in, with what stands around the text.  room: tokens that the session may
    still take.  ms: from the question to the last token.  sent, received: to and from the server.
    offline_sent, offline_received: to and from the dealer.  question: its text.
    """

    number: int
    text: str
    token_ids: list[int]
    finish: Finish
    question_tokens: int
    room: int
    ms: float
    first_token_ms: float
    rounds: int
    sent: int
    received: int
    offline_sent: int
    offline_received: int
    question: str = ""


@dataclass
class Report:
    """One party's account of a session. Phases: setup, context, question, decode1, decode2, ..."""

    rank: int
    protocol: str
    context_tokens: int
    question_tokens: int
    kept_tokens: list[int]  # per layer
    plan: dict[str, Any] = field(default_factory=dict)  # the policy's integers
    phases: dict[str, Phase] = field(default_factory=dict)
    wire_bytes: int = 0  # both directions, all links, with frames' headers
    seconds: float = 0.0  # from the session's first word to its last
    private_tokens: int = 0  # of the client's document
    private_kept: int = 0  # of these, in the layer that keeps most
    private_chunk: int = 0  # of these, read at once
    setup_bytes: int = 0  # both directions, all links: of masked weights, and of the seeds of V
    prefill_ms: float = 0.0  # server: the pass over the context, and its eviction
    kernels: str = ""  # server: which kernels it took
    dealer_wait_ms: float = 0.0  # computing parties: waiting for the dealer, after set-up and context
    checkpoint_ms: list[float] = field(default_factory=list)  # with --state: what each took
    checkpoint_bytes: list[int] = field(default_factory=list)  # and its size on disk
    token_ids: list[int] = field(default_factory=list)  # client
    text: str = ""  # client
    turns: list[TurnReport] = field(default_factory=list)  # client, of a conversation
    in_range: bool | None = None  # client: whether all values were; None where its protocol does not look

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        phases = {name: Phase(**phase) for name, phase in data["phases"].items()}
        turns = [TurnReport(**turn) for turn in data.get("turns", ())]
        return Report(**{**data, "phases": phases, "turns": turns})

    def steps(self) -> list[Phase]:
        """Return the decode steps; the questions' where each was answered by one token; none of no answer."""
        found = [phase for name, phase in self.phases.items() if is_decode(name)]
        return found or [phase for name, phase in self.phases.items() if ChunkPlace.of(name) is not None]

    def per_token(self, amount: str) -> float:
        """Return the mean over decode steps of a field of Phase."""
        steps = self.steps()
        return statistics.fmean(getattr(phase, amount) for phase in steps) if steps else 0.0


def phases_of(
    steps: Iterable[tuple[str, Entry]], ms: Mapping[str, float], cpu_ms: Mapping[str, float]
) -> dict[str, Phase]:
    """Sum what a ledger's steps booked in each of these phases, beside how long the phases took."""
    entries: dict[str, Entry] = {name: Entry() for name in ms}
    for step, entry in steps:
        if (name := step.partition("/")[0]) in entries:
            entries[name] += entry
    return {name: Phase(ms[name], cpu_ms[name], **asdict(entry)) for name, entry in entries.items()}


def summary(
    policy: str, leakage: str, reports: Reports, plain: PlainAnswer, plain_text: str
) -> dict[str, Any]:
    """Put one run into one JSON object.

    Units: ms, bytes, rounds; `_per_token` is the mean over decode steps.
    """
    server, client, dealer = (reports[rank] for rank in Rank)
    plain_ms = [ms for name, ms in plain.ms.items() if is_decode(name)] or [plain.ms["question"]]
    private_ms = [phase.ms for phase in client.steps()]

    def sent(name: str) -> int:
        ends = (report.phases[name] for report in (server, client, dealer))
        return sum(end.sent + end.offline_sent for end in ends)

    used = [name for name in client.phases if is_decode(name)] or ["question"]
    offline = statistics.fmean(dealer.phases[name].offline_sent for name in used)
    return {
        "text": client.text,
        "token_ids": client.token_ids,
        "plaintext_text": plain_text,
        "plaintext_token_ids": plain.ids,
        "agreement": agreement(client.token_ids, plain.ids),
        "in_range": client.in_range,
        "policy": policy,
        "protocol": client.protocol,
        "leakage": leakage,
        "context_tokens": client.context_tokens,
        "question_tokens": client.question_tokens,
        "kept_tokens": client.kept_tokens,
        "plan": client.plan,
        "prefill_ms": server.prefill_ms,
        "kernels": server.kernels,
        "setup_ms": client.phases["setup"].ms,
        "setup_bytes": sent("setup"),
        "setup_bytes_client": client.setup_bytes,
        "context_bytes": sent("context"),
        "total_seconds": {Rank(r.rank).label: r.seconds for r in reports.values()},
        "total_bytes": {Rank(r.rank).label: r.wire_bytes for r in reports.values()},
        "checkpoints": {Rank(r.rank).label: kept_of(r) for r in reports.values() if r.checkpoint_ms},
        "client_document": _document_of(reports),
        "private": {
            "first_token_ms": client.phases["context"].ms + client.phases["question"].ms,
            "ms_per_token": statistics.fmean(private_ms),
            "ms_per_token_median": statistics.median(private_ms),
            "ms_per_token_p95": p95(private_ms),
            "token_ms": private_ms,
            "rounds_per_token": whole(client.per_token("rounds")),
            "online_bytes_per_token": whole((server.per_token("sent") + client.per_token("sent")) / 2),
            "offline_bytes_per_token": whole(offline),
            "question_rounds": client.phases["question"].rounds,
            "dealer_wait_ms": client.dealer_wait_ms,
            "cpu_ms_per_token": {Rank(r.rank).label: r.per_token("cpu_ms") for r in reports.values()},
            "wire_bytes": sum(report.wire_bytes for report in reports.values()) // 2,
        },
        "plaintext": {
            "prefill_ms": plain.prefill_ms,
            "first_token_ms": plain.prefill_ms + plain.ms["question"],
            "ms_per_token": statistics.fmean(plain_ms),
            "ms_per_token_median": statistics.median(plain_ms),
            "ms_per_token_p95": p95(plain_ms),
            "kernels": plain.kernels,
        },
    }


def _document_of(reports: Reports) -> dict[str, Any] | None:
    """Return what the client's document took, None where it has none; `online_bytes` as for a token."""
    server, client, dealer = (reports[rank] for rank in Rank)
    if not client.private_tokens:
        return None

    def part(names: Sequence[str]) -> dict[str, Any]:
        ours, theirs, tapes = ([report.phases[name] for name in names] for report in (server, client, dealer))
        return {
            "ms": sum(phase.ms for phase in theirs),
            "rounds": sum(phase.rounds for phase in theirs),
            "online_bytes": whole(sum(phase.sent for phase in (*ours, *theirs)) / 2),
            "offline_bytes": sum(phase.offline_sent for phase in tapes),
            "cpu_ms": {Rank(r.rank).label: sum(r.phases[name].cpu_ms for name in names)
                       for r in (server, client, dealer)},
        }  # fmt: skip

    chunks = [name for name in client.phases if private_chunk(name) is not None]
    evicted = [name for name in client.phases if name == EVICTION]
    return {
        "tokens": client.private_tokens,
        "kept": client.private_kept,
        "chunks": len(chunks),
        "chunk_tokens": client.private_chunk,
        "reading": part(chunks),
        "eviction": part(evicted) if evicted else None,
    }


def kept_of(report: Report) -> dict[str, float]:
    """Return what one party's checkpoints took in this run, in ms and in bytes on disk.

    The median stands for a token's; the largest is the context's.
    """
    return {
        "ms_median": statistics.median(report.checkpoint_ms),
        "ms_largest": max(report.checkpoint_ms),
        "bytes_median": statistics.median(report.checkpoint_bytes),
        "bytes_largest": max(report.checkpoint_bytes),
    }


def agreement(one: Sequence[int], two: Sequence[int]) -> float:
    """Return the share of places that hold the same token, over the longer of the two."""
    places = max(len(one), len(two))
    return sum(a == b for a, b in zip(one, two, strict=False)) / places if places else 1.0


def p95(values: Sequence[float]) -> float:
    """Return the smallest value that at least 95 % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[-(-95 * len(ordered) // 100) - 1]
