"""What server and dealer keep of set-ups: found again, sealed, refused when it is not the right one."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from mpcache.errors import StateError
from mpcache.runtime.ring import wide
from mpcache.runtime.standing import Dealt, OperandPlace, OwnersMasks, dealt_of, digest_of, sent_of
from mpcache_parties.state.setups import KEPT_AT_DEALER, DealerSetups, Held, ServerSetups

PLACES = [OperandPlace("setup/layer0", (5, 3), 48, 16), OperandPlace("setup/layer1", (4,), 64, 16)]
NAMES = [f"{i:032x}" for i in range(20)]
FAMILY, OTHER = "a" * 32, "b" * 32


def held(family: str = FAMILY) -> Held:
    masks = [dealt_of(place, [torch.randint(100, 200, shape, dtype=dtype) for dtype, shape in place.specs])
             for place in PLACES]  # fmt: skip
    return Held(family, PLACES, masks, digest_of(sent(masks)))


def sent(masks: list[Dealt]) -> list[list[torch.Tensor]]:
    return [sent_of(place, mask) for place, mask in zip(PLACES, masks, strict=True)]


def file_of(folder: Path, name: str = NAMES[0]) -> Path:
    return folder / "dealer" / f"{name}.masks"


def test_it_is_found_again_by_its_name(tmp_path: Path) -> None:
    mine = held()
    store = DealerSetups(tmp_path)
    assert store.find(NAMES[0], FAMILY) is None
    store.keep(NAMES[0], mine)
    assert store.find(NAMES[0], FAMILY) is mine
    again = DealerSetups(tmp_path).find(NAMES[0], FAMILY)  # another process
    assert again is not None and (again.digest, again.places) == (mine.digest, mine.places)
    take = again.next_of()
    for place, mask in zip(mine.places, mine.masks, strict=True):
        assert torch.equal(wide(take(place)), wide(mask))
    assert file_of(tmp_path).stat().st_mode & 0o077 == 0


def test_without_a_folder_it_lives_with_the_process() -> None:
    mine, store = held(), DealerSetups()
    store.keep(NAMES[0], mine)
    assert store.find(NAMES[0], FAMILY) is mine
    assert DealerSetups().find(NAMES[0], FAMILY) is None


def test_a_file_shows_nothing_of_what_it_holds(tmp_path: Path) -> None:
    mine = held()
    DealerSetups(tmp_path).keep(NAMES[0], mine)
    content = file_of(tmp_path).read_bytes()
    assert not any(part.numpy().tobytes() in content for parts in sent(mine.masks) for part in parts)
    assert mine.digest.encode() not in content and b"layer0" not in content


@pytest.mark.parametrize("at", [-1, -40, 200])
def test_a_damaged_file_is_refused(tmp_path: Path, at: int) -> None:
    DealerSetups(tmp_path).keep(NAMES[0], held())
    content = bytearray(file_of(tmp_path).read_bytes())
    content[at] ^= 1
    file_of(tmp_path).write_bytes(content)
    with pytest.raises(StateError, match=r"dealer: .*\.masks: .*; remove it, and the server sends it again"):
        DealerSetups(tmp_path).find(NAMES[0], FAMILY)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    DealerSetups(tmp_path).keep(NAMES[0], held())
    file_of(tmp_path).rename(file_of(tmp_path, NAMES[1]))
    with pytest.raises(StateError, match="its identifier is"):
        DealerSetups(tmp_path).find(NAMES[1], FAMILY)


def test_what_another_model_masked_is_refused() -> None:
    take = held().next_of()
    take(PLACES[0])
    with pytest.raises(StateError, match=r"has setup/layer1 4 .* where the session needs setup/layer1 5"):
        take(replace_shape(PLACES[1], (5,)))
    take = held().next_of()
    take(PLACES[0]), take(PLACES[1])
    with pytest.raises(StateError, match="has nothing where the session needs"):
        take(PLACES[1])


def replace_shape(place: OperandPlace, shape: tuple[int, ...]) -> OperandPlace:
    return place._replace(shape=shape)


def test_a_new_master_key_erases_what_the_old_one_masked(tmp_path: Path) -> None:
    store = DealerSetups(tmp_path)
    store.keep(NAMES[0], held())
    store.keep(NAMES[1], held())
    assert store.find(NAMES[2], OTHER) is None
    assert not list((tmp_path / "dealer").glob("*.masks"))
    assert store.find(NAMES[0], FAMILY) is None


def test_the_least_used_one_makes_room(tmp_path: Path) -> None:
    store = DealerSetups(tmp_path)
    for name in NAMES[:KEPT_AT_DEALER]:
        store.keep(name, held())
    assert store.find(NAMES[0], FAMILY) is not None  # used last
    store.keep(NAMES[KEPT_AT_DEALER], held())
    assert len(list((tmp_path / "dealer").glob("*.masks"))) == KEPT_AT_DEALER
    assert store.find(NAMES[1], FAMILY) is None
    assert store.find(NAMES[0], FAMILY) is not None


def test_the_master_key_is_its_owners_alone(tmp_path: Path) -> None:
    ServerSetups(tmp_path)
    key = tmp_path / "server" / "masks.key"
    assert key.stat().st_mode & 0o077 == 0
    key.chmod(0o644)
    with pytest.raises(StateError, match="others may read this key"):
        ServerSetups(tmp_path)


def test_a_tampered_mask_has_another_digest() -> None:
    mine = held()
    assert digest_of(parts := sent(mine.masks)) == mine.digest
    for part in (part for mask in parts for part in mask):
        part.view(-1)[0] ^= 1
        assert digest_of(parts) != mine.digest
        part.view(-1)[0] ^= 1


def test_who_waits_for_what_another_makes_is_told_how_far_it_is() -> None:
    setups, told, begun, go = ServerSetups(), list[tuple[int, int]](), Event(), Event()

    def make(masks: OwnersMasks) -> object:
        begun.set()
        assert go.wait(10)
        return {}

    def hear(done: int, of: int) -> None:
        told.append((done, of))
        go.set()

    first = Thread(target=setups.made, args=("key", make, False, lambda done, of: None))
    first.start()
    assert begun.wait(10)
    setups._progress = (3, 7)
    setups.made("key", make, False, hear)
    first.join()
    assert told[0] == (3, 7) and len(setups._made) == 1
