"""What can go wrong, said in one line: who, where, what, and what to do.

Every error that a user can meet is an `MpcacheError`. The command line prints its text and exits
with its `exit_code`; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class MpcacheError(Exception):
    """Root of the tree. `str(error)` is the whole line that the user sees."""

    exit_code = 1


class BadInput(MpcacheError):
    """The user's own input is wrong: a flag, a file, a text. Nothing was started."""

    exit_code = 2


class ConfigError(BadInput):
    """A configuration file or value is wrong."""


class ModelError(BadInput):
    """A model folder cannot be used."""


class PolicyError(BadInput):
    """An unknown policy, an unknown option, or an option out of its range."""


class OutOfRange(MpcacheError):
    """A value left the range that a protocol is declared for: what follows from it would be wrong."""


class LinkError(MpcacheError):
    """Something between two parties."""

    exit_code = 3


class PeerLost(LinkError):
    """The peer's process or connection ended."""


class PeerTimeout(LinkError):
    """The peer did not come, or did not answer, within the configured time."""


class PeerFailed(LinkError):
    """The peer ended the session and said why."""


class PortInUse(LinkError):
    """The address to listen on is taken."""


class Mismatch(LinkError):
    """The parties do not agree on a public field; the text names it on both sides."""


class Desync(LinkError):
    """A message is not the one that the program expects now: step, order, dtype, shape or size."""
