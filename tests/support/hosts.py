"""Three hosts on one machine: a network namespace for each party, joined by a bridge in a fourth."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from mpcache.rank import Rank
from tests.support.processes import Process

NETWORK = "10.177.42"


def why_not() -> str | None:
    """Say why there can be no such hosts here; None if there can."""
    if shutil.which("ip") is None or shutil.which("bridge") is None:
        return "there is no `ip` and `bridge` here"
    name = f"mpc{os.getpid()}x"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this user may make no network namespaces"
    made = subprocess.run(["ip", "-n", name, "link", "add", "b0", "type", "bridge"], check=False,
                          capture_output=True)  # fmt: skip
    run("ip", "netns", "del", name)
    return "this kernel has no bridges" if made.returncode else None


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@dataclass
class Hosts:
    """name: what their namespaces' names begin with."""

    name: str

    def address(self, rank: Rank) -> str:
        return f"{NETWORK}.{1 + int(rank)}"

    def on(self, rank: Rank, command: list[str]) -> list[str]:
        """The command, to be run at this party's host."""
        return ["ip", "netns", "exec", f"{self.name}{rank.label}", *command]

    def silence(self, *between: Rank, off: bool = False) -> None:
        """Drop without a word what goes between these hosts, as a firewall does; `off`: no longer."""
        for rank in between:
            state = "off" if off else "on"
            run("ip", "netns", "exec", f"{self.name}wire", "bridge", "link", "set", "dev", rank.label,
                "isolated", state)  # fmt: skip


@contextlib.contextmanager
def three_hosts() -> Iterator[Hosts]:
    hosts = Hosts(f"mpc{os.getpid()}")
    names = [f"{hosts.name}wire", *(f"{hosts.name}{rank.label}" for rank in Rank)]
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        wire = names[0]
        run("ip", "-n", wire, "link", "add", "joint", "type", "bridge")
        run("ip", "-n", wire, "link", "set", "joint", "up")
        for rank in Rank:
            there = f"{hosts.name}{rank.label}"
            run("ip", "-n", wire, "link", "add", rank.label, "type", "veth", "peer", "name", "eth0", "netns",
                there)  # fmt: skip
            run("ip", "-n", wire, "link", "set", rank.label, "master", "joint", "up")
            run("ip", "-n", there, "address", "add", f"{hosts.address(rank)}/24", "dev", "eth0")
            run("ip", "-n", there, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ended(parties: dict[Rank, Process], within_s: float) -> dict[Rank, tuple[int, str, str]]:
    """Wait for all parties; return each one's exit code, output and noise."""
    found = {}
    for rank, child in parties.items():
        out, noise = child.communicate(timeout=within_s)
        found[rank] = child.returncode, out, noise
    return found


def wait_for_answer(client: Process) -> str:
    """Wait for the answer's first piece."""
    assert client.stdout is not None
    first = client.stdout.read(1)
    assert first
    return first
