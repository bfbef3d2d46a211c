"""Measure what TLS costs per token: the same question asked with and without it, in turns.

Three parties of this machine, the demo model, loopback. CPU time of all three together is compared, since
elapsed time depends on what else the machine does; set-up and context are in it, equally in both.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpcache.certificates import make_identity
from mpcache.rank import Rank


def config(folder: Path, tls: bool, tokens: int, policy: str) -> list[str]:
    """Write a configuration with free ports, and return the flags of each party."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        server, dealer = (f"127.0.0.1:{probe.getsockname()[1]}" for probe in (one, two))
    settings = {
        "public": {"max_new_tokens": tokens, "policy": policy},
        "addresses": {"server": server, "dealer": dealer},
        "certificates": {r.label: (folder / f"{r.label}.crt").read_text() for r in Rank} if tls else {},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return ["--config", str(file), *(["--identity", str(folder)] if tls else [])]


def run(folder: Path, tls: bool, tokens: int, policy: str) -> tuple[float, float]:
    """Run three parties once; return their CPU time in s, and the client's time per token in ms."""
    flags = config(folder, tls, tokens, policy)
    command = [sys.executable, "-m", "mpcache_parties", *flags]
    parties = []
    for rank in Rank:
        own = ["--no-stop-at-eos"] if rank is Rank.CLIENT else []
        parties.append(
            subprocess.Popen(
                [*command, "--rank", str(int(rank)), *own], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        )
    cpu, ms = 0.0, 0.0
    for rank, party in zip(Rank, parties, strict=True):
        assert party.stderr is not None
        noise = party.stderr.read().decode()
        _, status, used = os.wait4(party.pid, 0)
        if status:
            raise SystemExit(noise)
        cpu += used.ru_utime + used.ru_stime
        if rank is Rank.CLIENT and (found := re.search(r"([\d.]+) (ms|s) each", noise)):
            ms = float(found[1]) * (1000 if found[2] == "s" else 1)
    return cpu, ms


def main() -> None:
    """Ask with and without TLS in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each kind")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--policy", default="full")
    arguments = parser.parse_args()
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        for rank in Rank:
            make_identity(rank).write(Path(name))
        for _ in range(arguments.runs):
            for tls, runs in found.items():
                runs.append(run(Path(name), tls, arguments.tokens, arguments.policy))
    print(f"median of {arguments.runs} runs of {arguments.tokens} tokens, policy {arguments.policy}")
    for index, what in enumerate(("CPU of all three, s", "client, ms per token")):
        without, with_it = (statistics.median(run[index] for run in found[kind]) for kind in (False, True))
        print(f"{what}: {without:.4g} without TLS, {with_it:.4g} with it, ratio {with_it / without:.2f}")


if __name__ == "__main__":
    main()
