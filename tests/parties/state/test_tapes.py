"""Tapes dealt in advance: the same answer without a dealer, and each tape once, whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpcache.answer import plain_answer
from mpcache.choices import ProtocolName
from mpcache.cluster import Failure
from mpcache.config import PublicConfig
from mpcache.errors import MpcacheError, PolicyError, StateError
from mpcache.limits import bind_policy
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache_parties.farm import BatchOrder, Farm
from mpcache_parties.handshake import PROTOCOL_VERSION
from mpcache_parties.prepare import prepare
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, serve
from mpcache_parties.state import sealed
from mpcache_parties.state.spool import Spool
from mpcache_parties.state.tapes import SEED, TapeLink, TapeStore
from tests.support.cluster_here import ClusterHere
from tests.support.links import Job, Killed, context_of, free_settings, plain_ids, together
from tests.support.processes import PARTY, SOON_S, errors_of, start, started, write_config

S, C, D = Rank
QUESTION = Question("the gate of", stop_at_eos=False)
PUBLIC = PublicConfig(policy="mpcache:coarse=8,fine=4,recent=4", max_new_tokens=3)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    """A context of 40 tokens."""
    return context_of(model, 40)


def prepared(
    model: Model, tokens: list[int], place: Path,
    public: PublicConfig = PUBLIC, question: Question = QUESTION,
    said: list[str] | None = None, count: int = 1, farm: Farm | None = None,
) -> dict[Rank, Any]:  # fmt: skip
    said = [] if said is None else said
    owns: dict[Rank, Any] = {S: Document(model, tokens), C: question, D: None}
    stores = {rank: None if rank is D else TapeStore(place, rank) for rank in Rank}

    def job(rank: Rank) -> Job:
        more = (count, farm) if rank is D else ()
        return lambda links, ledger: prepare(
            rank, SessionResources(links, ledger, public, say=said.append, tapes=stores[rank]), owns[rank],
            *more,
        )  # fmt: skip

    try:
        return together({rank: job(rank) for rank in Rank})
    finally:
        for store in stores.values():
            if store is not None:
                store.close()


def answered(
    model: Model, tokens: list[int], place: Path, public: PublicConfig = PUBLIC, question: Question = QUESTION
) -> dict[Rank, Any]:
    """Server and client alone, with what they have in store."""
    stores = {rank: TapeStore(place, rank) for rank in (S, C)}
    try:
        return together(
            {
                S: lambda links, ledger: serve(
                    SessionResources(links, ledger, public, tapes=stores[S]), Document(model, tokens)
                ),
                C: lambda links, ledger: ask(
                    SessionResources(links, ledger, public, tapes=stores[C]), question
                ),
            }
        )
    finally:
        for store in stores.values():
            store.close()


def batches(place: Path, rank: Rank) -> list[Path]:
    return [f.parent for f in (place / rank.label).glob(f"*/{SEED}.tape")]


def refused(ends: dict[Rank, Any], used: int) -> None:
    for rank in (S, C):
        assert isinstance(ends[rank], MpcacheError) and "\n" not in str(ends[rank])
    with pytest.raises(StateError, match=rf"refused: {used}\).*; make some with --prepare at all three"):
        raise ends[S]


def test_prepared_tapes_serve_once(model: Model, tokens: list[int], tmp_path: Path) -> None:
    said: list[str] = []
    assert prepared(model, tokens, tmp_path, said=said) == {S: None, C: None, D: None}
    foretold = next(text for text in said if text.startswith("dealer: dealing"))
    dealt = next(text for text in said if text.startswith("dealer: dealt"))
    (one, unit), (other, same) = (line.split()[2:4] for line in (foretold, dealt))
    assert unit == same and float(one) == pytest.approx(float(other), rel=0.01)  # but for a few words
    kept = tmp_path / "kept"
    for rank in (S, C):
        (batch,) = batches(tmp_path, rank)
        names = sorted(file.name.removesuffix(".tape") for file in batch.iterdir())
        assert names == ["context", "decode1", "decode2", "question", "seed", "setup"]
        shutil.copytree(batch, kept / rank.label / batch.name)
    longer = answered(model, tokens, tmp_path, PUBLIC.model_copy(update={"max_new_tokens": 9}))
    assert "9 tokens" in str(longer[S]) and "some for 3: give --max-new-tokens" in str(longer[S])
    reports = answered(model, tokens, tmp_path)
    assert reports[C].token_ids == plain_ids(model, PUBLIC, tokens, QUESTION.text), reports
    assert not batches(tmp_path, S) + batches(tmp_path, C)

    refused(answered(model, tokens, tmp_path), used=1)
    for rank in (S, C):  # not even a copy of it serves again
        shutil.copytree(kept / rank.label, tmp_path / rank.label, dirs_exist_ok=True)
        assert batches(tmp_path, rank)
    refused(answered(model, tokens, tmp_path), used=1)


@pytest.mark.parametrize("where", ["between claim and use", "in mid answer"])
def test_a_crash_uses_a_tape_up(
    where: str, model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half used, or claimed only: it is refused, at both parties, also by the one that did not crash."""
    prepared(model, tokens, tmp_path)
    phase = SEED if where == "between claim and use" else "decode1"
    read = TapeLink._read

    def crash(self: TapeLink, name: str, header: Any) -> Any:
        if self.me is C and name == phase:
            raise Killed
        return read(self, name, header)

    with monkeypatch.context() as patch:
        patch.setattr(TapeLink, "_read", crash)
        assert isinstance(answered(model, tokens, tmp_path)[C], Killed)
    refused(answered(model, tokens, tmp_path), used=1)
    prepared(model, tokens, tmp_path)
    assert answered(model, tokens, tmp_path)[C].token_ids == plain_ids(model, PUBLIC, tokens, QUESTION.text)


