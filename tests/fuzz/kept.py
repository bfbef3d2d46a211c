"""What peers say of files that a party keeps: steps to resume from, batches of tapes; and the tapes.

The files are real ones. After each case they must be as they were, unless all three parties agreed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mpcache.cache import Cache, LayerCache
from mpcache.errors import MpcacheError
from mpcache.ledger import Ledger
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.runtime.shares import MaskedOperand, Share
from mpcache.transport.local import LocalLink, local_pair
from mpcache_parties.state import sealed, snapshot
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.store import Files, Store
from mpcache_parties.state.tapes import SEED, SUFFIX, USED, TapeLink, TapeStore
from mpcache_protos import party_pb2 as pb
from tests.fuzz.mutate import damaged, replaced

SESSION, FIRST, SECOND, NEW = "5e" * 16, "01" * 16, "02" * 16, "03" * 16  # a session and its runs
ODD = ("../x", "/etc", "..", "", ".", SESSION + "/../" + SESSION, SESSION.upper(), SESSION + "\n", "x" * 5000,
       "a\x00b", FIRST, SECOND, "9" * 4000, "漢" * 12_000, "\ud800" * 32)  # fmt: skip
IDENTITY = {"model": "00", "question": "11"}
CLIENT_HOLDS = {0: FIRST, 1: FIRST, 2: SECOND, 3: SECOND, 4: SECOND}
HELD: dict[Rank, dict[int, str]] = {
    Rank.SERVER: CLIENT_HOLDS | {5: SECOND},
    Rank.CLIENT: CLIENT_HOLDS,
    Rank.DEALER: {step: run for step, run in CLIENT_HOLDS.items() if step != 4},
}
COMMON = 3  # the last one that all of them hold
TAPES = "7a" * 16
SIZES = {"context": 40}
SPECS = [(torch.int64, (4, 6))]

Contents = dict[str, bytes | None]


def contents(folder: Path) -> Contents:
    """All that lies there, by path; None for a folder."""
    return {str(f.relative_to(folder)): None if f.is_dir() else f.read_bytes() for f in folder.rglob("*")}


def heard(text: bytes) -> Any:
    """What the JSON says, as a link hands it on."""
    return json.loads(text.decode("utf-8", "replace"))


def told(me: Rank, peer: Rank, *messages: tuple[str, bytes]) -> LocalLink:
    """A link on which the peer has said these facts, as raw JSON, and says no more."""
    link, other = local_pair(Ledger(), Ledger(), me, peer, 0.005)
    other.arrived = lambda data: True  # type: ignore[method-assign]
    for i, (step, text) in enumerate(messages):
        facts = pb.Facts(step=step, sequence=i, json=text.decode("utf-8", "replace"))
        link.arrived(pb.Frame(facts=facts).SerializeToString())
    return link


# ---------------------------------------------------------------------------------------------- resume


def resumes(place: Path, found: Callable[[str, int, Any, Any, bytes], None]) -> None:
    """Each rank resumes a session, whatever its peers say of theirs."""
    before: dict[Rank, Contents] = {}
    for rank in Rank:
        _keep(place / "state", rank)
        before[rank] = contents(place / "state" / rank.label)
    outside = contents(place / "state")
    for rank in Rank:

        def run(data: bytes, rank: Rank = rank) -> None:
            try:
                _resume(place / "state", rank, data.split(b"\n"), before[rank])
            finally:
                now = contents(place / "state")
                if now != outside:
                    mine = {k for k in now.keys() | outside.keys() if now.get(k) != outside.get(k)}
                    _put_back(place / "state" / rank.label, before[rank])
                    own = f"{rank.label}/{SESSION}"
                    assert all(k.startswith(own) for k in mine), f"outside of {own}: {mine}"

        def make(rng: random.Random, rank: Rank = rank) -> bytes:
            return b"\n".join(_said(rng, rank))

        whole = b"\n".join(json.dumps(message).encode() for message in _messages(rank))
        found(f"resume at the {rank.label}", 2, run, make, whole)


def _keep(folder: Path, rank: Rank) -> None:
    """A session's files as a party leaves them."""
    share = Share(torch.arange(12).reshape(2, 6), 16, Rank.SERVER)
    k, v = cast(Any, MaskedOperand(share.data, share.data, 16)), cast(Any, share)
    cache = Cache([LayerCache(k, v, None)], 6)
    files = Files(Store(folder, rank), SESSION, 6)
    step = {"cache": cache, "own": {"ids": [1]}, "wire_bytes": 9, "phases": {}}
    for number, run in HELD[rank].items():
        whole = {"identity": IDENTITY, "facts": {"a": 1}, "operands": None} if not number else {}
        files.write(number, run, whole | step)
    files.close()


