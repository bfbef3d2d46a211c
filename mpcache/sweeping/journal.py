"""Write down each finished cell of a grid, so that a sweep that was interrupted does nothing twice.

A file of JSON lines. The first one says what the cells belong to, and is compared when the file is opened
again; each other one is a cell. A line that was cut off by the interruption is dropped, and its cell asked
again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpcache.cluster import release_digest
from mpcache.errors import BadInput

Outcome = dict[str, Any]  # a finished cell, as JSON


class Journal:
    """The finished cells of one sweep by their names; kept in `file`, or in memory alone."""

    def __init__(self, file: Path | None, about: Mapping[str, Any]) -> None:
        """Open the journal of what `about` says, or begin it. Raises BadInput: it is of something else."""
        self.file = file
        self.found: dict[str, Outcome] = {}
        if file is None:
            return
        head = json.loads(json.dumps({"journal": 1, "release": release_digest(), **about}))
        try:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
            if not lines or not lines[0].endswith("\n"):
                file.write_text(json.dumps(head) + "\n", encoding="utf-8")
                return
            self._check(json.loads(lines[0]), head)
            for line in lines[1:]:
                if line.endswith("\n"):
                    cell = json.loads(line)
                    self.found[cell["cell"]] = cell["outcome"]
            if not lines[-1].endswith("\n"):
                file.write_text("".join(lines[:-1]), encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{file}: cannot be used as a journal: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{file}: is no journal of a sweep; give another file") from None

    def _check(self, theirs: Any, mine: Mapping[str, Any]) -> None:
        if not isinstance(theirs, dict) or "journal" not in theirs:
            raise ValueError("no journal")
        other = [key for key in mine if theirs.get(key) != mine[key]]
        if other:
            shown = f"{other[0]} is {theirs.get(other[0])!r:.60} there and {mine[other[0]]!r:.60} here"
            raise BadInput(f"{self.file}: is the journal of another sweep: {shown}; give another file")

    def add(self, name: str, outcome: Outcome) -> None:
        """Note a finished cell, on the disk before this returns. Raises BadInput (a full disk)."""
        self.found[name] = outcome
        if self.file is None:
            return
        try:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"cell": name, "outcome": outcome}) + "\n")
        except OSError as error:
            raise BadInput(f"{self.file}: cannot be written: {error.strerror or error}") from None
