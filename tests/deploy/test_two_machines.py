"""A party with two machines, a network namespace each, that are one Ray cluster: placed, lost, not there."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from mpcache.certificates import make_identity
from mpcache.cluster import REACH_S
from mpcache.config import Addresses, PublicConfig, Settings, Timeouts
from mpcache.rank import Rank
from tests.support.hosts import Hosts, ended, three_hosts, wait_for_answer, why_not
from tests.support.identities import pinned
from tests.support.paths import ROOT
from tests.support.processes import (
    PARTY,
    SOON_S,
    Process,
    environment,
    errors_of,
    start,
    started,
    tiny_model,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

S, C, D = Rank
FIRST, SECOND = S, D  # hosts: the machine where all three parties run, and the other one of the cluster
TOKENS = 16
PORT = 6379
MEMORY = 4 * 10**9  # bytes that each machine offers: both actors fit into one
ENDS_S = 180.0  # a generous wait; how long an end took is measured


@dataclass
class TwoMachines:
    """Hosts, of which two are one Ray cluster. ray: a folder for what it writes."""

    hosts: Hosts
    folder: Path
    config: Path
    ray: Path
    children: list[Process]

    @property
    def head(self) -> str:
        return f"{self.hosts.address(FIRST)}:{PORT}"

    def join(self, machine: Rank, *flags: object) -> None:
        command = self.hosts.on(machine, [str(Path(sys.executable).with_name("ray")), "start", "--block"])
        more = ["--node-ip-address", self.hosts.address(machine), "--num-cpus", 1, "--memory", MEMORY]
        self.children.append(start(command, *flags, *more, "--object-store-memory", 80 << 20))

    def gather(self) -> None:
        """Start Ray on both machines, and wait until each knows the other."""
        self.join(FIRST, "--head", "--port", PORT, "--include-dashboard=false", "--temp-dir", self.ray)
        self.join(SECOND, "--address", self.head)
        look = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(len(ray.nodes()))"
        command = self.hosts.on(FIRST, [sys.executable, "-c", look, self.head])
        limit = time.monotonic() + ENDS_S
        while (found := subprocess.run(command, capture_output=True, text=True, check=False)).stdout != "2\n":
            assert time.monotonic() < limit, found.stderr

    def processes(self, machine: Rank, name: bytes = b"") -> list[int]:
        """The processes that run on a machine, whose name begins so."""
        found = subprocess.run(["ip", "netns", "pids", f"{self.hosts.name}{machine.label}"],
                               capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
        return [int(pid) for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(name)]

    def lose(self, machine: Rank) -> None:
        """Let all of a machine's processes die at once."""
        for pid in self.processes(machine):
            os.kill(pid, signal.SIGKILL)

    def parties(self, **rays: str) -> dict[Rank, Process]:
        """Start all three on the first machine. rays: the cluster of a party that is spread over one."""
        own: dict[Rank, list[object]] = {
            S: ["--model", self.folder / "model", "--context", self.folder / "document.txt"],
            C: ["--question", "the book of", "--no-stop-at-eos"],  # no near tie: sessions round differently
            D: [],
        }
        found = {}
        for rank in (D, S, C):
            flags = [*own[rank], *(["--ray", rays[rank.label]] if rank.label in rays else [])]
            found[rank] = start(self.hosts.on(FIRST, PARTY), "--rank", int(rank), "--config", self.config,
                                "--identity", self.folder / rank.label, *flags)  # fmt: skip
        self.children += found.values()
        return found


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMachines]:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: the extra `scale`")
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    tiny_model(tmp_path / "model")
    (tmp_path / "document.txt").write_text("and the number of the gate of the city is in the book")
    identities = [make_identity(rank) for rank in Rank]
    for identity in identities:
        identity.write(tmp_path / identity.rank.label)
    ray = Path(tempfile.mkdtemp(prefix="mpc", dir="/tmp"))  # a socket's path may be no longer
    with three_hosts() as hosts, started() as children:
        settings = Settings(
            public=PublicConfig(policy="full", max_new_tokens=TOKENS, network="20:1000"),
            addresses=Addresses(server=f"{hosts.address(FIRST)}:7100", dealer=f"{hosts.address(FIRST)}:7102"),
            timeouts=Timeouts(connect_s=120),
        )
        config = write_config(pinned(settings, identities), tmp_path / "session.yaml")
        found = TwoMachines(hosts, tmp_path, config, ray, children)
        try:
            yield found
        finally:
            for machine in (FIRST, SECOND):
                found.lose(machine)
            shutil.rmtree(ray, ignore_errors=True)


