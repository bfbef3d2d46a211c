"""The texts a user gives or leaves out."""

from __future__ import annotations

from pathlib import Path

from mpcache.errors import BadInput

_DEMO = Path(__file__).parent / "demo"
DEMO_DOCUMENT = _DEMO / "document.txt"


def demo_question() -> str:
    return read_text(_DEMO / "question.txt").removesuffix("\n")


def read_text(path: Path) -> str:
    """A UTF-8 text file that is not empty. Raises BadInput."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not a text file in UTF-8") from None
    if not text.strip():
        raise BadInput(f"{path}: is empty; the context needs at least one token")
    return text
