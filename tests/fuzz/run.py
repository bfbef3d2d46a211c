"""Reads many damaged inputs in this process, under a memory limit; says which case it is at.

Usage: python -m tests.fuzz.run CASES SEED FOLDER [TARGET [NUMBER]]

Prints one JSON line per finding, and the number of cases at the end. A crash or a hang leaves
the case's name in FOLDER/case: run it again by TARGET and NUMBER.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from mpcache.errors import MpcacheError
from tests.fuzz.targets import Target, check_line, targets

CASE_S = 10.0  # longest time for one case; the readers' own work takes milliseconds
ROOM = 1 << 30  # bytes of address space that all cases together may take
FINDINGS = 20  # after so many there is no point in going on


class TooSlow(BaseException):
    """A case that takes longer than CASE_S."""


def _late(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def limit_memory() -> None:
    """What is asked for beyond ROOM from now on is refused."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def case(target: Target, name: str, seed: int, number: int) -> bytes:
    return target.make(random.Random(f"{seed} {name} {number}"))


def one(target: Target, data: bytes) -> str | None:
    """What is wrong with how this case is read; None: nothing."""
    signal.setitimer(signal.ITIMER_REAL, CASE_S)
    try:
        target.run(data)
    except MpcacheError as error:
        try:
            check_line(error)
        except AssertionError as wrong:
            return str(wrong)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a Rust panic is no Exception
        return traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def main() -> int:
    cases, seed, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.fsync = lambda fd: None  # nothing here has to outlive a power cut
    every = targets(folder)
    if len(sys.argv) > 5:
        name, number = sys.argv[4], int(sys.argv[5])
        data = case(every[name], name, seed, number)
        print(repr(data))
        print(one(every[name], data))
        return 0
    if len(sys.argv) > 4:
        every = {sys.argv[4]: every[sys.argv[4]]}
    signal.signal(signal.SIGALRM, _late)
    shares = sum(target.share for target in every.values())
    done = found = 0
    for name, target in every.items():  # else damage to it would be lost on a reader that refuses all
        target.run(target.whole)
        print(f"{name}: read undamaged", file=sys.stderr)
    limit_memory()
    with (folder / "case").open("w") as place:
        for name, target in every.items():
            start, planned = time.monotonic(), -(-cases * target.share // shares)
            for number in range(planned):
                place.seek(0)
                place.write(f"{name} {number}          ")
                place.flush()
                data = case(target, name, seed, number)
                wrong = one(target, data)
                done += 1
                if wrong is not None:
                    found += 1
                    finding = {"target": name, "number": number, "data": repr(data)[:3000], "wrong": wrong}
                    print(json.dumps(finding), flush=True)
                    if found == FINDINGS:
                        return 1
            print(f"{name}: {planned} cases in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps({"cases": done}))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
