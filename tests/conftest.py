"""What tests of several folders start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpcache.model import Model, load_model
from tests.support.processes import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, as a Hugging Face folder."""
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """The same, loaded."""
    return load_model(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors in tests are tiny: one thread is faster than two that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
