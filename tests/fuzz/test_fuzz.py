"""Damaged input of every kind: no crash, no hang, no traceback, no large allocation; always a named error."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from mpcache.config import Settings
from mpcache.errors import LinkError, MpcacheError
from mpcache.ledger import Ledger
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.transport.flow_control import largest_frame
from mpcache_parties.network.channels import SERVICE
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.metadata import RANK_KEY, SESSION_KEY, new_session
from tests.fuzz.replay import Conversation, converse, replay
from tests.fuzz.targets import check_line
from tests.fuzz.wire import bytes_of, odd_frames, odd_metadata
from tests.support.links import free_settings
from tests.support.paths import ROOT
from tests.support.processes import environment

QUICK, MANY = 2500, 100_000  # cases


def fuzz(cases: int, seed: int, folder: Path, timeout_s: float) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", str(cases), str(seed), str(folder)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"a hang, or too slow, at case {(folder / 'case').read_text()}")
    where = (folder / "case").read_text() if (folder / "case").exists() else "the start"
    again = f"python -m tests.fuzz.run {cases} {seed} FOLDER TARGET NUMBER"
    assert done.returncode == 0, f"at {where} ({again}):\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert json.loads(done.stdout.splitlines()[-1])["cases"] >= cases


def test_damaged_input_is_a_named_error(tmp_path: Path) -> None:
    fuzz(QUICK, 1, tmp_path, 200)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_thousand_damaged_inputs(tmp_path: Path) -> None:
    fuzz(MANY, 2, tmp_path, 1400)


# ------------------------------------------------------------------------------- a party and its peers


@pytest.fixture(scope="module")
def heard(model: Model) -> Conversation:
    return converse(model)


def test_what_was_said_once_is_understood_again(model: Model, heard: Conversation) -> None:
    """The replay without damage: each party alone gets to its end."""
    for rank in Rank:
        assert replay(model, heard, rank, heard[rank]) is None


def damaged_sessions(model: Model, heard: Conversation, n: int, seed: int) -> None:
    """One frame lost, doubled, moved, cut, lengthened, or with bits turned: the party goes on (bits of a
    tensor are as good as others) or ends with a named error."""
    named = 0
    for i in range(n):
        rng = random.Random(f"{seed} {i}")
        rank = rng.choice(list(Rank))
        error = replay(model, heard, rank, damage(rng, heard[rank]))
        named += error is not None
        if error is not None:
            assert isinstance(error, MpcacheError), (seed, i, rank, error)
            check_line(error)
    assert named > n // 3


def damage(rng: random.Random, said: dict[Rank, list[bytes]]) -> dict[Rank, list[bytes]]:
    copy = {peer: list(frames) for peer, frames in said.items()}
    peer = rng.choice([peer for peer, frames in copy.items() if frames])
    frames = copy[peer]
    # Early frames are short and say most; the others are tensors.
    i = min(int(rng.expovariate(0.15)), len(frames) - 1)
    j = rng.randrange(len(frames))
    match rng.randrange(7):
        case 0:
            del frames[i]
        case 1:
            frames.insert(j, frames[i])
        case 2:
            frames[i], frames[j] = frames[j], frames[i]
        case 3:
            del frames[i:]
        case 4:
            frames[i] = frames[i][: rng.randrange(len(frames[i]) + 1)]
        case 5:
            frames[i] += rng.randbytes(rng.choice((1, 10, 100_000)))
        case _:
            data = bytearray(frames[i])
            for _ in range(rng.choice((1, 8, 100))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            frames[i] = bytes(data)
    return copy


def test_damaged_sessions(model: Model, heard: Conversation) -> None:
    damaged_sessions(model, heard, 40, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_damaged_sessions(model: Model, heard: Conversation) -> None:
    damaged_sessions(model, heard, 1500, 2)


# --------------------------------------------------------------------------------------- on the wire


@pytest.mark.slow
def test_strangers_on_the_wire() -> None:
    """Callers that are no party: odd metadata, unknown methods, frames that are none or too large. The
    listener ends with a named error, whatever they do; it neither falls nor hangs."""
    rng = random.Random(5)
    for i in range(12):
        settings = free_settings(connect_s=2, recv_s=1)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(_listen, settings)
            with grpc.insecure_channel(settings.addresses.dealer) as channel:
                grpc.channel_ready_future(channel).result(timeout=20)
                _call(channel, rng, i)
            error = waiting.result(timeout=30)
        assert isinstance(error, LinkError), (i, error)
        check_line(error)


def _listen(settings: Settings) -> BaseException:
    """The dealer, until it gives up."""
    try:
        with connect_all(Rank.DEALER, settings, Ledger()) as network:
            for link in network.links.values():
                link.recv_hello()
                link.recv_facts("facts/model")
    except Exception as error:
        return error
    raise AssertionError("a stranger was taken for a party")


def _call(channel: grpc.Channel, rng: random.Random, i: int) -> None:
    """One stream with odd content, to its end."""
    rank = rng.choice(("0", "1", "1", "1", "2", "9", "-1", "x" * 2000))
    metadata = odd_metadata(rng, [[RANK_KEY, rank], [SESSION_KEY, new_session()]])
    frames = odd_frames(rng, Rank.CLIENT)
    if i % 3 == 0:
        frames.insert(rng.randrange(2), largest_frame(Rank.DEALER, Rank.CLIENT) + 1)
    method = f"/{SERVICE}/{'Connect' if i % 4 else 'Nothing'}"
    with suppress(grpc.RpcError):
        for _ in channel.stream_stream(method)(bytes_of(frames), metadata=metadata, timeout=15):
            pass
