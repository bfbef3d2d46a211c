"""The folder of a party's sessions: whose they are, and how many stay."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpcache.errors import Desync, InUse, StateError
from mpcache.rank import Rank
from mpcache_parties.state.store import Files, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, Rank.SERVER)


def name(number: int) -> str:
    return f"{number:032x}"


def begin(store: Store, number: int, context: bool = True) -> Files:
    """A session, used later than those of a lower number."""
    files = Files(store, name(number))
    if context:
        files.write(0, files.session, {})
    os.utime(files.folder, (1000 + number, 1000 + number))
    return files


@pytest.mark.parametrize("bad", ["", "../key", "A" * 32, "0" * 31, "0" * 32 + "\n", "0" * 32 + "/x"])
def test_a_name_is_no_path(bad: str, store: Store) -> None:
    with pytest.raises(Desync, match="is not a session's name"):
        Files(store, bad)
    assert [file.name for file in store.folder.iterdir()] == ["key"]


def test_a_session_belongs_to_one_at_a_time(store: Store) -> None:
    """Threads of one process as well as processes."""
    first = begin(store, 1)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InUse, match="another process uses this session"):
            pool.submit(Files, store, name(1)).result()
        first.close()
        pool.submit(Files, store, name(1)).result().close()


def test_old_sessions_make_room(store: Store) -> None:
    """Not those that somebody has open, whatever their age, nor anything else in the folder."""
    for number in (2, 3, 4):
        begin(store, number).close()
    running = [begin(store, 1), begin(store, 5, context=False)]
    (store.folder / "notes").mkdir()
    dead = begin(store, 6, context=False)  # killed while it wrote its context
    (dead.folder / "context.state.partial").write_bytes(b"much")
    dead.close()
    store.forget_old(left=2)
    assert store.sessions() == [name(4), name(3), name(1)]
    assert {f.name for f in store.folder.iterdir()} == {"key", "notes", *map(name, (1, 3, 4, 5))}
    for files in running:
        files.close()
    store.forget_old(left=0)
    assert {f.name for f in store.folder.iterdir()} == {"key", "notes"}


def test_a_step_belongs_to_the_one_that_it_was_written_after(store: Store) -> None:
    """That one stays, whatever its age; one of another run in its place is named."""
    files = begin(store, 1)
    files.write(1, "a" * 32, {"first": 1})
    for step in range(2, 10):
        files.write(step, "a" * 32, {}, after=(1, 0))
    assert files.steps() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert files.bases(9) == [1, 0] and files.bases(1) == [0] and files.bases(0) == []
    assert files.read(9, "a" * 32) == {}
    files.write(1, "b" * 32, {"first": 2})
    with pytest.raises(StateError, match="server: .*000009.state: its after_run is 'aaaa.* is 'bbbb"):
        files.read(9, "a" * 32)
    files.close()


def test_sessions_come_and_go_on_many_threads(store: Store) -> None:
    """Nobody stumbles over what another removes; what is open stays."""

    def live(number: int) -> bool:
        store.forget_old(left=2)
        files = begin(store, number)
        there = files.folder.is_dir() and name(number) in store.sessions()
        files.remove() if number % 3 else files.close()
        return there

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(live, range(100)))
    assert len(store.sessions()) <= 2 + 8
