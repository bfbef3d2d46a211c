"""A whole session: on local links, and between processes that fail in every way a user can meet."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.answer import bind_to_document, plain_answer
from mpcache.config import PublicConfig, Settings
from mpcache.cost.pricing import price
from mpcache.errors import BadInput, Desync, LinkError, MpcacheError, PeerFailed
from mpcache.ledger import Ledger
from mpcache.limits import bind_policy
from mpcache.model import Model
from mpcache.model.prefill import prefill
from mpcache.policy.curve import LEVELS, HeadCurve, try_curve
from mpcache.rank import Rank
from mpcache.report.account import Report, summary
from mpcache.runtime.rng import SEED_BYTES
from mpcache.sampling import Sampling
from mpcache.transport.frames import FrameLink
from mpcache_kernels import backend
from mpcache_parties.handshake import NO_NAME, KeepMode, agree
from mpcache_parties.network.connect import connect_all
from mpcache_parties.private_inputs import Question
from mpcache_parties.roles import AHEAD
from tests.support.links import context_of, free_settings
from tests.support.processes import PARTY, SOON_S, errors_of, start, started, write_config
from tests.support.session import QUESTION, run_session

S, C, D = Rank


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    """A context of 90 tokens."""
    return context_of(model, 90)


# ------------------------------------------------------------------------------------ local links


def report_of(ends: Mapping[Rank, Report | MpcacheError], rank: Rank) -> Report:
    end = ends[rank]
    assert isinstance(end, Report), ends
    return end


def test_an_answer_that_leaves_its_range_ends_before_it_is_wrong(model: Model, tokens: list[int]) -> None:
    """Gates of layer 0 beyond silu's range: a token of the question, as the server cannot see."""
    layer = model.weights.layers[0]
    assert layer.w_gate is not None
    loud = replace(layer, w_gate=layer.w_gate * 60)
    weights = replace(model.weights, layers=(loud, *model.weights.layers[1:]))
    public = PublicConfig(policy="full", max_new_tokens=3)
    question = Question(QUESTION, stop_at_eos=False)
    ends = run_session(public, replace(model, weights=weights), tokens, question)
    client = report_of(ends, C)
    assert client.in_range is False and client.token_ids == [] and client.text == ""
    assert "decode1" not in client.phases and "decode1" not in report_of(ends, S).phases
    assert report_of(run_session(public, model, tokens, question), C).in_range is True


def test_an_answer_over_local_links(model: Model, tokens: list[int]) -> None:
    public = PublicConfig(policy="mpcache", max_new_tokens=4)
    reports = run_session(public, model, tokens, Question(QUESTION, stop_at_eos=False))
    server, client, dealer = (report_of(reports, rank) for rank in Rank)
    asked = model.tokenizer.encode(QUESTION, bos=False)
    bound = bind_policy(model.shape, public, len(tokens), len(asked))
    plain = plain_answer(model, bound, tokens, asked, 4, Sampling(), ())

    assert client.token_ids == plain.ids
    assert client.text == model.tokenizer.decode(plain.ids)
    names = ["setup", "context", "question", "decode1", "decode2", "decode3"]
    for report in (server, client, dealer):
        assert list(report.phases) == names
        assert (report.context_tokens, report.question_tokens) == (len(tokens), len(asked))
        assert Report.from_dict(report.to_dict()) == report
    for name in names:
        ours, theirs, tape = (report.phases[name] for report in (server, client, dealer))
        assert (ours.sent, ours.received, ours.rounds) == (theirs.received, theirs.sent, theirs.rounds)
        assert tape.offline_sent == ours.offline_received + theirs.offline_received
        assert tape.offline_received == ours.offline_sent
    assert server.prefill_ms > 0
    assert client.dealer_wait_ms > 0
    told = {S: server, C: client, D: dealer}
    run = summary(public.policy, "none", told, plain, client.text)
    last = [report.phases["decode2"] for report in (server, client, dealer)]
    assert run["private"]["rounds_per_token"] == last[0].rounds
    assert all(run["private"]["cpu_ms_per_token"][rank.label] > 0 for rank in Rank)
    assert run["private"]["online_bytes_per_token"] == (last[0].sent + last[1].sent) / 2
    assert run["private"]["offline_bytes_per_token"] == last[2].offline_sent
    assert run["setup_bytes"] > 4 * sum(t.numel() for _, t in model.weights.items() if t.dim() == 2)
    assert run["setup_bytes_client"] == 2 * SEED_BYTES  # of the weights' V, and of the document's
    assert run["agreement"] == 1
    # What the server uploads once is what the audit says.
    priced = price(model.shape, public.policy, len(tokens), len(asked), new_tokens=4)
    for name in ("setup", "context"):
        assert server.phases[name].offline_sent == priced.total(name).uploaded > 0
        assert server.phases[name].sent + client.phases[name].sent + dealer.phases[name].offline_sent == 0


