from __future__ import annotations

import time
from pathlib import Path

import pytest

from mpcache.config import PublicConfig
from mpcache.console import inputs
from mpcache.errors import BadInput, TextError
from mpcache.inquiry import Inquiry
from mpcache.sampling import Sampling


def test_a_file_is_looked_at_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # a sparse terabyte of zeros
    with pytest.raises(TextError, match="is not a text file"):
        inputs.read_text(file)
    monkeypatch.setattr(inputs, "LARGEST_TEXT", 5 << 20)
    file.write_bytes(b"a" * (5 << 20))
    assert len(inputs.read_text(file)) == 5 << 20
    file.write_bytes(b"a" * ((5 << 20) + 1))
    with pytest.raises(TextError, match="is larger than 5 MiB, more than any model reads"):
        inputs.read_text(file)


def test_a_document_that_cannot_fit_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    file.write_text("and the gate of the city was shut " * 1_000_000)
    start = time.process_time()
    with pytest.raises(BadInput, match="the context has more than 1024 tokens, the model allows 1024"):
        Inquiry.read(None, file, None, None, "the gate", None, Sampling(), True, None, PublicConfig())
    assert time.process_time() - start < 2  # as a whole it takes a minute
