"""Check values that come from files and peers, and shorten what an error says about them."""

from __future__ import annotations

import math


def check_whole(name: str, value: object) -> int:
    """Return `value`, a whole number above zero. Raises ValueError, which names it `name`."""
    if type(value) is not int or value <= 0:
        raise ValueError(f"{name} must be a whole number above zero, not {shorten(value)}")
    return value


def check_positive(name: str, value: object) -> float:
    """Return `value`, a finite number above zero, as a float. Raises ValueError, which names it `name`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above zero, not {shorten(value)}")
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
    """Return the value's repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_words(error: BaseException | str) -> str:
    """Return an error's text as one line of at most 300 characters.

    Files that we did not write may shape the text.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