THRESHOLD = PublicConfig(policy="mpcache:threshold=0.1,coarse=8,fine=4", max_new_tokens=3)


def test_what_the_document_decides_is_announced(model: Model, tokens: list[int]) -> None:
    """Leak class count: all three go on with the numbers that the server found, and with them alone."""
    reports = run_session(THRESHOLD, model, tokens, Question(QUESTION, stop_at_eos=False))
    server, client, dealer = (reports[rank] for rank in Rank)
    assert isinstance(server, Report) and isinstance(client, Report) and isinstance(dealer, Report), reports
    asked = model.tokenizer.encode(QUESTION, bos=False)
    bound = bind_policy(model.shape, THRESHOLD, len(tokens), len(asked))
    window = bound.window
    known, _ = bind_to_document(bound, model.shape, prefill(model, tokens, window=window), backend("cpu"))
    kept = [layer.kept for layer in known.plan.layers]
    assert max(kept) < len(tokens) and len(set(kept)) > 1
    assert server.kept_tokens == client.kept_tokens == dealer.kept_tokens == kept
    assert client.token_ids == plain_answer(model, bound, tokens, asked, 3, Sampling(), ()).ids
    # What it cost is what the audit says of these counts.
    given = f"{THRESHOLD.policy},n_keep={'/'.join(map(str, kept))}"
    priced = price(model.shape, given, len(tokens), len(asked), new_tokens=3).total("decode")
    steps = [client.phases[name] for name in ("decode1", "decode2")]
    assert sum(step.rounds for step in steps) == priced.rounds


def give_curve(model: Model) -> None:
    """A curve for this process: heads of one layer lose differently, and no token wins by a near tie."""
    shape, g = model.shape, torch.Generator().manual_seed(9)
    errors = torch.rand(shape.layers, shape.kv_heads, len(LEVELS), generator=g, dtype=torch.float64)
    try_curve(HeadCurve(model.digest, errors.sort(-1, descending=True).values, {}))


def test_what_the_model_decides_is_told_with_the_facts(model: Model, tokens: list[int]) -> None:
    """Leak class model-count: all plan with the curve's counts, and the answer is the plain engine's."""
    give_curve(model)
    public = PublicConfig(policy="compact", max_new_tokens=3)
    reports = run_session(public, model, tokens, Question(QUESTION, stop_at_eos=False))
    server, client, dealer = (reports[rank] for rank in Rank)
    assert isinstance(server, Report) and isinstance(client, Report) and isinstance(dealer, Report), reports
    assert server.plan == client.plan == dealer.plan and "parts" in str(server.plan)
    asked = model.tokenizer.encode(QUESTION, bos=False)
    bound = bind_policy(model.shape, public, len(tokens), len(asked))
    assert client.token_ids == plain_answer(model, bound, tokens, asked, 3, Sampling(), ()).ids
    counted = bound.with_counts(bound.count_from_model(model), model.shape)
    priced = price(model.shape, counted, question=len(asked), new_tokens=3).total("decode")
    steps = [client.phases[name] for name in ("decode1", "decode2")]
    assert sum(step.rounds for step in steps) == priced.rounds
    assert sum(step.sent for step in steps) == priced.client_sent


