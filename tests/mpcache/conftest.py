"""`mpcache` as a user types it, in this process."""

from __future__ import annotations

import pytest

from mpcache.cli import main
from tests.support.processes import Run


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process (only the parties are others): exit code, stdout, stderr."""
    monkeypatch.setattr("mpcache.cli.stop_on_signals", lambda who: None)
    monkeypatch.setattr("mpcache.cli.ignore_signals", lambda: None)

    def run(*flags: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(flag) for flag in flags])
        out, noise = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, noise

    return run