def _messages(rank: Rank) -> list[Any]:
    """What the two peers say, in order: the session (the client), steps and choices of both, the end."""
    steps = [{"steps": [[n, run] for n, run in HELD[p].items()]} for p in Rank if p is not rank]
    choice = {"step": COMMON, "of": SECOND, "run": NEW, "place": [1, COMMON]}
    return [{"session": SESSION, "run": NEW}, *steps, choice, choice, {"answered": True}]


def _said(rng: random.Random, rank: Rank) -> list[bytes]:
    """The same, one or two of them damaged."""
    messages = _messages(rank)
    texts = [json.dumps(message).encode() for message in messages]
    for i in {rng.randrange(len(messages)) for _ in range(rng.choice((1, 1, 2)))}:
        match rng.randrange(6):
            case 0:
                texts[i] = damaged(rng, texts[i], texts).replace(b"\n", b" ")
            case 1:  # an odd name, which the others have heard, too
                name, odd = rng.choice(("session", "run")), rng.choice(ODD)
                escaped = rng.random() < 0.5
                for k in (0, 3, 4):
                    about = messages[k] | ({name: odd} if name in messages[k] else {})
                    texts[k] = json.dumps(about, ensure_ascii=escaped).encode("utf-8", "replace")
            case 2:  # other steps: fewer, of another run, twice, very many
                steps = messages[1 + i % 2]["steps"]
                odd_steps = [
                    rng.choice((s, s, s, [s[0], FIRST], [s[0] - 7, s[1]], [10**20, s[1]])) for s in steps
                ]
                steps = rng.choice((odd_steps, steps[: rng.randrange(6)], steps * rng.choice((2, 99, 2000))))
                texts[1 + i % 2] = json.dumps({"steps": steps}).encode()
            case 3:  # so deep that one reader's stack is enough, and the next one's may not be
                depth = rng.randrange(600, 1100)
                texts[1 + i % 2] = b'{"steps": ' + b"[" * depth + b"]" * depth + b"}"
            case _:
                texts[i] = json.dumps(replaced(rng, messages[i])).encode()
    return texts


def _resume(folder: Path, rank: Rank, texts: list[bytes], before: Contents) -> None:
    texts += [b""] * (6 - len(texts))
    about, steps, choices, end = texts[0], texts[1:3], texts[3:5], texts[5]
    links: dict[Rank, Any] = {}
    for peer, held, choice in zip((p for p in Rank if p is not rank), steps, choices, strict=True):
        said = [("resume/steps", held), ("resume/agreed", choice)]
        if peer is Rank.CLIENT:
            said = [("resume/session", about), *said, ("close", end)]
        links[peer] = told(rank, peer, *said)
    keeper = Checkpointer(Store(folder, rank), resume=True)
    own = folder / rank.label
    try:
        loaded = None
        with _new_run():
            try:
                loaded = keeper.meet(links, IDENTITY)
            finally:
                if loaded is None:
                    assert contents(own) == before, "files changed although the parties did not agree"
        assert loaded is not None
        _check_agreed(rank, loaded.step, steps, choices)
        _check_files(before, contents(own), loaded.step)
        _go_on(keeper, loaded)
        kept = contents(own)
        try:
            keeper.end(links)
        except MpcacheError:
            assert contents(own) == kept, "files changed although the client has no answer"
            raise
        assert rank is Rank.CLIENT or heard(end)["answered"] is True
    finally:
        keeper.close()


class _new_run:
    """The client draws the name NEW: its peers' answers in a case were made for that."""

    def __enter__(self) -> None:
        from mpcache_parties.state import checkpoint

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(checkpoint, "secrets", SimpleNamespace(token_hex=lambda n: NEW))

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def _check_agreed(rank: Rank, step: int, steps: list[bytes], choices: list[bytes]) -> None:
    """By what was said: all hold this step, of the same run, and both peers choose it."""
    for text in steps:
        assert [step, HELD[rank][step]] in heard(text)["steps"], f"a peer does not hold step {step}"
    for text in choices:
        choice = heard(text)
        assert (choice["step"], choice["of"]) == (step, HELD[rank][step]), f"a peer goes on from {choice}"


def _check_files(before: Contents, now: Contents, step: int) -> None:
    """Later steps are forgotten, the step itself may be written anew, nothing else changes."""
    for name in before.keys() | now.keys():
        stem = Path(name).stem
        number = 0 if stem == "context" else int(stem) if stem.isdigit() else -1
        if number == step:
            assert name in now
        else:
            assert now.get(name, b"") == (b"" if number > step else before.get(name, b"-")), name