@pytest.mark.parametrize(
    "policy",
    [
        THRESHOLD.policy, THRESHOLD.policy + "|quest:page=4", "mpcache", "full",
        "compact", "compact:counts=joint", "compact:counts=equal",
    ],
)  # fmt: skip
def test_counts_are_sent_where_the_leak_is_declared(
    policy: str, model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all facts, `count` adds one message, and `model-count` a field to the model's; `none` adds none."""
    give_curve(model)
    said: list[tuple[Rank, Rank, str, set[str]]] = []
    honest = FrameLink.send_facts

    def send(link: FrameLink, step: str, facts: Mapping[str, object]) -> None:
        said.append((link.me, link.peer, step, set(facts)))
        honest(link, step, facts)

    monkeypatch.setattr(FrameLink, "send_facts", send)
    public = PublicConfig(policy=policy, max_new_tokens=1)
    reports = run_session(public, model, tokens, Question(QUESTION))
    assert all(isinstance(report, Report) for report in reports.values()), reports
    leak = bind_policy(model.shape, public, len(tokens), 3).policy.leak
    counts = [entry for entry in said if "counts" in entry[3]]
    announced = [(S, peer, "facts/counts", {"counts"}) for peer in (C, D)]
    assert sorted(counts) == (announced if leak == "count" else [])
    told = {(peer, step) for me, peer, step, names in said if "head_counts" in names}
    assert told == ({(peer, "facts/model") for peer in (C, D)} if leak == "model-count" else set())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([0, 5, 5], "n_keep=0/5/5 is out of range; allowed: 1 to 90"),
        ([5, 5, 91], "n_keep=5/5/91 is out of range; allowed: 1 to 90"),
        ([5, 5], "n_keep=5/5 is out of range; allowed: one number, or one for each of the 3 layers"),
        ([5, 5, 0.5], "not a list of whole numbers"),
        ([5, True, 5], "not a list of whole numbers"),
        ("5/5/5", "not a list of whole numbers"),
        (None, "announces counts None"),
    ],
)
def test_a_wrong_announcement_is_one_line(
    said: Any, words: str, model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = bind_to_document
    monkeypatch.setattr(
        "mpcache_parties.facts.bind_to_document", lambda *arguments: (honest(*arguments)[0], said)
    )
    errors = run_session(THRESHOLD, model, tokens, Question(QUESTION))
    # Whoever looks first says so; the other one may hear it from the server.
    assert any(isinstance(errors[rank], Desync) for rank in (C, D)), errors
    for error in errors.values():
        assert isinstance(error, Desync | PeerFailed)
        assert "\n" not in str(error)
        with pytest.raises(MpcacheError, match=words):
            raise error


def test_the_end_token_ends_all_three(model: Model, tokens: list[int]) -> None:
    """The dealer is told, too: it makes no more tapes than AHEAD beyond what is used."""
    public = PublicConfig(policy="full", max_new_tokens=20)
    asked = model.tokenizer.encode(QUESTION, bos=False)
    bound = bind_policy(model.shape, public, len(tokens), len(asked))
    ids = plain_answer(model, bound, tokens, asked, 3, Sampling(), ()).ids
    ends = replace(model, shape=replace(model.shape, eos_ids=(ids[1],)))
    answered = ids[: ids.index(ids[1]) + 1]
    reports = run_session(public, ends, tokens, Question(QUESTION))
    server, client, dealer = (reports[rank] for rank in Rank)
    assert isinstance(server, Report) and isinstance(client, Report) and isinstance(dealer, Report), reports
    assert client.token_ids == answered
    assert len(server.phases) == len(client.phases) == 2 + len(answered)
    assert len(client.phases) <= len(dealer.phases) <= len(client.phases) + AHEAD


def test_what_the_model_cannot_hold_is_the_same_line_everywhere(model: Model, tokens: list[int]) -> None:
    public = PublicConfig(policy="full", max_new_tokens=100)
    errors = run_session(public, model, tokens, Question(QUESTION))
    words = "make .* tokens, the model allows 128; shorten the context or lower --max-new-tokens"
    assert any(isinstance(error, BadInput) for error in errors.values())
    for error in errors.values():
        assert isinstance(error, BadInput | PeerFailed)
        with pytest.raises(MpcacheError, match=words):
            raise error


# -------------------------------------------------------------------------------------- processes


@pytest.fixture
def files(tmp_path: Path, model: Model, tokens: list[int]) -> tuple[Settings, Path, Path]:
    """Settings on free ports; their file; the document."""
    settings = free_settings()
    public = PublicConfig(policy="full", max_new_tokens=25)
    settings = settings.model_copy(update={"public": public})
    document = tmp_path / "document.txt"
    document.write_text(model.tokenizer.decode(tokens[:16]))
    return settings, write_config(settings, tmp_path / "config.yaml"), document


@pytest.mark.processes
@pytest.mark.parametrize("victim", [S, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (C, D))])
def test_a_party_killed_in_mid_answer(victim: Rank, folder: Path, files: tuple[Settings, Path, Path]) -> None:
    _, config, document = files
    flags: dict[Rank, list[object]] = {
        S: ["--model", folder, "--context", document],
        C: ["--question", QUESTION, "--no-stop-at-eos"],
        D: [],
    }
    with started() as children:
        for rank in (C, S, D):
            children.append(start(PARTY, "--rank", int(rank), "--config", config, *flags[rank]))
        client, server, dealer = children
        assert client.stdout is not None
        assert client.stdout.read(1), client.communicate()[1]  # the answer has begun
        processes = {S: server, C: client, D: dealer}
        os.kill(processes[victim].pid, signal.SIGKILL)
        limit = time.monotonic() + SOON_S
        for rank in set(Rank) - {victim}:
            _, noise = processes[rank].communicate(timeout=limit - time.monotonic())
            assert processes[rank].returncode == 3
            (line,) = errors_of(noise)
            assert f"lost {victim.label}: its process or the connection ended" in line