PRODUCTS = """
import sys, torch
from pathlib import Path
from mpcache.model import load_model
from mpcache.rank import Rank
from mpcache.runtime.ring import matmul
from mpcache_parties.sharding import Shards

model = load_model(Path(sys.argv[2]), keep=False)
shards = Shards.open(sys.argv[1], None, Rank.SERVER, print)
for number, layer in enumerate(model.weights.layers):
    whole = torch.round(layer.w_down.double() * 2**16).long()
    x = torch.randint(-(2**63), 2**63 - 1, (3, whole.shape[0]))
    matrix = shards.weights(model, 16).layer(number)("down")
    assert torch.equal(matmul(x, matrix), torch.matmul(x, whole))
shards.say_settled()
shards.close()
"""


def counts(noise: str) -> list[str]:
    """What a party says of its rounds and bytes."""
    return re.findall(r"[\d,.]+ rounds, [\d.]+ \w+ sent", noise)


def test_actors_on_both_machines_give_the_same_session_and_one_may_be_lost(two: TwoMachines) -> None:
    plain = ended(two.parties(), ENDS_S)
    assert [plain[rank][0] for rank in Rank] == [0, 0, 0], plain
    two.gather()
    command = two.hosts.on(FIRST, [sys.executable, "-c", PRODUCTS, two.head, str(two.folder / "model")])
    found = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout.startswith(f"server: 2 actors on {two.head}"), found

    parties = two.parties(server=two.head)
    begun = wait_for_answer(parties[C])
    placed = {machine: len(two.processes(machine, b"ray::Shard")) for machine in (FIRST, SECOND)}
    assert placed == {FIRST: 1, SECOND: 1}
    whole = ended(parties, ENDS_S)
    assert [whole[rank][0] for rank in Rank] == [0, 0, 0], whole
    assert begun + whole[C][1] == plain[C][1]
    for rank in (S, C):
        assert counts(whole[rank][2]) == counts(plain[rank][2]) != []

    parties = two.parties(server=two.head)
    begun = wait_for_answer(parties[C])
    two.lose(SECOND)
    gone = time.monotonic()
    lost = ended(parties, ENDS_S)
    print(f"lost a machine, and ended {time.monotonic() - gone:.0f} s later")
    assert [lost[rank][0] for rank in Rank] == [0, 0, 0], lost
    assert begun + lost[C][1] == plain[C][1] and counts(lost[S][2]) == counts(plain[S][2])


def test_a_dealer_that_loses_a_machine_ends_all_with_one_line_each(two: TwoMachines) -> None:
    two.gather()
    parties = two.parties(dealer=two.head)
    wait_for_answer(parties[C])
    assert len(two.processes(SECOND, b"ray::Shard")) == 1
    two.lose(SECOND)
    begun = time.monotonic()
    found = ended(parties, ENDS_S)
    print(f"ended {time.monotonic() - begun:.0f} s later")
    assert time.monotonic() - begun < REACH_S
    assert all(found[rank][0] for rank in Rank), found
    (line,) = errors_of(found[D][2])
    assert "start the dealer anew" in line
    for rank in (S, C):
        (line,) = errors_of(found[rank][2])
        assert "machines of its own failed it" in line and two.hosts.address(SECOND) not in line


def test_where_no_cluster_is_the_party_ends_at_once(two: TwoMachines) -> None:
    for address, said in ((two.head, "Connection refused"), (f"{two.hosts.address(C)[:-1]}77:1", "no Ray")):
        begun = time.monotonic()
        parties = two.parties(server=address)
        code, _, noise = ended({S: parties[S]}, ENDS_S)[S]
        (line,) = errors_of(noise)
        assert code == 2 and f"--ray {address}: no Ray cluster there" in line and said in line
        assert time.monotonic() - begun < SOON_S
        for rank in (C, D):
            parties[rank].kill()
