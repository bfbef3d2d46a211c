"""Where things are: the checkout, and a small third-party model that stands beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"  # not everywhere: tests that need it skip
