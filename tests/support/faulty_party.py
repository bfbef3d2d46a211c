"""A party as a process that has an accident of its own, at an exact place of the program.

Usage: python -m tests.support.faulty_party FAULT PHASE mpcache-party's flags...
FAULT: kill or stop (SIGKILL, SIGSTOP to itself, at the second thing it asks of the outside in that phase;
in hello at the second peer's introduction, in setup and context as they begin), or slow:SECONDS (that long
before each draw of the phase).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from mpcache.runtime.party import ComputingParty, DealerParty
from mpcache.transport.frames import FrameLink
from mpcache_parties import main as party

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def main() -> None:
    fault, phase = sys.argv[1:3]
    del sys.argv[1:3]
    asked = 0

    def accident(step: str) -> None:
        nonlocal asked
        if not step.startswith(f"{phase}/"):
            return
        asked += 1
        if fault.startswith("slow:"):
            time.sleep(float(fault.removeprefix("slow:")))
        elif asked == 2:
            os.kill(os.getpid(), SIGNALS[fault])

    def before(method: Any) -> Any:
        def call(self: Any, what: Any, step: str) -> Any:
            accident(step)
            return method(self, what, step)

        return call

    def begins(method: Any) -> Any:
        def call(self: Any, started: str) -> None:
            method(self, started)
            if started == phase and phase in ("setup", "context"):
                os.kill(os.getpid(), SIGNALS[fault])

        return call

    recv_hello = FrameLink.recv_hello

    def introduced(self: FrameLink) -> Any:
        accident("hello/")
        return recv_hello(self)

    FrameLink.recv_hello = introduced  # type: ignore[method-assign]
    for kind in (ComputingParty, DealerParty):
        kind.begin = begins(kind.begin)  # type: ignore[method-assign]
    ComputingParty.open = before(ComputingParty.open)  # type: ignore[method-assign]
    DealerParty.draw = before(DealerParty.draw)  # type: ignore[method-assign]
    party.main()


if __name__ == "__main__":
    main()
