"""What --model names: a folder, a file, or a model of the hub, whose cache a folder here stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from mpcache.console.signals import Stopped
from mpcache.errors import ModelError
from mpcache.model import demo_model_dir, find_model, load_model, load_shape
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import make, save

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with one model in it, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "models--lab--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "refs" / "v1").write_text(COMMIT)
    folder = place / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def test_a_model_of_the_hub_comes_from_its_cache_without_a_network(cache: Path) -> None:
    save(make("llama-gqa"), cache)
    assert find_model("lab/tiny") == find_model("lab/tiny@v1") == find_model(f"lab/tiny@{COMMIT}") == cache
    assert load_model("lab/tiny").digest == load_model(cache).digest


def test_one_file_of_a_model_of_the_hub(cache: Path) -> None:
    write_gguf(make("llama-gqa"), cache / "tiny.Q8_0.gguf")
    assert find_model("lab/tiny:tiny.Q8_0.gguf") == cache / "tiny.Q8_0.gguf"
    assert load_shape("lab/tiny@v1:tiny.Q8_0.gguf").layers == 3
    with pytest.raises(ModelError, match="lab/tiny:other.gguf: this hub model has no file other.gguf"):
        find_model("lab/tiny:other.gguf")
    with pytest.raises(ModelError, match=r"no config.json; .* name one: lab/tiny:FILE.gguf"):
        find_model("lab/tiny")


def test_what_is_here_goes_before_the_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "tiny").mkdir(parents=True)
    assert find_model("lab/tiny") == Path("lab/tiny")
    assert find_model(demo_model_dir()) == demo_model_dir()


@pytest.mark.parametrize(
    "name", ["nowhere", "./lab/tiny", "/lab/tiny", "a/b/c", "lab/../tiny", "lab/tiny:x.bin", "~/m"]
)
def test_what_cannot_be_a_hub_model_is_never_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*given: Any, **options: Any) -> str:
        raise AssertionError(f"the hub was asked for {given}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    with pytest.raises(
        ModelError, match="no such model folder or file, nor can a hub model have that name; give"
    ):
        find_model(name)


def test_a_name_that_no_file_can_have_is_one_line() -> None:
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(ModelError, match="give a Hugging Face folder, a .gguf file, or OWNER/NAME"):
            find_model(name)


def test_a_missing_model_says_that_it_is_neither_here_nor_at_the_hub(cache: Path) -> None:
    for name in ("lab/other", "lab/tiny@v2"):
        told = f"{name}: no such folder or file here, and HF_HUB_OFFLINE is set"
        with pytest.raises(ModelError, match=told):
            find_model(name)


def _answered(kind: type[Exception]) -> Exception:
    """An error that the library makes of the hub's answer, which it wants to have."""
    made = kind.__new__(kind)
    Exception.__init__(made, "404")
    return made


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (_answered(errors.GatedRepoError), "accepted its terms"),
        (_answered(errors.RepositoryNotFoundError), "the hub has no such model"),
        (_answered(errors.RevisionNotFoundError), "has no such revision"),
        (ConnectionError("refused\nby all"), "the hub did not give it: refused by all"),
        (RuntimeError("odd"), "the hub did not give it: odd"),
    ],
)
def test_each_way_in_which_the_hub_fails_is_one_line(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=says) as told:
        find_model("lab/tiny")
    assert "\n" not in str(told.value)


def test_only_what_is_needed_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make("llama-gqa"), cache)
    wanted: list[list[str]] = []

    def fetch(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo, revision) == ("lab/tiny", None)
        wanted.append(allow_patterns)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load_shape("lab/tiny")
    load_model("lab/tiny")
    assert not any("safetensors" in name and "index" not in name for name in wanted[0])
    assert set(wanted[0]) < set(wanted[1]) and "model*.safetensors" in wanted[1]


def test_a_stop_signal_is_not_the_hubs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any, **options: Any) -> str:
        raise Stopped("mpcache: stopped by SIGINT", 2)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
    with pytest.raises(Stopped):
        find_model("lab/tiny")