def test_the_claim_is_on_disk_before_the_seed_is_read(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(model, tokens, tmp_path)
    store = TapeStore(tmp_path, C)
    (name,) = [f.name for f in batches(tmp_path, C)]
    done: list[str] = []
    fsync, read = os.fsync, sealed.unseal

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def spied(file: Path, *rest: Any) -> bytearray:
        done.append(f"read {file.name}")
        return read(file, *rest)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(sealed, "unseal", spied)
    store._mark(name)
    header = sealed.read_header(store.file(name, SEED))
    TapeLink(store, name, header["sizes"])
    assert done == [name, "used", f"read {SEED}.tape"]
    with pytest.raises(StateError, match="are used, by another process"):
        store._mark(name)
    store.close()


OTHERS: dict[str, dict[str, Any]] = {
    "more tokens": {"public": PUBLIC.model_copy(update={"max_new_tokens": 4})},
    "another policy": {"public": PUBLIC.model_copy(update={"policy": "full"})},
    "another length": {"question": Question("the gate of the city", stop_at_eos=False)},
}


@SLOW
@pytest.mark.parametrize("case", OTHERS)
def test_tapes_of_other_sizes_are_left_alone(
    case: str, model: Model, tokens: list[int], tmp_path: Path
) -> None:
    prepared(model, tokens, tmp_path)
    refused(answered(model, tokens, tmp_path, **OTHERS[case]), used=0)
    assert answered(model, tokens, tmp_path)[C].token_ids == plain_ids(model, PUBLIC, tokens, QUESTION.text)


def test_tapes_of_another_version_are_left_alone(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version draws other tensors: its tapes would end a session in a Desync, and be used up."""
    prepared(model, tokens, tmp_path)
    monkeypatch.setattr("mpcache_parties.facts.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    refused(answered(model, tokens, tmp_path), used=0)


@SLOW
def test_batches_are_used_in_turn_and_stock_too(model: Model, tokens: list[int], tmp_path: Path) -> None:
    """Two batches serve two answers, a shorter one among them; the third is refused."""
    public = PublicConfig(policy="full", max_new_tokens=3, protocol=ProtocolName.STOCK)
    for _ in range(2):
        prepared(model, tokens, tmp_path, public)
    shorter = public.model_copy(update={"max_new_tokens": 2})
    for one in (public, shorter):
        ends = answered(model, tokens, tmp_path, one)
        assert ends[C].token_ids == plain_ids(model, one, tokens, QUESTION.text), ends
    refused(answered(model, tokens, tmp_path, shorter), used=2)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sealed._write_all

    def full(descriptor: int, data: bytes) -> None:
        if "/server/" in os.readlink(f"/proc/self/fd/{descriptor}") and len(data) > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data)

    monkeypatch.setattr(sealed, "_write_all", full)
    ends = prepared(model, tokens, tmp_path)
    with pytest.raises(StateError, match="cannot be written: No space left on device; free some space"):
        raise ends[S]
    for rank in (C, D):
        assert isinstance(ends[rank], MpcacheError) and str(tmp_path) not in str(ends[rank])
    for rank in (S, C):
        assert sorted(f.name for f in (tmp_path / rank.label).iterdir()) == ["key", "used"]


def test_a_plan_that_the_document_decides_cannot_be_prepared(
    model: Model, tokens: list[int], tmp_path: Path
) -> None:
    public = PublicConfig(policy="mpcache:threshold=0.05", max_new_tokens=2)
    for end in prepared(model, tokens, tmp_path, public).values():
        with pytest.raises(MpcacheError, match="the document decides its plan"):
            raise end
    assert issubclass(PolicyError, MpcacheError)


@pytest.mark.processes
@SLOW
def test_processes_prepare_and_answer(folder: Path, model: Model, tokens: list[int], tmp_path: Path) -> None:
    """As a user starts them: three prepare, two answer, and the same two are refused afterwards."""
    settings = free_settings().model_copy(update={"public": PUBLIC})
    config = write_config(settings, tmp_path / "config.yaml")
    document = tmp_path / "document.txt"
    document.write_text(model.tokenizer.decode(tokens[:30]))
    store = ["--config", config, "--offline-store", tmp_path / "store"]
    flags: dict[Rank, list[object]] = {
        S: ["--rank", 0, "--model", folder, "--context", document],
        C: ["--rank", 1, "--question", QUESTION.text, "--no-stop-at-eos"],
    }
    small = ["prlimit", "--fsize=100000"]
    for limit in ([*small, *PARTY], PARTY) if shutil.which("prlimit") else (PARTY,):
        with started() as children:
            children.append(start(PARTY, "--rank", 2, "--config", config, "--prepare", 3))
            children.append(start(PARTY, *flags[C], *store, "--prepare", 3))
            children.append(start(limit, *flags[S], *store, "--prepare", 3))
            noises = [child.communicate(timeout=90)[1] for child in children]
            if limit is not PARTY:  # a file that must not grow: the disk is full for this party
                assert [child.returncode for child in children] == [3, 3, 1]
                assert "File too large; free some space" in errors_of(noises[2])[0]
                assert all("server ended the session" in errors_of(noise)[0] for noise in noises[:2])
                continue
            assert [child.returncode for child in children] == [0, 0, 0], noises
            assert "server: stored" in noises[2]
    asked = model.tokenizer.encode(QUESTION.text, bos=False)
    context = model.tokenizer.encode(document.read_text(), bos=True)
    plain = plain_answer(
        model, bind_policy(model.shape, PUBLIC, len(context), len(asked)), context, asked, 3, Sampling(), ()
    )
    for again in (False, True):
        with started() as children:
            children += [start(PARTY, *flags[C], *store), start(PARTY, *flags[S], *store)]
            (out, noise), (_, other) = (child.communicate(timeout=60 + SOON_S) for child in children)
            if again:
                assert [child.returncode for child in children] in ([1, 1], [1, 3], [3, 1])
                (line,) = errors_of(other)
                assert "refused: 1" in line or "client ended the session" in line
            else:
                assert [child.returncode for child in children] == [0, 0], noise + other
                assert out == model.tokenizer.decode(plain.ids) + "\n"


# ----------------------------------------------------------------------------------- several batches


def farm_of(spool: Path) -> Farm:
    return Farm(ClusterHere(), Spool.at(str(spool)))


@pytest.mark.parametrize("farmed", [False, True])
def test_each_of_several_batches_serves_one_answer(
    model: Model, tokens: list[int], tmp_path: Path, farmed: bool
) -> None:
    farm = farm_of(tmp_path / "spool") if farmed else None
    ends = prepared(model, tokens, tmp_path, count=2, farm=farm)
    assert set(ends.values()) == {None}, ends
    assert not list(tmp_path.glob("spool/*"))  # what was handed on is gone
    expected = plain_ids(model, PUBLIC, tokens, QUESTION.text)
    for _ in range(2):
        assert answered(model, tokens, tmp_path)[C].token_ids == expected
    assert all(isinstance(end, MpcacheError) for end in answered(model, tokens, tmp_path).values())


def test_what_workers_deal_opens_for_their_dealer_alone(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another key does not open it; and the dealer ends with one line, as the others do."""
    farm = farm_of(tmp_path / "spool")
    take = BatchOrder.take
    monkeypatch.setattr(
        BatchOrder, "take", lambda order, phase: take(replace(order, key=bytes(sealed.KEY_BYTES)), phase)
    )
    ends = prepared(model, tokens, tmp_path, farm=farm)
    assert isinstance(ends[D], StateError) and all(isinstance(end, MpcacheError) for end in ends.values())
    farm.close()
    assert not list(tmp_path.glob("spool/*"))


def test_a_worker_that_dies_ends_the_farm_with_one_line(
    model: Model, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ClusterHere, "stream", lambda self, *rest, **more: iter([(1, Failure("its worker died"))])
    )
    ends = prepared(model, tokens, tmp_path, count=2, farm=farm_of(tmp_path / "spool"))
    assert str(ends[D]) == "batch 2 of 2 is lost: its worker died"
    assert all(isinstance(ends[rank], MpcacheError) for rank in (S, C))
    assert not TapeStore(tmp_path, S).batches({}, 0)
