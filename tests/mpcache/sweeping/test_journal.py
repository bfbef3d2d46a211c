"""The journal of a sweep: what is done stays done, of this sweep alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcache.errors import BadInput
from mpcache.sweeping.journal import Journal

ABOUT = {"sweep": "eval", "seed": 0, "tasks": ("a", "b")}


def test_cells_are_there_again(tmp_path: Path) -> None:
    file = tmp_path / "j"
    first = Journal(file, ABOUT)
    first.add("doc/full at 100 %", {"right": [[True]]})
    assert Journal(file, ABOUT).found == first.found == {"doc/full at 100 %": {"right": [[True]]}}


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "j"
    journal = Journal(file, ABOUT)
    journal.add("one", {"x": 1})
    whole = file.read_text()
    journal.add("two", {"x": 2})
    file.write_text(file.read_text()[:-4])
    again = Journal(file, ABOUT)
    assert again.found == {"one": {"x": 1}} and file.read_text() == whole
    again.add("two", {"x": 3})
    assert Journal(file, ABOUT).found["two"] == {"x": 3}


def test_a_first_line_that_was_cut_off_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "j"
    Journal(file, ABOUT)
    file.write_text(file.read_text()[:-2])
    Journal(file, ABOUT).add("one", {})
    assert Journal(file, ABOUT).found == {"one": {}}


def test_a_journal_of_another_sweep_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "j"
    Journal(file, ABOUT)
    with pytest.raises(BadInput, match="journal of another sweep: seed is 0 there and 1 here"):
        Journal(file, ABOUT | {"seed": 1})


def test_one_of_another_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "j"
    Journal(file, ABOUT)
    monkeypatch.setattr("mpcache.sweeping.journal.release_digest", lambda: "another")
    with pytest.raises(BadInput, match="release is"):
        Journal(file, ABOUT)


@pytest.mark.parametrize("text", ["a, b\n1, 2\n", "[1]\n", '{"x": 1}\n', "\0\n"])
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "j"
    file.write_text(text)
    with pytest.raises(BadInput, match="is no journal"):
        Journal(file, ABOUT)
    assert file.read_text() == text


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be used as a journal"):
        Journal(tmp_path, ABOUT)
