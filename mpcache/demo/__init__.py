"""Hold the demo model, a document with a question, and unseen documents to judge it by."""

from pathlib import Path

DEMO = Path(__file__).parent
DEMO_DOCUMENT = DEMO / "document.txt"
