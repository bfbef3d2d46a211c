"""Where a farm's files lie: a folder or a URL gives back what was put there; what is no place is one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mpcache.errors import BadInput, MpcacheError, StateError
from mpcache.rank import Rank
from mpcache_parties.handshake import KeepMode
from mpcache_parties.party_options import PartyOptions
from mpcache_parties.state import sealed
from mpcache_parties.state.spool import FolderSpool, Spool, UrlSpool

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: the extra `scale`")

KEY, HEADER, TREE = bytes(range(32)), {"kind": "dealt"}, {"messages": [{"step": "a", "n": 1}]}


class DriverError(Exception):
    """What a driver may raise: no OSError."""


class Faulty(fsspec.AbstractFileSystem):  # type: ignore[misc, name-defined]
    """Refuses to write as `why` says."""

    protocol, why, cachable = "faulty", "", False
    raised = {
        "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "forbidden": PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        "offline": DriverError("no credentials found\nmore of it"),
        "mute": DriverError(),
        "unmade": FileNotFoundError("The specified bucket does not exist"),
    }

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        raise self.raised[self._strip_protocol(path).partition("/")[0]]


@pytest.fixture(autouse=True, scope="module")
def drivers() -> None:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    fsspec.register_implementation(
        "absent", "no_such_package.Files", errtxt="Install absentfs to access Absent", clobber=True
    )


@pytest.mark.parametrize("url", [False, True])
def test_a_place_gives_back_what_was_put_there_once(url: bool, tmp_path: Path) -> None:
    spool = Spool.at(tmp_path.as_uri() if url else str(tmp_path))
    assert isinstance(spool, UrlSpool if url else FolderSpool) and not list(tmp_path.iterdir())
    for name in ("a-1", "a-2", "b-1"):
        spool.put_tree(name, KEY, HEADER, TREE)
    assert b"step" not in (tmp_path / "a-1").read_bytes()
    assert spool.take_tree("a-1", KEY, HEADER) == TREE
    with pytest.raises(StateError, match="a-1: cannot be read|cannot be read: "):
        spool.take_tree("a-1", KEY, HEADER)
    with pytest.raises(StateError, match="sealed with another key"):
        spool.take_tree("a-2", bytes(32), HEADER)
    with pytest.raises(StateError, match="its kind is 'dealt', this party's is 'other'"):
        spool.take_tree("a-2", KEY, {"kind": "other"})
    spool.clear("a-")
    assert [file.name for file in tmp_path.iterdir()] == ["b-1"]
    spool.close()
    assert tmp_path.exists()


def test_a_file_that_is_cut_is_not_taken(tmp_path: Path) -> None:
    spool = Spool.at(tmp_path.as_uri())
    spool.put("a", sealed.sealed_pieces(KEY, HEADER, [bytes(1000)]))
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-1])
    with pytest.raises(StateError, match="is damaged"):
        spool.take("a", KEY, HEADER)


def test_a_folder_of_its_own_goes_with_the_spool() -> None:
    spool = Spool.at(None)
    assert isinstance(spool, FolderSpool) and spool.folder.is_dir()
    spool.put_tree("a", KEY, HEADER, TREE)
    spool.close()
    assert not spool.folder.exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nope://a/b", r"nope://a/b: cannot be used: Protocol not known: nope"),
        ("absent://a/b", r"absent://a/b: cannot be used: Install absentfs to access Absent"),
        ("memory://a", r"--offline-store memory://a: no worker sees the memory of this process"),
        ("file:///no/such/folder", r"file:///no/such/folder: cannot be written: No such file or directory"),
        ("faulty://full/a", r"cannot be written: No space left on device; free some space"),
        ("faulty://forbidden/a", r"cannot be written: Permission denied"),
        ("faulty://offline/a", r"faulty://offline/a: cannot be written: no credentials found"),
        ("faulty://mute/a", r"cannot be written: DriverError"),
        ("faulty://unmade/a", r"cannot be written: The specified bucket does not exist"),
        ("nope://me:secret@host/a", r"nope://host/a: cannot be used"),
    ],
)
def test_what_is_no_place_is_one_line(url: str, said: str) -> None:
    with pytest.raises(MpcacheError, match=said) as error:
        Spool.at(url)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert "://" not in error.value.for_peers


def test_without_fsspec_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(BadInput, match=r"pip install 'mpcache\[scale\]'"):
        Spool.at("s3://bucket/prefix")


@pytest.mark.parametrize("rank", [Rank.SERVER, Rank.CLIENT])
def test_tapes_in_store_take_no_url(rank: Rank) -> None:
    """A claim has to be on the disk before a tape is read, and one process's alone."""
    options = PartyOptions(me=rank, offline_store="s3://bucket/tapes")
    with pytest.raises(BadInput, match="keeps its tapes in a folder"):
        options.tapes(KeepMode.NONE)