BAD = {
    "missing-model": (S, ["--model", "/no/such/folder"], 2, "/no/such/folder: no such model folder"),
    "missing-document": (S, ["--context", "/no/document"], 2, "/no/document: cannot be read: No such file"),
    "empty-question": (C, ["--question", " "], 2, "the question is empty"),
    "policy": (D, ["--policy", "mpcach"], 2, r"unknown policy 'mpcach' \(did you mean mpcache\?\)"),
    "policy-option": (C, ["--policy", "mpcache:nkeep=3"], 2, "no option 'nkeep'"),
    "another's-flag": (C, ["--model", "x"], 2, "--model belongs to the server"),
    "missing-client-document": (C, ["--context", "/no/document"], 2, "/no/document: cannot be read"),
    "another-config": (D, ["--max-new-tokens", "24"], 3, "max_new_tokens is 25 at .*, 24 at dealer"),
    "port": (S, [], 3, "is in use by another program|is not the server: it does not answer"),
}

# One of each way through the program; the rest go the same ways with other words.
WAYS = ("missing-model", "empty-question", "policy", "another-config", "port")

PLAIN_MODES = {"state": KeepMode.NONE.value, "document": NO_NAME}  # what a client without options says, too


@pytest.mark.processes
@pytest.mark.parametrize(
    "case", [case if case in WAYS else pytest.param(case, marks=pytest.mark.slow) for case in BAD]
)
def test_bad_input_ends_all(
    case: str, folder: Path, files: tuple[Settings, Path, Path], tmp_path: Path
) -> None:
    """The bad party is a process; the two that wait for it learn the reason."""
    settings, config, _ = files
    rank, flags, code, words = BAD[case]

    def wait(peer: Rank) -> LinkError:
        with pytest.raises(LinkError) as caught, connect_all(peer, settings, Ledger()) as network:
            agree(network.links, peer, settings.public.flat() | PLAIN_MODES)
            network[rank].recv_facts("facts/model")
        return caught.value

    with started() as children, socket.socket() as other, ThreadPoolExecutor(2) as pool:
        if case == "port":
            other.bind(("127.0.0.1", int(settings.addresses.server.rpartition(":")[2])))
            other.listen()
        peers = [pool.submit(wait, peer) for peer in set(Rank) - {rank}]
        children.append(start(PARTY, "--rank", int(rank), "--config", config, *flags))
        assert children[0].stderr is not None
        lines = [children[0].stderr.readline()]
        while lines[-1].startswith(f"{rank.label}: waiting"):
            lines.append(children[0].stderr.readline())
        begin = time.monotonic()  # the start of a process takes seconds on a busy machine
        out, noise = children[0].communicate(timeout=SOON_S)
        errors = [peer.result(timeout=SOON_S) for peer in peers]
        assert time.monotonic() - begin < SOON_S
    assert (children[0].returncode, out) == (code, "")
    (line,) = errors_of("".join(lines) + noise)
    assert re.search(words, line)
    for text in map(str, errors):
        assert "\n" not in text
        if "/no/" in line:  # a path is nobody else's business
            assert "its own input cannot be used" in text and "/no/" not in text
        else:
            assert re.search(words, text)


