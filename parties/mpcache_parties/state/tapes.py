"""Keep tapes that were dealt in advance: on disk, sealed, each used once.

    DIR/server/key                 this party's key (mode 0600), as for checkpoints
    DIR/server/BATCH/*.tape        one file for each phase of one session, and the seed of its streams
    DIR/server/used/BATCH          this batch has been claimed: a file that is never removed

A batch serves one session, because later tapes are made for masks of earlier ones: a conversation's is for
turns of declared lengths. Both parties claim
it, durably, before they read its seed: whatever happens after that, to this process or this machine,
the batch is never taken again, and neither is a copy of its files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mpcache.errors import StateError
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.party import ShapeParty
from mpcache.runtime.program import Request
from mpcache.transport.link import Hello, Link, Spec
from mpcache_parties.state import sealed, snapshot

USED, SUFFIX, UNFINISHED = "used", ".tape", ".unfinished"
SEED = "seed"  # the file that holds it
_BATCH = re.compile(r"[0-9a-f]{32}")

Sizes = Mapping[str, Any]  # all that a tape depends on, public


class TapeStore:
    """One party's batches. Raises StateError if the folder or its key cannot be used."""

    def __init__(self, folder: Path, rank: Rank) -> None:
        self.rank, self.folder = rank, folder / rank.label
        sealed.make_folder(self.folder / USED)
        self._lock = sealed.lock(self.folder, "these tapes")
        self.key = sealed.load_key(self.folder / "key")
        for old in self.folder.glob("*/"):
            name = old.name.removesuffix(UNFINISHED)
            if _BATCH.fullmatch(name) and (name != old.name or self._used(name)):
                shutil.rmtree(old, ignore_errors=True)  # half made, or half used

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    def batches(self, sizes: Sizes, tokens: int) -> list[str]:
        """List unused batches for a session of these sizes and up to `tokens` tokens, the oldest in front."""
        found = []
        for file in self.folder.glob(f"*/{SEED}{SUFFIX}"):
            name = file.parent.name
            if not _BATCH.fullmatch(name) or self._used(name):
                continue
            header = sealed.read_header(file)
            enough = type(header.get("tokens")) is int and header["tokens"] >= tokens
            if enough and header.get("sizes") == _plain(sizes):
                found.append((file.stat().st_mtime_ns, name))
        return [name for _, name in sorted(found)]

    def claim(self, links: Mapping[Rank, Link], sizes: Sizes, tokens: int) -> TapeLink:
        """Claim a batch that both computing parties hold: it is used from now on. Raises StateError.

        links: to the other computing party; the client offers, the server chooses.
        """
        mine, peer = self.batches(sizes, tokens), links[self.rank.peer]
        if self.rank is Rank.CLIENT:
            peer.send_facts("tapes/offer", {"batches": mine[:1000]})
            chosen = peer.recv_facts("tapes/choice").get("batch")
        else:
            offered = peer.recv_facts("tapes/offer").get("batches")
            chosen = next((b for b in mine if isinstance(offered, list) and b in offered), None)
            peer.send_facts("tapes/choice", {"batch": chosen})
        if chosen is None or chosen not in mine:
            used = len(list((self.folder / USED).iterdir()))
            lengths = ", ".join(map(str, self._lengths(sizes)))
            instead = f"; there are some for {lengths}: give --max-new-tokens" if lengths else ""
            peer_name = self.rank.peer.label
            raise StateError(
                f"{self.rank.label}: its store has no tapes that the {peer_name}'s has, too, for this model, "
                f"policy, context, {_asked(sizes)} and {tokens} tokens (used or half used, and refused: "
                f"{used})"
                f"{instead}; make some with --prepare at all three parties",
                private=False,
            )
        self._mark(chosen)
        return TapeLink(self, chosen, sizes)

    def _lengths(self, sizes: Sizes) -> list[int]:
        """List the answers' lengths that unused batches of these sizes are for."""
        headers = (sealed.read_header(self.file(batch, SEED)) for batch in self.batches(sizes, 0))
        return sorted({header["tokens"] for header in headers})

    def _mark(self, batch: str) -> None:
        """Mark a batch as used: durable before this returns, and done by one process only."""
        marker = self.folder / USED / batch
        with sealed.telling(f"{marker}: cannot be written"):
            try:
                descriptor = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                raise StateError(f"{self.rank.label}: tapes {batch} are used, by another process") from None
            try:
                sealed.sync_as_it_can(descriptor)
            finally:
                os.close(descriptor)
        sealed.to_disk(self.folder / USED)

    def _used(self, batch: str) -> bool:
        return (self.folder / USED / batch).exists()

    def file(self, batch: str, phase: str) -> Path:
        return self.folder / batch / f"{phase}{SUFFIX}"

    def header(self, batch: str, phase: str) -> dict[str, Any]:
        return {"kind": "tape", "rank": int(self.rank), "batch": batch, "phase": phase}


