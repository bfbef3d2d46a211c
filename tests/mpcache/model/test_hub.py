"""A model of the hub over HTTP: the hub is a server on this machine, who asks it is the real library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mpcache.errors import ModelError
from mpcache.model import demo_model_dir, find_model, load_model
from tests.support.hub import COMMIT, REPO, Hub, hub_of


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(demo_model_dir()) as found:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found


def fetched(hub: Hub) -> list[str]:
    """What came over the network since this was asked, but for what is said about it."""
    found = [path for path in hub.asked if path.startswith("GET") and "/resolve/" in path]
    hub.asked.clear()
    return [path.rsplit("/", 1)[1] for path in found]


def test_a_model_comes_once_and_is_the_hubs(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(REPO).digest == load_model(demo_model_dir()).digest
    assert set(fetched(hub)) >= {"config.json", "tokenizer.json", "model.safetensors"}
    there = find_model(f"{REPO}@main")
    assert there == find_model(f"{REPO}@{COMMIT}") and not fetched(hub)
    hub.refuse = (500, "")  # a hub that is out of order
    assert find_model(REPO) == there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert find_model(REPO) == there and not hub.asked


def test_a_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_of_a_test"
    with pytest.raises(ModelError, match="the hub has no such model, or not for your HF_TOKEN"):
        find_model(REPO)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert find_model(REPO, weights=False).name == COMMIT
    assert "model.safetensors" not in fetched(hub)


def test_each_answer_that_gives_no_model_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        (401, "RepoNotFound"): "the hub has no such model, or not for your HF_TOKEN; check the name",
        (403, "GatedRepo"): "the hub gives it to those who accepted its terms",
        (404, "RepoNotFound"): "the hub has no such model",
        (404, "RevisionNotFound"): "has no such revision",
        (418, ""): "the hub answers 418, its cache does not hold it; come again later",
    }
    for hub.refuse, words in said.items():
        with pytest.raises(ModelError, match=f"^{REPO}: .*{re.escape(words)}") as error:
            find_model(REPO)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set, and the hub's cache does not hold it"):
        find_model(REPO)


@pytest.mark.slow
@pytest.mark.processes
def test_the_commands_ask_the_hub_of_the_environment(tmp_path: Path) -> None:
    def check(address: str, home: Path, **more: str) -> tuple[int, str]:
        told = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **more}
        done = subprocess.run(
            [sys.executable, "-m", "mpcache", "check", "--model", REPO, "--json"],
            env={**os.environ, **told}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout

    with hub_of(demo_model_dir()) as hub:
        code, said = check(hub.address, tmp_path / "one")
        assert code == 0 and "a Hugging Face folder" in said
    assert check(hub.address, tmp_path / "one")[0] == 0  # nobody listens there any more
    code, said = check(hub.address, tmp_path / "two")
    assert code == 2 and f"{REPO}: no such folder or file here, and the hub cannot be reached" in said
