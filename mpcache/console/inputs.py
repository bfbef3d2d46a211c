"""The texts a user gives or leaves out, and options that list values."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

from mpcache.demo import DEMO, DEMO_DOCUMENT
from mpcache.errors import BadInput, TextError

LARGEST_TEXT = 64 << 20  # bytes


def demo_question() -> str:
    """Return the question that comes with the demo document."""
    return read_text(DEMO / "question.txt").removesuffix("\n")


def read_question(text: str | None, file: Path | None) -> str:
    """Read the question: given as it is, in a file (`-`: stdin, to its end), or the demo's.

    Everybody on a machine can see a process's flags: what is private comes from a file.
    Raises BadInput on both or on an empty one, TextError on a file that cannot be read.
    """
    if text is not None and file is not None:
        raise BadInput("--question and --question-file: give one of them")
    if file is not None:
        text = _read(file).removesuffix("\n")
    elif text is None:
        text = demo_question()
    else:
        text = _typed("--question", text)
    if not text.strip():
        raise BadInput("the question is empty; give --question TEXT or --question-file FILE")
    return text


def read_context(model: str | None, context: Path | None) -> str | None:
    """Read the document; where none is given, the demo model's, or None beside a model of one's own.

    Raises TextError.
    """
    if context is None and model is not None:
        return None
    return read_text(context or DEMO_DOCUMENT)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file (`-`: stdin, to its end) that is not empty. Raises TextError."""
    text = _read(path)
    if not text.strip():
        raise TextError(f"{path}: is empty; the context needs at least one token")
    return text


def listed(option: str, text: str, known: Collection[str] = ()) -> list[str]:
    """Split the values of an option, with commas between them, each once. Raises BadInput.

    known: the values that are allowed; empty: any.
    """
    items = [item.strip() for item in text.split(",")]
    if not all(items) or len(set(items)) < len(items):
        raise BadInput(f"{option} {text!r}: give values with commas between them, each once")
    for item in items:
        if known and item not in known:
            raise BadInput(f"{option} {item!r} is not known; known, with commas: {', '.join(known)}")
    return items


def check_stdin(*files: Path | None) -> None:
    """Check that stdin is read once at most. Raises BadInput."""
    if sum(str(file) == "-" for file in files) > 1:
        raise BadInput("stdin (-) holds one text; give the other one in a file")


def _read(path: Path) -> str:
    """Read a file once its first bytes and its size say that it may be a text. Raises TextError."""
    try:
        if str(path) == "-":
            return _decode("stdin", sys.stdin.buffer.read(LARGEST_TEXT + 1))
        with path.open("rb") as file:
            data = file.read(4096)
            if b"\0" not in data:  # else it is no text: the rest is not read
                data += file.read(LARGEST_TEXT + 1 - len(data))
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    return _decode(str(path), data)


def _decode(name: str, data: bytes) -> str:
    if len(data) > LARGEST_TEXT:
        raise TextError(f"{name}: is larger than {LARGEST_TEXT >> 20} MiB, more than any model reads")
    if b"\0" in data[:4096]:
        raise TextError(f"{name}: is not a text file in UTF-8")
    try:
        return _same_for_all(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise TextError(f"{name}: is not a text file in UTF-8; save it as one") from None


def _typed(option: str, text: str) -> str:
    """Return what an option was given, whose bytes the locale may have kept from being read as UTF-8."""
    try:
        return _same_for_all(os.fsencode(text).decode("utf-8"))
    except UnicodeError:
        raise TextError(f"{option}: is not a text in UTF-8; type it so, or give a file") from None


def _same_for_all(text: str) -> str:
    """Return a text without what an editor adds of its own: the mark of its encoding, its ends of lines."""
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
