"""`mpcache audit --measure`: real parties beside the model, also when it is interrupted."""

from __future__ import annotations

import csv
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpcache.audit.measure import Measured, calibrated, errors, plan, put_beside, text_of
from mpcache.audit.priced_rows import AuditGrid, price_rows
from mpcache.console.inputs import read_text
from mpcache.cost.rates import RATES
from mpcache.demo import DEMO_DOCUMENT
from mpcache.errors import MpcacheError
from mpcache.model import demo_model_dir, load_shape, load_tokenizer
from mpcache.transport.network import NO_NETWORK, PROFILES
from mpcache_parties.launch import PartyFailed
from tests.support.audit_command import app, failure
from tests.support.processes import CLI, SOON_S, children_of, gone_soon, start, started, tiny_model

NETWORK = "4:100"
SMALL = ["--context", 40, "--question", 4, "--new-tokens", 3, "--network", NETWORK, "--measure", "--json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.processes
@pytest.mark.slow
def test_ledgers_equal_the_model_and_stand_beside_it(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    flags = [*SMALL, "--shape", model, "--policy", "mpcache", "--report", report]
    done = CliRunner().invoke(app, list(map(str, flags)))
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["runs"] == {"planned": 3, "measured": 3}
    (row,) = found["rows"]
    for name in ("rounds", "online_bytes", "offline_bytes"):
        assert row[f"measured_{name}_per_token"] == row[f"{name}_per_token"] > 0
    assert row["measured_ms_per_token"] >= 2 * row["rounds_per_token"]  # no faster than the network
    assert row["measured_first_token_ms"] > row["measured_ms_per_token"]
    modelled = max(row["modelled_ms_per_token"], row["offline_transfer_ms"])
    assert row["difference"] == pytest.approx(row["measured_ms_per_token"] / modelled - 1, abs=1e-3)
    assert found["model_error"][NETWORK]["runs"] == 1
    assert {"mpcache", "full"} == {rate["policy"] for rate in found["calibration"]}
    assert "measured_ms_per_token" in report.read_text()


@pytest.mark.processes
@pytest.mark.slow
def test_an_interrupted_measurement_keeps_what_it_has(model: Path, tmp_path: Path) -> None:
    with started() as children:
        table = tmp_path / "rows.csv"
        flags = [*SMALL, "--shape", model, "--policy", "full", "--policy", "snapkv", "--csv", table]
        children.append(start(CLI, "audit", *flags))
        parent = children[0]
        assert parent.stderr is not None
        while "run 4 of 6" not in (line := parent.stderr.readline()):
            assert line, parent.communicate()
        time.sleep(0.5)
        pids = children_of(parent.pid)
        parent.send_signal(signal.SIGTERM)
        out, noise = parent.communicate(timeout=SOON_S)
        assert parent.returncode == 143
        assert gone_soon(pids)
        assert "Traceback" not in noise and noise.count("error: mpcache: stopped by SIGTERM") == 1
    found = json.loads(out)
    assert found["runs"] == {"planned": 6, "measured": 3}
    measured = {row["policy"]: row["measured_ms_per_token"] for row in found["rows"]}
    assert measured["full"] > 0 and measured["snapkv"] is None
    with table.open() as file:
        assert [bool(row["measured_ms_per_token"]) for row in csv.DictReader(file)] == [True, False]


@pytest.mark.processes
def test_a_party_that_fails_first_is_the_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise PartyFailed("server: no")

    monkeypatch.setattr("mpcache_parties.launch.run_parties", failing)
    done = CliRunner().invoke(app, list(map(str, [*SMALL, "--shape", model, "--policy", "full"])))
    assert isinstance(done.exception, MpcacheError) and not done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "gpt2"], "--shape gpt2 has no weights; give demo, or a model with weights"),
        (["--explain", "full"], "leave out --measure"),
        (["--context", "1000", "--new-tokens", "20"], "beyond the model, which takes up to 988 tokens"),
        (["--question", "1020"], "question and answer make 1027 tokens, the model allows 1024"),
    ],
)
def test_mistakes(arguments: list[str], words: str) -> None:
    assert words in failure("--measure", *arguments)


def test_a_config_alone_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((demo_model_dir() / "config.json").read_bytes())
    assert "has no weights" in failure("--measure", "--shape", str(tmp_path), "--context", "64")


def test_texts_of_a_length() -> None:
    tokenizer, source = load_tokenizer(demo_model_dir()), read_text(DEMO_DOCUMENT)
    for n in (1, 2, 16, 77, 512, 1000):
        for bos in (True, False):
            if n > bos:
                assert len(tokenizer.encode(text_of(tokenizer, source, n, bos), bos)) == n


def test_runs_without_a_network_stand_around_the_others() -> None:
    shape = load_shape(demo_model_dir())
    networks = [PROFILES["lan"], NO_NETWORK, PROFILES["wan"]]
    grid = AuditGrid(shape, [64], ["full", "snapkv"], networks, ["fast"], 4, 3)
    keys = [key for key, _ in plan(grid, price_rows(grid))]
    assert [network for *_, network in keys] == ["none", "lan", "none", "wan", "none"] * 2
    assert [spec for spec, *_ in keys] == ["full"] * 5 + ["snapkv"] * 5
    one = Measured([1.0, 2.0, 9.0], 10.0, 1, 1, 1)
    both = one.with_another(replace(one, token_ms=[3.0, 4.0], first_token_ms=20.0))
    assert (both.ms, both.first_token_ms, both.rounds) == (3.0, 15.0, 1)


def test_calibration_makes_the_model_equal_to_the_unshaped_run() -> None:
    shape = load_shape(demo_model_dir())
    networks = [NO_NETWORK, PROFILES["wan"]]
    grid = AuditGrid(shape, [64], ["snapkv", "mpcache"], networks, ["fast"], 4, 3)
    key = ("snapkv", "fast", 64)
    runs = {(*key, "none"): Measured([600.0, 500.0, 700.0], 1000.0, 1, 1, 1)}
    runs[*key, "wan"] = replace(runs[*key, "none"], token_ms=[6000.0])
    found = price_rows(grid, None, calibrated(runs, grid))
    put_beside(found, runs)
    local, wan, *unmeasured = found
    assert local["modelled_ms_per_token"] == pytest.approx(600, abs=0.1) and local["difference"] == 0
    assert wan["modelled_parts_ms"]["compute"] == pytest.approx(600, abs=0.1)
    assert wan["difference"] == pytest.approx(6000 / wan["modelled_ms_per_token"] - 1, abs=1e-3)
    assert all(row["difference"] is None for row in unmeasured)
    assert errors(found) == {"wan": {"runs": 1, **dict.fromkeys(("mean", "largest"), abs(wan["difference"]))}}
    quick = {(*key, "none"): replace(runs[*key, "none"], token_ms=[1.0])}  # a machine that is far faster
    assert calibrated(quick, grid)[key].round_ms == 0
    assert price_rows(grid, None, calibrated(quick, grid))[0]["modelled_ms_per_token"] == pytest.approx(
        1, abs=0.01
    )
    assert calibrated(quick, grid)[key].multiply_adds > RATES.multiply_adds
