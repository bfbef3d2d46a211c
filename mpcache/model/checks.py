"""Check values that come from files and peers, and shorten what an error says about them."""

from __future__ import annotations

from pathlib import Path

LARGEST_FILE = 64 << 20  # bytes of a config, an index or a tokenizer
_KINDS = {b"GGUF": "a GGUF file", b"PK\3\4": "a zip file", b"\x80": "a pickle", b"\x1f\x8b": "a gzip file"}


def read_small_file(file: Path) -> bytes:
    """Read a text file of a model folder, once its first bytes and its size say that it may be one.

    Raises OSError, or ValueError, which says what the file is instead.
    """
    with file.open("rb") as opened:
        start = opened.read(256)
        for magic, kind in _KINDS.items():
            if start.startswith(magic):
                raise ValueError(f"it is {kind}")
        if b"\0" in start:
            raise ValueError("it is a binary file")
        size = file.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size >> 20} MiB; such a file has at most {LARGEST_FILE >> 20}")
        return start + opened.read()


def check_whole(name: str, value: object) -> int:
    """Return `value`, a whole number above zero. Raises ValueError, which names it `name`."""
    if type(value) is not int or value <= 0:
        raise ValueError(f"{name} must be a whole number above zero, not {shorten(value)}")
    return value


def check_positive(name: str, value: object, below: float = 1e18) -> float:
    """Return `value`, a number above zero, as a float. Raises ValueError, which names it `name`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < below:
        raise ValueError(f"{name} must be a number above zero and below {below:g}, not {shorten(value)}")
    return float(value)


def check_flag(name: str, value: object) -> bool:
    """Return `value`, true or false. Raises ValueError, which names it `name`."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {shorten(value)}")
    return value


def check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ValueError, which names the value `name` and lists `known`, when `value` is not among them."""
    if value not in known:
        raise ValueError(f"{name} {shorten(value)} is not supported; supported: {', '.join(known)}")


def shorten(value: object) -> str:
    """Return the value's repr as one line, cut to 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def first_words(error: BaseException | str) -> str:
    """Return an error's text as one line of at most 300 characters.

    Files that we did not write may shape the text.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
