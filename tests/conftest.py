"""What tests of several folders start from."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.cli import main
from mpcache.console.signals import STOPS
from mpcache.model import Model, load_model
from tests.support import processes
from tests.support.processes import Run, tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", help="run files and their tests in another order")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from tests.support.schedule import FileScheduling

    return FileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if seed := config.getoption("--shuffle"):
        files = sorted({item.path for item in items})
        place = {file: random.Random(f"{seed} {file}").random() for file in files}
        random.Random(seed).shuffle(items)
        items.sort(key=lambda item: place[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    processes.allowed = item.get_closest_marker("processes") is not None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same numbers in each test, whatever ran before it: torch's generator is global."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Leave no stop signal ignored: a program that ends in this process ignores them, and what later tests
    start would inherit that and never stop."""
    before = {each: signal.getsignal(each) for each in STOPS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process (only the parties are others): exit code, stdout, stderr."""
    monkeypatch.setattr("mpcache.cli.stop_on_signals", lambda who: None)
    monkeypatch.setattr("mpcache.cli.ignore_signals", lambda: None)

    def run(*flags: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(flag) for flag in flags])
        out, noise = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, noise

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, as a Hugging Face folder."""
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """The same, loaded."""
    return load_model(folder)
