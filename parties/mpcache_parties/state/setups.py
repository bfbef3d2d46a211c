"""Keep set-ups between sessions: the server what its masks follow from, the dealer the masked tensors.

    DIR/server/masks.key           the server's master key (mode 0600): whoever has it and the weights
                                   has all seeds
    DIR/dealer/key                 the dealer's key for its own files
    DIR/dealer/IDENTIFIER.masks    B of a model's weights, or of a document, sealed

Without a folder all of it lives as long as the process does. A set-up's name is pseudorandom. All set-ups
of one master key belong to a family; when the dealer meets another family it erases the one before, which
serves nobody any more.
"""

from __future__ import annotations

import hmac
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from mpcache.errors import StateError
from mpcache.model.prefill import Prefill
from mpcache.rank import Rank
from mpcache.runtime.rng import derive_key, fresh_seed
from mpcache.runtime.standing import Dealt, OperandPlace, OwnersMasks, dealt_of, digest_of, sent_of
from mpcache_parties.state import sealed, snapshot

SUFFIX = ".masks"
KEPT_AT_DEALER = 8  # set-ups, the least recently used goes first: a model, and some of its documents
KEPT_AT_SERVER = 3  # at least: the weights, and each document that is served
LOOK_EVERY_S = 0.5  # how far another session is that makes what this one needs
NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Made:
    """A set-up at the server. tree: the operands, or the cache, that a session starts with."""

    tree: Any
    masks: OwnersMasks
    identifier: str
    family: str


class ServerSetups:
    """The server's master key, and the set-ups that it has made in this process. Raises StateError.

    fresh_documents: mask each session's document under a key of its own, so that the dealer cannot tell
    whether it has met it before.
    """

    def __init__(self, folder: Path | None = None, fresh_documents: bool = False, documents: int = 0) -> None:
        """Open a folder of set-ups; None: they live as long as the process. documents: that are served."""
        self.fresh_documents = fresh_documents
        self._most = max(KEPT_AT_SERVER, 1 + documents)
        if folder is None:
            self._master = fresh_seed()
        else:
            mine = folder / Rank.SERVER.label
            sealed.make_folder(mine)
            self._master = sealed.load_key(mine / "masks.key")
        self._made: OrderedDict[str, Made] = OrderedDict()
        self._prefilled: tuple[str, Prefill] | None = None  # the last one: a party serves one document
        self._making = RLock()  # two sessions that begin at once need it once
        self._progress = (0, 0)  # of what is being made: bytes done, of how many

    def prefilled(self, key: str, make: Callable[[], Prefill]) -> Prefill:
        """Return the pass over a document, from memory if it was the last one."""
        with self._making:
            if self._prefilled is None or self._prefilled[0] != key:
                self._prefilled = key, make()
            return self._prefilled[1]

    def made(
        self, key: str, make: Callable[[OwnersMasks], Any], fresh: bool, watch: Callable[[int, int], None]
    ) -> Made:
        """Return the set-up of this key, from memory or as `make` makes its tree.

        fresh: not from memory, under a master key of its own.  watch: told bytes done, and of how many, also
        of what another session makes meanwhile.
        """

        def note(done: int, of: int) -> None:
            self._progress = done, of
            watch(done, of)

        with self._free(watch):
            if not fresh and key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            masks, master = OwnersMasks(), fresh_seed() if fresh else self._master
            tree = make(masks)
            inner = snapshot.tensors_of(tree).items()
            if not masks.splits(tensor for path, tensor in inner if path.endswith("/mask")):
                raise RuntimeError("an operand was copied before its mask was made")
            masks.finish(master, note)
            family = _named(self._master, b"family")  # of fresh ones, too: they replace no other
            found = Made(tree, masks, _named(master, b"set-up" + masks.seed), family)
            if not fresh:
                self._made[key] = found
                while len(self._made) > self._most:
                    self._made.popitem(last=False)
            return found

    @contextmanager
    def _free(self, watch: Callable[[int, int], None]) -> Iterator[None]:
        """Wait until nobody else makes anything, and be told meanwhile how far that is."""
        while not self._making.acquire(timeout=LOOK_EVERY_S):
            done, of = self._progress
            if of:
                watch(done, of)
        try:
            yield
        finally:
            self._progress = (0, 0)
            self._making.release()


def _named(master: bytes, what: bytes) -> str:
    """Return a public name that tells nothing of what it names, nor of a seed."""
    return hmac.digest(derive_key(master, "masks/names"), what, "sha256").hex()[:32]