def test_kernels_that_the_config_asks_for(model: Model, tokens: list[int]) -> None:
    public = PublicConfig(policy="full", max_new_tokens=1, kernels="reference")
    reports = run_session(public, model, tokens, Question(QUESTION))
    assert report_of(reports, S).kernels == "reference"
    if torch.cuda.is_available():
        return
    errors = run_session(public.model_copy(update={"kernels": "triton"}), model, tokens, Question(QUESTION))
    for error in errors.values():
        assert "public.kernels is triton: the server has no GPU" in str(error)


@pytest.mark.processes
def test_a_party_that_never_comes(files: tuple[Settings, Path, Path], folder: Path) -> None:
    _, config, document = files
    with started() as children:
        for flags in (["--rank", 0, "--model", folder, "--context", document], ["--rank", 2]):
            children.append(start(PARTY, "--config", config, "--connect-timeout", 2, *flags))
        for child in children:
            _, noise = child.communicate(timeout=60)
            assert child.returncode == 3
            (line,) = errors_of(noise)
            assert "gave up waiting for " in line and "client to connect" in line


@pytest.mark.processes
def test_a_stop_signal_ends_all(files: tuple[Settings, Path, Path], folder: Path) -> None:
    """One party is told to stop; the others hear why. (The stopped one is the server.)"""
    _, config, document = files
    with started() as children:
        asked = ["--question", QUESTION, "--no-stop-at-eos"]  # the answer must not be over before the signal
        children.append(start(PARTY, "--config", config, "--rank", 1, *asked))
        children.append(start(PARTY, "--config", config, "--rank", 2))
        children.append(
            start(PARTY, "--config", config, "--rank", 0, "--model", folder, "--context", document)
        )
        client, dealer, server = children
        assert client.stdout is not None
        client.stdout.read(1)
        server.send_signal(signal.SIGTERM)
        for child, code in ((server, 143), (client, 3), (dealer, 3)):
            _, noise = child.communicate(timeout=SOON_S)  # the token in flight is finished first
            assert child.returncode == code
            (line,) = errors_of(noise)
            assert "server: stopped by SIGTERM" in line