class TapeLink(Link):
    """The dealer's side of a session, read from a claimed batch: what it would have sent, in its order."""

    peer, offline = Rank.DEALER, True

    def __init__(self, store: TapeStore, batch: str, sizes: Sizes) -> None:
        self.me, self._store, self.batch = store.rank, store, batch
        self._phase, self._messages = "", iter(())
        public = sealed.read_header(store.file(batch, SEED))  # opening the file shows that it is whole
        header = store.header(batch, SEED) | {"sizes": _plain(sizes)}
        self._seed = self._read(SEED, header)["seed"]
        self.tokens: int = public["tokens"]  # of an answer
        self.turns: list[int] = public.get("turns", [])  # of a conversation: its questions, in tokens

    def recv(
        self, step: str, specs: Sequence[Spec], labels: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        if step == "seeds/tape":
            return [self._seed]
        phase = step.partition("/")[0]
        if phase != self._phase:
            self._phase = phase
            self._messages = iter(self._read(phase, self._store.header(self.batch, phase))["messages"])
        message = next(self._messages, None)
        if message is None or message["step"] != step or _specs(message["tensors"]) != _specs_of(specs):
            raise StateError(
                f"{self.me.label}: the tape does not fit {step}; was it made by another release of mpcache?"
            )
        tensors: list[torch.Tensor] = message["tensors"]
        return tensors

    def _read(self, phase: str, header: Mapping[str, Any]) -> Any:
        """Read a file's content; the file is gone then, since it will not be read again."""
        file = self._store.file(self.batch, phase)
        try:
            content = snapshot.read_snapshot(file, self._store.key, header)
        except StateError as error:
            raise StateError(f"{self.me.label}: {error}; its batch is used up, prepare another") from None
        file.unlink(missing_ok=True)
        return content

    def close(self, reason: str = "") -> None:
        """Remove the rest of the batch, which is of no use to anyone."""
        shutil.rmtree(self._store.folder / self.batch, ignore_errors=True)

    def send(self, step: str, tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None) -> None:
        raise _mute(step)

    def exchange(
        self, step: str, tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        raise _mute(step)

    def swap(self, step: str, *_: Any) -> bytes:
        raise _mute(step)

    def send_facts(self, step: str, facts: Mapping[str, object]) -> None:
        raise _mute(step)

    def recv_facts(self, step: str, patience: float | None = None) -> dict[str, Any]:
        raise _mute(step)

    def skip_to_facts(self, step: str) -> dict[str, Any]:
        raise _mute(step)

    def check_alive(self, step: str) -> None:
        pass

    def poll_facts(self, step: str) -> dict[str, Any] | None:
        raise _mute(step)

    def send_hello(self, hello: Hello) -> None:
        raise _mute("hello")

    def recv_hello(self) -> Hello:
        raise _mute("hello")

    def poll_hello(self) -> Hello | None:
        raise _mute("hello")


class TapeWriter(ShapeParty):
    """Reads the program by shapes, as the dealer does, and stores what the dealer sends to `me`."""

    def __init__(self, me: Rank, dealer: Link, store: TapeStore, batch: str) -> None:
        super().__init__(Rank.SERVER)  # by shapes both parties' programs are the same
        self.me, self._dealer, self._store, self._batch = me, dealer, store, batch
        self._folder = store.folder / f"{batch}{UNFINISHED}"
        sealed.make_folder(self._folder)
        self._phase, self._messages = "", list[dict[str, Any]]()
        self.bytes = 0  # on disk

    def begin(self, phase: str) -> None:
        self.flush()
        self._phase = phase

    def draw(self, request: Request, step: str) -> list[Any]:
        sent = request.sent_to(self.me)
        if sent:
            tensors = self._dealer.recv(step, [p.spec for p in sent])
            self._messages.append({"step": step, "tensors": tensors})
        parts: list[Any] = [MetaTensor(p.shape, p.dtype) for p in request.parts]
        return [*parts, None] if request.keep else parts

    def flush(self) -> None:
        """Write the phase that has been read to disk, and tell the dealer: it deals no faster."""
        if self._phase:
            self._write(self._phase, {}, {"messages": self._messages})
            self._dealer.send_facts(f"stored/{self._phase}", {"stored": True})
            self._phase, self._messages = "", []

    def finish(self, seed: torch.Tensor, sizes: Sizes, tokens: int, turns: Sequence[int]) -> None:
        """End a batch whose phases are all there: it can be claimed from now on."""
        self.flush()
        self._write(SEED, {"sizes": _plain(sizes), "tokens": tokens, "turns": list(turns)}, {"seed": seed})
        with sealed.telling(f"{self._folder}: cannot be renamed"):
            os.rename(self._folder, self._store.folder / self._batch)
        sealed.to_disk(self._store.folder)

    def discard(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self._folder)

    def _write(self, phase: str, public: Mapping[str, Any], content: Any) -> None:
        header = {**self._store.header(self._batch, phase), **public}
        file = self._folder / f"{phase}{SUFFIX}"
        self.bytes += sealed.seal(file, self._store.key, header, snapshot.serialize(content))


def _asked(sizes: Sizes) -> str:
    """Return what a session asks, in words."""
    return "question" if sizes.get("question") else "a conversation"


def _mute(step: str) -> RuntimeError:
    return RuntimeError(f"{step}: a tape only gives what the dealer sent")


def _plain(sizes: Sizes) -> Any:
    """Return sizes as a header gives them back."""
    return json.loads(json.dumps(dict(sizes)))


def _specs(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(t.dtype, tuple(t.shape)) for t in tensors]


def _specs_of(specs: Sequence[Spec]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(dtype, tuple(shape)) for dtype, shape in specs]
