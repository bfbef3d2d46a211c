"""The files of deploy/ are read by their own tools, and say what the program says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import typer
import yaml

from mpcache.config import load_settings
from mpcache.rank import Rank
from mpcache_parties.main import app
from mpcache_parties.operations.metrics import PartyMetrics
from mpcache_parties.operations.status import PartyStatus
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
PARTIES = [rank.label for rank in Rank]
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
# What Prometheus' own collector says of each process.
OF_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}


def documents(file: Path) -> list[dict[str, Any]]:
    return [part for part in yaml.safe_load_all(file.read_text()) if part]


def known_flags() -> set[str]:
    """The flags of `mpcache-party` itself, and its commands' names."""
    group = typer.main.get_command(app)
    return {name for param in group.params for name in (*param.opts, *param.secondary_opts)}


def check_command(words: list[str]) -> None:
    """The flags exist, and a flag with a value has one."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(flags) <= known_flags(), set(flags) - known_flags()
    assert {"--rank", "--config", "--identity"} <= set(flags)


# ---------------------------------------------------------------------------------------------- image


def test_the_image_installs_the_tested_versions_of_all_that_a_party_imports() -> None:
    tested = (ROOT / "requirements" / "tested.txt").read_text().splitlines()
    image = [line for line in (DEPLOY / "requirements.txt").read_text().splitlines() if "==" in line]
    assert set(image) <= set(tested)
    project = re.search(r"\ndependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert project is not None
    needed = {re.split(r"[<>=]", name)[0].lower() for name in re.findall(r'"([^"]+)"', project[1])}
    assert needed <= {line.partition("==")[0].lower() for line in image}


def test_the_containerfile_passes_its_linter() -> None:
    command = [BIN / "hadolint", DEPLOY / "Containerfile"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


def test_the_image_runs_without_root() -> None:
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    last = [line for line in lines if line.startswith("USER ")][-1]
    assert last == "USER 10001:10001"
    assert 'ENTRYPOINT ["mpcache-party"]' in lines


# -------------------------------------------------------------------------------------------- compose


def composed(folder: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """Read compose.yaml with `docker compose`, or with podman-compose, which asks podman for its version."""
    stub = folder / "podman"
    stub.write_text("#!/bin/sh\necho podman version 5.4.0\n")
    stub.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    here = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False) \
        if shutil.which("docker") else None  # fmt: skip
    tool: list[str | Path] = (
        ["docker", "compose"] if here is not None and here.returncode == 0 else [BIN / "podman-compose"]
    )
    command = [*tool, "-f", DEPLOY / "compose" / "compose.yaml", "config"]
    environment = {"PATH": path, "HOME": str(folder)} | given
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_compose_reads_three_parties_with_a_network_for_each_pair(tmp_path: Path) -> None:
    run = composed(tmp_path, MODEL="/models/m")
    assert run.returncode == 0, run.stderr
    services = yaml.safe_load(run.stdout)["services"]
    assert sorted(services) == sorted(PARTIES)
    networks = {name: set(service["networks"]) for name, service in services.items()}
    for one in PARTIES:
        for other in set(PARTIES) - {one}:
            assert len(networks[one] & networks[other]) == 1
    for name, service in services.items():
        words = service["command"]
        words = shlex.split(words) if isinstance(words, str) else words
        check_command([str(word) for word in words])
        secrets = {s if isinstance(s, str) else s["source"] for s in service["secrets"]}
        own = {f"{name}.key", f"{name}.crt"}
        assert own <= secrets <= own | {"api.key"}  # nobody else's key
        assert service["healthcheck"]["test"][0] == "CMD"


def test_compose_says_that_it_needs_a_model(tmp_path: Path) -> None:
    run = composed(tmp_path)
    assert run.returncode != 0
    assert "the folder or .gguf file of the model" in run.stderr


@pytest.mark.parametrize("folder", ["compose", "kubernetes"])
def test_the_parties_find_each_other_at_the_names_of_their_services(folder: str) -> None:
    addresses = load_settings(DEPLOY / folder / "session.yaml").addresses
    if folder == "compose":
        assert (addresses.server, addresses.dealer) == ("server:7100", "dealer:7102")
        return
    for party in ("server", "dealer"):
        (service,) = [d for d in documents(DEPLOY / folder / f"{party}.yaml") if d["kind"] == "Service"]
        about, (port,) = service["metadata"], service["spec"]["ports"]
        assert addresses.of(Rank[party.upper()]) == f"{about['name']}.{about['namespace']}.svc:{port['port']}"


@pytest.mark.slow
@pytest.mark.processes
def test_the_script_makes_identities_that_the_config_pins(tmp_path: Path) -> None:
    for name in ("keys.sh", "session.yaml"):
        shutil.copy(DEPLOY / "compose" / name, tmp_path)
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run([tmp_path / "keys.sh"], check=True, capture_output=True, env=environment)
    pinned = load_settings(tmp_path / "session.yaml").certificates
    assert all(getattr(pinned, party) for party in PARTIES)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "keys").glob("*.key")}
    assert modes == dict.fromkeys(["server.key", "client.key", "dealer.key", "api.key"], 0o600)


# ----------------------------------------------------------------------------------------- kubernetes


@pytest.mark.parametrize("party", PARTIES)
def test_kubernetes_takes_each_partys_file(party: str) -> None:
    found = documents(DEPLOY / "kubernetes" / f"{party}.yaml")
    for part in found:
        kubernetes_validate.validate(part, "1.37", strict=True)
        where = part["metadata"]["name" if part["kind"] == "Namespace" else "namespace"]
        assert where == f"mpcache-{party}"
    assert {part["kind"] for part in found} >= {"Namespace", "Job", "Deployment", "Service", "NetworkPolicy"}
    (deployment,) = [part for part in found if part["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["args"])
    assert f"--rank={int(Rank[party.upper()])}" in container["args"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"startupProbe", "readinessProbe", "livenessProbe", "resources"} <= set(container)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_kustomize_puts_all_three_together() -> None:
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not here")
    command: list[str | Path] = [kubectl, "kustomize", DEPLOY / "kubernetes"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    names = {p["metadata"]["name"] for p in yaml.safe_load_all(run.stdout) if p["kind"] == "Deployment"}
    assert names == set(PARTIES)


# ------------------------------------------------------------------------------------------- systemd


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_each_unit(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    (line,) = re.findall(r"^ExecStart=((?:.*\\\n)*.*)$", text, re.M)
    check_command(shlex.split(line.replace("\\\n", " "))[1:])
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not here")
    copy = tmp_path / unit.name
    copy.write_text(text.replace("/opt/mpcache/bin/mpcache-party", str(BIN / "mpcache-party")))
    run = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, check=False)
    told = [line for line in run.stderr.splitlines() if unit.name in line]
    assert (run.returncode, told) == (0, [])


# ---------------------------------------------------------------------------------------- monitoring


def exported() -> set[str]:
    """The names under which Prometheus stores what a party shows."""
    names = set(OF_PROCESS)
    for family in PartyMetrics(PartyStatus(Rank.SERVER)).collect():
        names |= {family.name + ending for ending in {"counter": ("_total",),
                  "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))}  # fmt: skip
    return names


def check_query(query: str, recorded: set[str]) -> None:
    """It parses, and asks for what a party shows."""
    promql_parser.parse(query.replace("$__rate_interval", "5m").replace("$party", "x"))
    asked = set(re.findall(r"\b(?:mpcache[_:]|process_)[a-z0-9_:]+", query))
    assert asked, query
    assert asked <= exported() | recorded, asked - exported()


def test_alerts_ask_for_what_a_party_shows() -> None:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    recorded = {rule["record"] for rule in group["rules"] if "record" in rule}
    for rule in group["rules"]:
        check_query(rule["expr"], recorded)
        if "alert" in rule:
            assert {"summary", "description"} == set(rule["annotations"])
    assert len(group["rules"]) > 5


def test_the_board_asks_for_what_a_party_shows() -> None:
    board = json.loads((DEPLOY / "grafana" / "board.json").read_text())
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) == len(titles) > 8
    for panel in board["panels"]:
        for target in panel["targets"]:
            check_query(target["expr"], set())
