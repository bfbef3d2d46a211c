"""Hold shapes of well-known models, as their published config.json files have them: enough to price them."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def config_of(name: str) -> Path:
    """Return the path of the config.json of one of NAMES."""
    return _FOLDER / f"{name}.json"
