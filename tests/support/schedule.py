"""Which worker of pytest-xdist runs which test."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.support.paths import ROOT

MARK = "pytest.mark.processes"
STARTING = {
    file.relative_to(ROOT).as_posix() for file in ROOT.glob("tests/**/test_*.py") if MARK in file.read_text()
}


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Keep a file in one worker, where its fixtures are made once, and all that start parties in the same.

    Three parties and one other test share two cores, then, and not six parties. The marks themselves are
    out of reach here: a scheduler is given ids alone, and `--dist loadgroup` of pytest-xdist 3.8, which
    writes a group's name into the id, writes it where pytest 9.2 does not look any more.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "processes" if file in STARTING else file