@dataclass(frozen=True)
class Held:
    """B of one set-up at the dealer, in the program's order. digest: of its packed bytes."""

    family: str
    places: list[OperandPlace]
    masks: list[Dealt]
    digest: str

    def next_of(self) -> Callable[[OperandPlace], Dealt]:
        """Return what gives them one after another. It raises StateError where the program wants another."""
        rest = iter(zip(self.places, self.masks, strict=True))

        def take(place: OperandPlace) -> Dealt:
            mine, mask = next(rest, (None, None))
            if mask is None or mine != place:
                there = "nothing" if mine is None else mine.text.strip()
                raise StateError(
                    f"dealer: the set-up that it holds has {there} where the session needs "
                    f"{place.text.strip()}: it is of another model, or release",
                    private=False,
                )
            return mask

        return take


class DealerSetups:
    """The set-ups that the dealer holds, for all sessions of this process. Raises StateError."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self._key = None, b""
        if folder is not None:
            self.folder = folder / Rank.DEALER.label
            sealed.make_folder(self.folder)
            self._key = sealed.load_key(self.folder / "key")
            sealed.clear_partial(self.folder)
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._changing = RLock()

    def find(self, identifier: str, family: str) -> Held | None:
        """Return a set-up if it is there; those of other families are erased. Raises StateError."""
        with self._changing:
            self._erase_others(family)
            if identifier not in self._held:
                file = self._file(identifier)
                if file is None or not file.exists():
                    return None
                self._remember(identifier, self._read(file, identifier, family))
            self._held.move_to_end(identifier)
            with suppress(OSError):
                if (file := self._file(identifier)) is not None:
                    os.utime(file)  # used last
            return self._held[identifier]

    def keep(self, identifier: str, held: Held) -> None:
        """Keep a set-up that the server has sent. Raises StateError (a full disk)."""
        with self._changing:
            self._remember(identifier, held)
            if (file := self._file(identifier)) is None:
                return
            tree = {
                "places": [[p.step, list(p.shape), p.ring, p.bits] for p in held.places],
                "masks": [sent_of(place, mask) for place, mask in zip(held.places, held.masks, strict=True)],
            }
            sealed.seal(file, self._key, _header(identifier, held.family), snapshot.serialize(tree))
            for old in self._files()[KEPT_AT_DEALER:]:
                old.unlink(missing_ok=True)

    def _remember(self, identifier: str, held: Held) -> None:
        self._held[identifier] = held
        while len(self._held) > KEPT_AT_DEALER:
            self._held.popitem(last=False)

    def _read(self, file: Path, identifier: str, family: str) -> Held:
        try:
            tree = snapshot.read_snapshot(file, self._key, _header(identifier, family))
            places = [
                OperandPlace(step, tuple(shape), ring, bits) for step, shape, ring, bits in tree["places"]
            ]
            sent: list[list[torch.Tensor]] = tree["masks"]
            if [[(x.dtype, tuple(x.shape)) for x in mask] for mask in sent] != [p.specs for p in places]:
                raise StateError(f"{file}: its content is not what this release writes")
        except StateError as error:
            raise StateError(f"dealer: {error}; remove it, and the server sends it again") from None
        except (TypeError, ValueError, KeyError):
            raise StateError(f"dealer: {file}: is of another release; remove it") from None
        masks = [dealt_of(place, mask) for place, mask in zip(places, sent, strict=True)]
        return Held(family, places, masks, digest_of(sent))

    def _erase_others(self, family: str) -> None:
        for name in [name for name, held in self._held.items() if held.family != family]:
            del self._held[name]
        for file in self._files():
            with suppress(StateError):  # one that does not open is named when it is asked for
                if sealed.read_header(file).get("family") != family:
                    file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """List what is on disk, what was used last in front."""
        if self.folder is None:
            return []
        found = [file for file in self.folder.glob(f"*{SUFFIX}") if NAME.fullmatch(file.stem)]
        return sorted(found, key=lambda file: file.stat().st_mtime_ns, reverse=True)

    def _file(self, identifier: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{identifier}{SUFFIX}"


def _header(identifier: str, family: str) -> dict[str, Any]:
    return {"kind": "masks", "rank": int(Rank.DEALER), "identifier": identifier, "family": family}


Setups = ServerSetups | DealerSetups | None  # the client keeps none: it gets seeds
