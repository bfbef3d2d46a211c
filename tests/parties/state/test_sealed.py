"""Sealed files: whole, secret, their owner's; and the tree of a session in them."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.cache import Cache, LayerCache
from mpcache.errors import InUse, StateError
from mpcache.protocols.selection import PreparedSelection
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.shares import MaskedOperand, Share
from mpcache.runtime.side import Side
from mpcache_parties.state import sealed, snapshot
from mpcache_parties.state.store import Files, Store

KEY = bytes(range(32))
HEADER = {"kind": "test", "step": 3}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(sealed, "CHUNK_BYTES", 64)
    yield 64


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_what_is_written_is_read(tmp_path: Path, size: int, small_chunks: int) -> None:
    content, file = os.urandom(size), tmp_path / "x"
    pieces = [content[i : i + 50] for i in range(0, size, 50)]
    assert sealed.seal(file, KEY, HEADER, pieces) == file.stat().st_size
    assert sealed.unseal(file, KEY, HEADER) == content
    assert sealed.read_header(file)["step"] == 3
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["x"]


def test_nothing_but_the_whole_file_opens(tmp_path: Path, small_chunks: int) -> None:
    """Every single bit, every shorter length, two chunks swapped, one left out, another header or key."""
    file = tmp_path / "x"
    sealed.seal(file, KEY, HEADER, [b"secret " * 40])
    good = file.read_bytes()
    front, chunk = len(good) - 280 - 5 * 16, 64 + 16
    assert b"secret" not in good
    swapped = good[:front] + good[front + chunk : front + 2 * chunk] + good[front : front + chunk]
    bad = [good[:n] for n in range(len(good))] + [good + b"\0", good[:front] + good[front + chunk :]]
    bad += [swapped + good[front + 2 * chunk :]]
    bad += [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(len(good))]
    for content in bad:
        file.write_bytes(content)
        with pytest.raises(StateError) as caught:
            sealed.unseal(file, KEY, HEADER)
        assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    file.write_bytes(good)
    with pytest.raises(StateError, match="its step is 3, this party's is 4"):
        sealed.unseal(file, KEY, HEADER | {"step": 4})
    with pytest.raises(StateError, match="another key"):
        sealed.unseal(file, KEY[::-1], HEADER)


def test_a_file_of_an_older_release_is_refused(tmp_path: Path) -> None:
    """Whole, and with the right key: its format says that its content may mean something else."""
    file = tmp_path / "x"
    sealed.seal(file, KEY, HEADER, [b"secret"])
    content = bytearray(file.read_bytes())
    content[len(b"mpcache")] = sealed.VERSION - 1
    file.write_bytes(content)
    words = "x: is of format 3, which another release of mpcache wrote; this release reads format 4$"
    with pytest.raises(StateError, match=words):
        sealed.unseal(file, KEY, HEADER)
    with pytest.raises(StateError, match=words):
        sealed.read_header(file)


def test_the_same_content_never_looks_the_same(tmp_path: Path) -> None:
    """A key and nonces of its own for each file."""
    for name in "ab":
        sealed.seal(tmp_path / name, KEY, HEADER, [bytes(1000)])
    one, two = ((tmp_path / name).read_bytes()[-1000:] for name in "ab")
    assert sum(x == y for x, y in zip(one, two, strict=True)) < 30


def test_a_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "key"
    key = sealed.load_key(file)
    assert len(key) == 32 and sealed.load_key(file) == key and file.stat().st_mode & 0o777 == 0o600
    assert sealed.load_key(tmp_path / "other") != key
    file.chmod(0o644)
    with pytest.raises(StateError, match="others may read this key; run `chmod 600"):
        sealed.load_key(file)
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(StateError, match="not a key of 32 bytes"):
        sealed.load_key(file)
    with pytest.raises(StateError, match="no key can be written here: No such file"):
        sealed.load_key(tmp_path / "no" / "key")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_lacks_a_nicety_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It syncs and locks no folder: a file in it is locked, and keeps others out just as well."""
    sync, flock = os.fsync, fcntl.flock

    def of_files(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(descriptor: int, *how: int) -> Any:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            return call(descriptor, *how)

        return called

    monkeypatch.setattr(os, "fsync", of_files(sync))
    monkeypatch.setattr(fcntl, "flock", of_files(flock))
    store = Store(tmp_path, Rank.SERVER)
    files = Files(store, "0" * 32)
    files.write(0, "run", {})
    with pytest.raises(InUse):
        Files(store, "0" * 32)
    assert files.steps() == [0]
    files.remove()
    assert not files.folder.exists()


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StateError, match="no key can be written here: Input/output error"):
        Store(tmp_path, Rank.SERVER)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """By the process's own limit on a file's size: EFBIG where a full disk says ENOSPC."""
    code = """
import resource, signal, sys
from pathlib import Path
from mpcache_parties.state import sealed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    sealed.seal(Path(sys.argv[1]), bytes(32), {}, [bytes(100_000)])
except sealed.StateError as error:
    print(error)
"""
    file = tmp_path / "x"
    sealed.seal(file, bytes(32), {}, [b"old"])
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert (
        done.stdout == f"{file}: cannot be written: File too large; free some space, or give another folder\n"
    )
    assert sealed.unseal(file, bytes(32), {}) == b"old" and os.listdir(tmp_path) == ["x"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000


# ------------------------------------------------------------------------------------------- trees


def grown(more: int) -> Cache:
    """A layer of three tokens and `more`, the same ones each time."""
    torch.manual_seed(0)
    rows = torch.randint(-9, 9, (2, 8, 4))[:, : 3 + more]
    k: Any = MaskedOperand(rows, rows + 1, 16, ring=48)
    shape: Any = MetaTensor((2, 3 + more, 4))
    v: Any = MaskedOperand(shape, torch.zeros(2, 3 + more, 4, dtype=torch.int64), 16, dealt=rows * 2)
    return Cache(
        [LayerCache(k, v, {"share": Share(rows.sum(1), 16, Rank.SERVER), "n": (1, 2.5, None, True)})], 9
    )


def same(a: object, b: object) -> bool:
    one, two = (b"".join(map(bytes, snapshot.serialize(x))) for x in (a, b))
    return one == two


def test_a_tree_comes_back(tmp_path: Path) -> None:
    tree = {"cache": grown(2), "ids": [1, 2], "flag": True, "text": "\u00e9", "none": None}
    data = bytearray(b"".join(map(bytes, snapshot.serialize(tree))))
    back = snapshot.deserialize(data)
    assert same(tree, back)
    assert isinstance(back["cache"].layers[0].v.mask, MetaTensor) and back["cache"].layers[0].v.ring == 64
    assert back["cache"].layers[0].memory["share"].owner is Rank.SERVER


def test_what_is_read_back_notes_where_the_session_does(tmp_path: Path) -> None:
    """A kept selection judges ranges, too: its notes count in the verdict of who took it up."""
    hot = Share(torch.eye(2, dtype=torch.int64), 0)
    operand = MaskedOperand(hot.data, hot.data, 0)
    tree = {"kept": [PreparedSelection(Side(Rank.SERVER), hot, operand)]}
    again = snapshot.deserialize(bytearray(b"".join(snapshot.serialize(tree))))
    mine = Side(Rank.SERVER)
    snapshot.join_guard(again, mine.guard)
    empty = Side(Rank.SERVER).guard.close()
    for selection in (again["kept"][0], snapshot.copied(again)["kept"][0]):
        selection.side.watch(hot.data)
        assert not torch.equal(mine.guard.close(), empty)


def test_only_what_is_new_is_written() -> None:
    early, late = grown(0), grown(5)
    since = snapshot.tensors_of(early)
    data = bytearray(b"".join(map(bytes, snapshot.serialize(late, since))))
    assert len(data) < len(b"".join(map(bytes, snapshot.serialize(late))))
    assert same(snapshot.deserialize(data, since), late)
    with pytest.raises(StateError):
        snapshot.deserialize(data)  # not without what came before
    ones: Any = MaskedOperand(torch.ones(2, 3, 4), torch.ones(2, 3, 4), 16)
    nothing: Any = None
    other = snapshot.tensors_of(Cache([LayerCache(ones, nothing)], 9))
    whole = bytearray(b"".join(map(bytes, snapshot.serialize(late, other))))
    assert same(snapshot.deserialize(whole, other), late)


def test_only_known_classes_are_made() -> None:
    class Other:
        pass

    with pytest.raises(TypeError, match="Other at /x/0 is not part of a checkpoint"):
        list(snapshot.serialize({"x": [Other()]}))
    for node in (
        '{"class":"Path","fields":{}}',
        '{"class":"Share","fields":{"no":1}}',
        '{"pickle":[1]}',
        "{",
        "3",
    ):
        text = node.encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + bytes(-len(text) % 8) + b"!" * 8)
        with pytest.raises(StateError, match="not what this release writes"):
            snapshot.deserialize(data)
