"""Begin a process before anything heavy is imported: streams that can be used, and signals that end it."""

from __future__ import annotations

import os
import sys

from mpcache.console.signals import stop_at_once
from mpcache.console.streams import open_streams, own_stdout


def begin(who: str) -> None:
    """Make this process ready for the imports of a command."""
    stop_at_once(who)
    open_streams()
    if not os.isatty(1):  # a program may read it
        sys.stdout = own_stdout(sys.stdout.encoding, sys.stdout.errors or "backslashreplace")
