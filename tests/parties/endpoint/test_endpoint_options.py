"""Where the endpoint listens, whom it takes, and how its process ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

from mpcache.errors import BadInput, PortInUse
from mpcache_parties.endpoint.endpoint_options import KEY_VARIABLE, EndpointOptions
from mpcache_parties.endpoint.http_server import listen
from tests.support.paths import ROOT
from tests.support.processes import Run

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def key_file(folder: Path, text: str = KEY, mode: int = 0o600) -> Path:
    file = folder / "key"
    file.write_text(text + "\n")
    file.chmod(mode)
    return file


def test_a_port_alone_is_this_machines() -> None:
    place = EndpointOptions("8000").check()
    assert (place.host, place.port, place.is_loopback) == ("127.0.0.1", 8000, True)


def test_others_may_call_with_a_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--api-key"):
        EndpointOptions("0.0.0.0:8000").check()
    file = key_file(tmp_path)
    assert EndpointOptions("0.0.0.0:8000", api_key=file).check().host == "0.0.0.0"
    assert EndpointOptions(api_key=file).read_key() == KEY
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert EndpointOptions("0.0.0.0:8000").check().port == 8000


@pytest.mark.parametrize(
    "text, mode, why",
    [(KEY, 0o644, "chmod 600"), ("short", 0o600, "16 or more"), ("with blanks in it ", 0o600, "no blanks"),
     ("schlüssel" * 3, 0o600, "ASCII")],
)  # fmt: skip
def test_a_key_that_others_know_or_guess_is_refused(tmp_path: Path, text: str, mode: int, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        EndpointOptions(api_key=key_file(tmp_path, text, mode)).check()


def test_flags_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        EndpointOptions(api_key=tmp_path / "none").check()
    with pytest.raises(BadInput, match="--api is"):
        EndpointOptions("nowhere").check()
    with pytest.raises(BadInput, match="--allow-origin"):
        EndpointOptions(origins=("friend.example",)).check()


def test_a_port_in_use_is_one_line_before_any_party_starts(run_here: Run) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match="cannot listen there"):
            listen("127.0.0.1", port)
        code, _, said = run_here("serve", "--port", port)
    assert code == PortInUse.exit_code and said.count("\n") == 1 and "cannot listen there" in said
    EndpointOptions(str(port)).check_free()


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_seconds_with_an_answer_running(number: signal.Signals) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.serve_scripted", str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        at = f"http://127.0.0.1:{port}"
        assert process.stdout.readline() == f"endpoint: {at}/ is its page, {at}/v1 speaks OpenAI's API\n"
        caller = HTTPConnection("127.0.0.1", port, timeout=10)
        body = {"model": "demo", "messages": [{"role": "user", "content": "many " * 900}], "stream": True}
        caller.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = caller.getresponse()
        answer.readline()
        begun = time.monotonic()
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
        assert answer.read().endswith(b"[DONE]\n\n")  # stopped, not torn
        caller.close()
    assert time.monotonic() - begun < 6
    assert told == f"error: endpoint: stopped by {number.name}\n" and process.returncode == 128 + number
