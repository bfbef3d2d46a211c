"""Write a party's log: one JSON object per line, with public values only.

A line says when, who, how bad, what happened, and its numbers; nothing that a party holds in private
is ever handed to it: not the question, not the answer, not the document, not a weight, and no share.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import IO

from mpcache.errors import BadInput


class LogLevel(StrEnum):
    """How much a line matters, the least first."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LEVELS = tuple(LogLevel)

Scalar = str | int | float | bool | None


class Log:
    """Appends to a file (`-`: stderr; None: nowhere). Harmless to call from several threads."""

    def __init__(self, who: str, file: Path | None = None, level: str = LogLevel.INFO) -> None:
        """Open the file. Raises BadInput for a file that cannot be written or an unknown level."""
        if level not in LEVELS:
            raise BadInput(f"--log-level is {level!r}; give one of {', '.join(LEVELS)}")
        self._who, self._least, self._lock = who, LEVELS.index(LogLevel(level)), Lock()
        self._file: IO[str] | None = None
        if str(file) == "-":
            self._file = sys.stderr
        elif file is not None:
            try:
                self._file = file.open("a", encoding="utf-8")
            except OSError as error:
                raise BadInput(f"--log {file}: cannot be written: {error.strerror}") from None

    def __call__(
        self,
        event: str,
        level: LogLevel = LogLevel.INFO,
        values: Mapping[str, Scalar] | None = None,
        **more: Scalar,
    ) -> None:
        """Append one line. values, more: names and numbers that belong to it."""
        if self._file is None or LEVELS.index(level) < self._least:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "who": self._who, "event": event, **(values or {}), **more}
        with self._lock, suppress(OSError, ValueError):  # a full disk must not end a session
            print(json.dumps(line), file=self._file, flush=True)
