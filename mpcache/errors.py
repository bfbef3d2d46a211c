"""Say what went wrong in one line: who, where, what, and what to do.

    MpcacheError
     |
     +-- BadInput               2  the user's own input is wrong, nothing was started
     |    +-- ConfigError          a configuration file or value
     |    +-- ModelError           a model folder, or a text with its tokenizer       (private)
     |    +-- TextError            a document or a question                           (private)
     |    +-- PolicyError          a policy, or an option of it
     |
     +-- LinkError              3  something between two parties
     |    +-- PeerLost             the peer's process or connection ended
     |    +-- PeerTimeout          the peer did not come, or did not answer, in time
     |    +-- PeerFailed           the peer ended the session and said why
     |    +-- PortInUse            the address to listen on is taken
     |    +-- Mismatch             the parties do not agree on a public field
     |    +-- Desync               a message is not the one that is expected now
     |
     +-- StateError             1  a file of a party's own state                      (private)
     |    +-- InUse                somebody else has it open                          (private)
     |
     +-- SystemRefusal          1  the operating system refused a file, a folder or a resource (private)
     +-- Reuse                  1  randomness that was used already
     +-- OutOfRange             1  a value left a protocol's range                    (private)
     +-- Stopped           128 + n  signal n ended this process (`mpcache.console.signals`)
     +-- PartyFailed               a party's process ended; its own exit code (`mpcache_parties.launch`)

The numbers are exit codes; a branch has its root's. Every error that a user can meet is an `MpcacheError`.
The command line prints its text and exits with its `exit_code`, of an OSError as a SystemRefusal; anything
else that escapes is a bug and keeps its traceback. Peers read of a private error its name alone.
"""

from __future__ import annotations

import errno

LONGEST = 2000  # characters


def one_line(text: str) -> str:
    """Return a text as one printable line of at most LONGEST characters.

    Much of an error's text comes from files and peers: it must not steer a terminal, nor fill it.
    """
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words[: LONGEST + 1])
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."


class MpcacheError(Exception):
    """The root of the tree. `str(error)` is the whole line that the user sees."""

    exit_code = 1
    private = False  # the text may hold what peers must not learn: a path, a word of a text, a weight

    def __init__(self, text: str, private: bool | None = None) -> None:
        super().__init__(one_line(text))
        if private is not None:
            self.private = private

    @property
    def for_peers(self) -> str:
        """What the other parties get to read of it."""
        if not self.private:
            return str(self)
        return f"its own input cannot be used ({type(self).__name__}); it says there what is wrong"


class BadInput(MpcacheError):
    """The user's own input is wrong: a flag, a file, a text. Nothing was started."""

    exit_code = 2


class ConfigError(BadInput):
    """A configuration file or value is wrong."""


class ModelError(BadInput):
    """A model folder cannot be used, or a text with its tokenizer."""

    private = True


class TextError(BadInput):
    """A document or a question cannot be read."""

    private = True


class PolicyError(BadInput):
    """An unknown policy, an unknown option, or an option out of its range."""


class SystemRefusal(MpcacheError):
    """The operating system refused something ordinary: a file, a folder, memory, a process."""

    private = True

    @classmethod
    def of(cls, error: OSError, what: str | None = None) -> SystemRefusal:
        """Say what an OSError says, and what to do. what: that it is about, where the error does not know."""
        where = what or error.filename
        why = error.strerror or type(error).__name__
        advice = _ADVICE.get(error.errno or 0, "")
        return cls(f"{f'{where}: ' if where else ''}{why}{advice and f'; {advice}'}")


def told_as(error: MpcacheError | OSError) -> MpcacheError:
    """Return the error that a user is told of."""
    return SystemRefusal.of(error) if isinstance(error, OSError) else error


_ADVICE = {
    errno.ENOSPC: "free some space, or give another folder",
    errno.EDQUOT: "free some space, or give another folder",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or give another folder",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a file or folder that this user may use",
    errno.EPERM: "give a file or folder that this user may use",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
    errno.ENOMEM: "free some memory",
    errno.EAGAIN: "raise the limit on processes (ulimit -u)",
}


class Reuse(MpcacheError):
    """Randomness that was used already would hide a second secret."""


class OutOfRange(MpcacheError):
    """A value left the range that a protocol is declared for: what follows from it would be wrong."""

    private = True


class StateError(MpcacheError):
    """A file of a party's own state (checkpoint, tape, key) cannot be written, read or used."""

    private = True


class InUse(StateError):
    """Another process, or another session of this one, has it open."""


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
