"""What a party reads before it connects, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcache.errors import BadInput
from mpcache_parties import private_inputs
from mpcache_parties.private_inputs import read_document


def test_a_document_that_cannot_fit_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "long.txt"
    document.write_text("the gate of the city " * 200)
    monkeypatch.setattr(private_inputs, "load_model", lambda folder: pytest.fail("weights were read"))
    with pytest.raises(BadInput, match="tokens, the model allows 128; shorten it"):
        read_document(folder, document)