def _go_on(keeper: Checkpointer, loaded: Any) -> None:
    """The next step can be written, in the run that the client named."""
    place = ChunkPlace(1, loaded.step + 1)
    session: Any = SimpleNamespace(cache=loaded.cache, chunks=place.step, place=place, ms={}, cpu_ms={})
    keeper.token(session, Ledger(), loaded.own)
    assert keeper.last == place


def _put_back(folder: Path, before: Contents) -> None:
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    for name, data in sorted(before.items()):
        if data is None:
            (folder / name).mkdir(mode=0o700)
        else:
            (folder / name).write_bytes(data)
            (folder / name).chmod(0o600)


# ----------------------------------------------------------------------------------------------- tapes


def tapes(place: Path, bytes_of: Any, json_of: Any) -> None:
    """A store with one batch: its files damaged, and damaged words about which batch to take."""
    stores = {rank: TapeStore(place / "tapes", rank) for rank in (Rank.SERVER, Rank.CLIENT)}
    store = stores[Rank.CLIENT]
    words = torch.arange(24).reshape(4, 6)
    messages = [{"step": f"context/layer{i}", "tensors": [words]} for i in range(2)]
    for one in stores.values():
        (one.folder / TAPES).mkdir()
        public = {"sizes": SIZES, "tokens": 4}
        _write(one, SEED, public, {"seed": torch.arange(32, dtype=torch.uint8)})
        _write(one, "context", {}, {"messages": messages})
    files = {phase: store.file(TAPES, phase) for phase in (SEED, "context")}
    good = {phase: file.read_bytes() for phase, file in files.items()}

    def read(phase: str, data: bytes) -> None:
        """Both files through what a session does with them; one is damaged."""
        for name, file in files.items():
            file.write_bytes(data if name == phase else good[name])
        try:
            store.batches(SIZES, 4)
            link = TapeLink(store, TAPES, SIZES)
            link.recv("seeds/tape", [(torch.uint8, (32,))])
            for message in messages:
                (tensor,) = link.recv(str(message["step"]), SPECS)
                assert torch.equal(tensor, words), "a damaged tape was taken for a whole one"
        finally:
            for name, file in files.items():
                file.write_bytes(good[name])

    for phase, text in good.items():

        def file(data: bytes, phase: str = phase) -> None:
            read(phase, data)

        bytes_of(f"tape, {phase}", 3, file, [text])
        # The header lies in the clear: damage to its values, too.
        start = len(sealed.MAGIC) + 4
        end = start + int.from_bytes(text[start - 4 : start], "little")

        def header(data: bytes, phase: str = phase, rest: bytes = text[end:]) -> None:
            with suppress(ValueError, RecursionError):  # as `sealed` writes it: whole, it opens
                data = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
            read(phase, sealed.MAGIC + len(data).to_bytes(4, "little") + data + rest)

        json_of(f"tape header, {phase}", 3, header, [json.loads(text[start:end])])

    def claim(data: bytes) -> None:
        """Both sides of the claim, by what the other one says."""
        for rank, one in stores.items():
            step = "tapes/choice" if rank is Rank.CLIENT else "tapes/offer"
            link: Any = told(rank, rank.peer, (step, data))
            used = one.folder / USED
            batch = contents(one.folder / TAPES)
            try:
                one.claim({rank.peer: link}, SIZES, 4)
            except MpcacheError:
                assert not list(used.iterdir()), "a batch is used up that was not agreed on"
                assert contents(one.folder / TAPES) == batch
                if rank is Rank.CLIENT:
                    raise
            else:
                said = heard(data)
                assert TAPES in (said.get("batches", ()) if rank is Rank.SERVER else [said.get("batch")])
                assert [f.name for f in used.iterdir()] == [TAPES]
            finally:
                for mark in used.iterdir():
                    mark.unlink()
                for name, content in good_of[rank].items():
                    one.file(TAPES, name).write_bytes(content)

    good_of: Mapping[Rank, Mapping[str, bytes]] = {
        rank: {phase: one.file(TAPES, phase).read_bytes() for phase in good} for rank, one in stores.items()
    }
    json_of("claim of tapes", 3, claim, [{"batches": [FIRST, TAPES], "batch": TAPES}])


def _write(store: TapeStore, phase: str, public: Mapping[str, Any], content: Any) -> None:
    header = {**store.header(TAPES, phase), **public}
    sealed.seal(store.folder / TAPES / f"{phase}{SUFFIX}", store.key, header, snapshot.serialize(content))
