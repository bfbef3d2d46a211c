"""Packs: what stays of a document is served again to the bit, and any other file is refused in a line."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from mpcache.answer import PlainConversation, bind_to_document
from mpcache.config import PublicConfig, Settings
from mpcache.engines.plain import PlainOps
from mpcache.errors import BadInput, MpcacheError, PolicyError, TextError
from mpcache.limits import bind_policy
from mpcache.model import Model
from mpcache.model.prefill import prefill
from mpcache.policy.curve import LEVELS, HeadCurve, try_curve
from mpcache.policy.layer_view import OwnersContext, PackedContext
from mpcache.session import Session
from mpcache_kernels import backend
from mpcache_parties.facts import facts_of_model
from mpcache_parties.packing import (
    OpenedPack,
    check_pack,
    make_pack,
    packed_documents,
    with_pack_settings,
)
from mpcache_parties.private_inputs import Document, Documents
from mpcache_parties.say import quiet
from mpcache_parties.state import packs, sealed
from mpcache_parties.state.packs import Pack, PackLock, bind_packed, read_pack, write_pack
from tests.support.links import context_of
from tests.support.processes import Run

PUBLIC = PublicConfig(policy="compact:keep=0.4,counts=joint", max_new_tokens=4)
KERNELS = backend("cpu")
QUESTION = [5, 9, 7]


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    return context_of(model, 60)


@pytest.fixture(scope="module")
def pack(model: Model, tokens: list[int]) -> Pack:
    return make_pack(Document(model, tokens), PUBLIC, quiet)


@pytest.fixture
def file(tmp_path: Path, pack: Pack) -> Path:
    write_pack(tmp_path / "one.pack", pack)
    return tmp_path / "one.pack"


def give_curve(model: Model) -> None:
    shape, g = model.shape, torch.Generator().manual_seed(0)
    errors = torch.rand(shape.layers, shape.kv_heads, len(LEVELS), generator=g, dtype=torch.float64)
    try_curve(HeadCurve(model.digest, errors.sort(-1, descending=True).values, {}))


def logits(model: Model, public: PublicConfig, known: OwnersContext, length: int) -> torch.Tensor:
    bound = bind_policy(model.shape, public, length, len(QUESTION))
    bound, _ = bind_to_document(bound, model.shape, known, KERNELS)
    session = Session(PlainOps(KERNELS), None, model.shape, bound)
    session.setup(model.weights)
    session.context(known, KERNELS)
    found = session.chunk(QUESTION, len(QUESTION))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "policy",
    ["full", "compact", "compact:counts=joint", "compact:counts=equal|quest:page=4", "snapkv:cap=20|quest",
     "mpcache:coarse=8,fine=4", "mpcache:threshold=0.1,coarse=8,fine=4", "streaming", "tova"],
)  # fmt: skip
def test_a_pack_is_the_document_to_the_bit(policy: str, model: Model, tmp_path: Path) -> None:
    give_curve(model)
    tokens = context_of(model, 60)
    public = PublicConfig(policy=policy, max_new_tokens=4)
    window = bind_policy(model.shape, public, len(tokens), len(QUESTION)).window
    want = logits(model, public, prefill(model, tokens, window=window), len(tokens))
    write_pack(tmp_path / "x", make_pack(Document(model, tokens), public, quiet))
    context = read_pack(tmp_path / "x").context
    bind_packed(context, model.shape, tmp_path / "x")
    assert torch.equal(logits(model, public, context, len(tokens)), want)


def test_a_policy_that_goes_on_with_the_document_is_not_packed(model: Model, tokens: list[int]) -> None:
    for spec in ("h2o", "oracle"):
        with pytest.raises(PolicyError, match=f"policy {spec}.*: (weighs tokens|runs in plaintext)"):
            make_pack(Document(model, tokens), PublicConfig(policy=spec), quiet)


def test_it_says_how_far_it_is(model: Model, tokens: list[int]) -> None:
    said: list[str] = []
    make_pack(Document(model, tokens), PUBLIC, said.append)
    assert said[0] == "reading 60 tokens ..." and said[1].startswith("reading them a second time, about ")
    assert said[-1] == "layer 3 of 3 packed"
    assert any("left" in line for line in said)


def test_a_missing_curve_is_told_before_the_document_is_read(
    model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcache.policy.compact.curve_of", lambda model: None)
    said: list[str] = []
    with pytest.raises(PolicyError, match="this model has no curve"):
        make_pack(Document(model, tokens), PublicConfig(policy="compact"), said.append)
    assert said == []


# ------------------------------------------------------------------------------------------ sealed


def test_a_sealed_pack_opens_with_its_key_alone(tmp_path: Path, pack: Pack) -> None:
    file, key, other = tmp_path / "one", tmp_path / "key", tmp_path / "other"
    write_pack(file, pack, PackLock(key))
    assert key.stat().st_mode & 0o077 == file.stat().st_mode & 0o077 == 0
    again = read_pack(file, PackLock(key))
    assert again.context.digest and again.facts == pack.facts
    content = file.read_bytes()
    shown = pack.context.layers[0][0].v.numpy().tobytes()[:64]
    assert shown not in content and b"digest" not in content and pack.context.spec.encode() not in content
    other.write_bytes(bytes(32))
    other.chmod(0o600)
    for lock, words in (
        (PackLock(other), "was sealed with another key"),
        (PackLock(), "it is sealed; give --pack-key FILE"),
        (PackLock(passphrase=other), "--pack-passphrase does not open it; give --pack-key FILE"),
        (PackLock(tmp_path / "none"), "none: this key cannot be read: No such file"),
    ):
        with pytest.raises(TextError, match=words):
            read_pack(file, lock)
    assert not (tmp_path / "none").exists()


def test_a_passphrase_opens_it(tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "SCRYPT_N", 1 << 4)  # as itself it takes a good part of a second
    file, phrase = tmp_path / "one", tmp_path / "phrase"
    phrase.write_text("a long enough phrase\n")
    phrase.chmod(0o600)
    lock = PackLock(passphrase=phrase)
    write_pack(file, pack, lock)
    assert read_pack(file, lock).facts == pack.facts
    first = file.read_bytes()
    write_pack(file, pack, lock)
    assert first[:300] != file.read_bytes()[:300]  # another salt
    for text, mode, words in (
        ("another phrase", 0o600, "sealed with another key"),
        ("short", 0o600, "has 8 to 1024 characters"),
        ("a long enough phrase", 0o644, "others may read this passphrase"),
    ):
        phrase.write_text(text)
        phrase.chmod(mode)
        with pytest.raises(TextError, match=words):
            read_pack(file, lock)


# ----------------------------------------------------------------------------------------- refused


def damaged(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("at", [0, 8, 20, 400, -1, -5000])
def test_a_damaged_pack_is_one_line(file: Path, at: int) -> None:
    damaged(file, at)
    with pytest.raises(TextError, match=r"one\.pack: is (damaged|not a pack|a safetensors file)"):
        read_pack(file)


def test_a_pack_that_was_cut_is_one_line(file: Path) -> None:
    content, rng = file.read_bytes(), random.Random(1)
    for size in [0, 1, 8, 9, 100, *(rng.randrange(len(content)) for _ in range(20))]:
        file.write_bytes(content[:size])
        with pytest.raises(TextError, match=r"one\.pack: "):
            read_pack(file)


def test_another_file_is_no_pack(tmp_path: Path) -> None:
    file = tmp_path / "x"
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(TextError, match="is a safetensors file, and not a pack"):
        read_pack(file)
    sealed.seal(file, bytes(32), {"kind": "masks"}, [b"x"])
    with pytest.raises(TextError, match="is another of mpcache's files, not a pack"):
        read_pack(file)
    file.write_text("a text")
    with pytest.raises(TextError, match="is not a pack; make one with `mpcache pack`"):
        read_pack(file)
    with pytest.raises(TextError, match="cannot be read: No such file"):
        read_pack(tmp_path / "none")


def metadata_changed(file: Path, **changes: object) -> None:
    """Write a pack's own words anew, with the digest that its author would give it."""
    body = file.read_bytes()
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    known = json.loads(header["__metadata__"][packs.KIND]) | changes
    known["digest"] = packs._digest_of(load(body), known)
    header["__metadata__"][packs.KIND] = json.dumps(known)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + body[8 + size :])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "is a pack of format 2, which another release of mpcache wrote"),
        ({"length": -1}, "is damaged"),
        ({"length": 10**30}, "is of 10+ tokens, the model allows 128"),
        ({"length": 7}, "does not fit here|does not hold what its plan keeps"),
        ({"counts": [8] * 6}, "layer 0 does not hold what its plan keeps"),
        ({"counts": "abc"}, "is damaged"),
        ({"spec": "h2o"}, "does not fit here"),
        ({"spec": "no such"}, "does not fit here"),
        ({"spec": "full"}, "does not hold what its plan keeps"),
        ({"largest_scores": [1.0]}, "does not hold the model's 3 layers"),
        ({"largest_scores": [float("nan"), 1]}, "is damaged"),
        ({"kernels": 5}, "is damaged"),
        ({"counts": [8]}, "does not fit here|does not hold what its plan keeps"),
    ],
)
def test_a_hostile_pack_is_one_line(file: Path, model: Model, changes: dict[str, object], words: str) -> None:
    metadata_changed(file, **changes)
    with pytest.raises(TextError, match=words) as caught:
        bind_packed(read_pack(file).context, model.shape, file)
    assert "\n" not in str(caught.value)


def changed(pack: Pack, **changes: torch.Tensor) -> PackedContext:
    first, *rest = pack.context.layers[0]
    return replace(pack.context, layers=((replace(first, **changes), *rest), *pack.context.layers[1:]))


def test_what_no_document_leaves_is_refused(model: Model, pack: Pack, tmp_path: Path) -> None:
    """Biases beyond what the scores have room for, and rows of no token."""
    file, kept = tmp_path / "x", pack.context.layers[0][0]
    assert kept.bias is not None
    for wrong in (
        changed(pack, bias=kept.bias + 9),
        changed(pack, rows=kept.rows - 1),
        changed(pack, rows=kept.rows + 60),
    ):
        with pytest.raises(TextError, match="layer 0 holds what no document leaves"):
            bind_packed(wrong, model.shape, file)
    for wrong in (changed(pack, k=kept.k[:, 1:]), changed(pack, v=kept.v[:1, :, :1])):
        with pytest.raises(TextError, match="layer 0 does not hold what its plan keeps"):
            bind_packed(wrong, model.shape, file)
    write_pack(file, replace(pack, context=changed(pack, v=kept.v / 0)))
    with pytest.raises(TextError, match="is damaged"):
        read_pack(file)


# ------------------------------------------------------------------------------------------ foreign


def test_a_pack_of_something_else_is_one_line(model: Model, pack: Pack, file: Path, folder: Path) -> None:
    def refused(words: str, pack: Pack, public: PublicConfig = PUBLIC) -> None:
        with pytest.raises(TextError, match=rf"one\.pack: {words}"):
            check_pack(pack, file, model.tokenizer, public)

    check_pack(pack, file, model.tokenizer, PUBLIC)
    other = replace(pack.facts, tokenizer_digest="0" * 64)
    refused("was packed with another model", replace(pack, facts=other))
    refused("was packed with a chat template", replace(pack, facts=replace(pack.facts, framing="system")))
    refused("was packed with another chat", replace(pack, facts=replace(pack.facts, template_digest="1")))
    refused("was packed for policy compact:keep=0.4,counts=joint; the session has full", pack,
            PublicConfig(policy="full"))  # fmt: skip
    write_pack(file, replace(pack, facts=replace(pack.facts, model_digest="0" * 64)))
    with pytest.raises(TextError, match="was packed with another model than this one"):
        packed_documents(str(folder), [str(file)], PackLock(), PUBLIC)


def test_a_dry_run_takes_no_pack_of_another_model(
    pack: Pack, file: Path, folder: Path, run_here: Run
) -> None:
    """Of the same tokenizer and shape: the weights' digest alone tells."""
    write_pack(file, replace(pack, facts=replace(pack.facts, model_digest="0" * 64)))
    code, _, error = run_here("generate", "--plain", "--model", folder, "--document", file)
    assert code == 2 and "one.pack: was packed with another model than this one" in error


def test_settings_that_nobody_named_are_the_packs(file: Path) -> None:
    opened = OpenedPack.read(str(file), None, None)
    assert opened is not None
    public = with_pack_settings(Settings(), opened).public
    assert (public.policy, public.chat) == (PUBLIC.policy, "raw")
    named = Settings(public=PublicConfig(policy="full"))
    assert with_pack_settings(named, opened).public.policy == "full"
    with pytest.raises(BadInput, match="--context is a text, --document is one that was packed"):
        OpenedPack.read(str(file), None, None, "document.txt")
    with pytest.raises(BadInput, match="--pack-key opens a pack; give --document"):
        OpenedPack.read(None, file, None)


def test_auto_is_the_packs_policy(model: Model, pack: Pack, file: Path) -> None:
    """No other can serve it; it may reveal no more than auto may."""
    auto, own = PublicConfig(policy="auto"), Document(model, [], packed=pack.context)
    check_pack(pack, file, model.tokenizer, auto)
    with pytest.raises(PolicyError, match=r"packed with compact:keep=0\.4,counts=joint, which reveals more"):
        facts_of_model(own, auto)
    spec = "snapkv:cap=20"
    told = facts_of_model(replace(own, packed=replace(pack.context, spec=spec, counts=())), auto)
    assert told["policy"] == spec and told["policy_picked"] == f"picked policy {spec}, that of the pack"


# ------------------------------------------------------------------------------------------ several


def test_settings_of_several_are_the_first_ones_and_the_server_gets_all(file: Path) -> None:
    opened = OpenedPack.read_several([f"b={file}", "a=gone.pack"], None, None)
    assert opened is not None and opened.names == ("b", "a")
    assert opened.flags() == ["--document", f"b={file}", "--document", f"a={Path('gone.pack').absolute()}"]
    single = OpenedPack.read_several([str(file)], None, None)
    assert single is not None and single.names == () and single.flags() == ["--document", str(file)]
    assert OpenedPack.read_several([], None, None) is None


def test_a_server_opens_several_by_name(file: Path, folder: Path, model: Model) -> None:
    one = packed_documents(str(folder), [str(file)], PackLock(), PUBLIC)
    assert isinstance(one, Document) and one.length == 60 and one.tokens == []
    found = packed_documents(str(folder), [f"a.b={file}", f"C-1={file}"], PackLock(), PUBLIC)
    assert isinstance(found, Documents) and set(found.named) == {"a.b", "C-1"}
    assert found.of("a.b").model is found.of("C-1").model
    for name, words in (("none", "is not named at client; the server has C-1, a.b"), ("x", "is 'x' at")):
        with pytest.raises(MpcacheError, match=f"Mismatch: the document {words}"):
            found.of(name)
    for given, words in (
        ([f"a={file}", f"a={file}"], "the name comes twice"),
        ([f"a={file}", str(file)], "give one FILE, or NAME=FILE"),
        ([f"none={file}"], "a client that names no document says none"),
        ([f"{'a' * 65}={file}", f"b={file}"], "of up to 64 letters"),
    ):
        with pytest.raises(BadInput, match=words):
            packed_documents(str(folder), given, PackLock(), PUBLIC)


def test_the_plain_conversation_takes_a_pack(model: Model, pack: Pack, tokens: list[int]) -> None:
    from mpcache.sampling import Sampling

    answers = []
    for context in (tokens, pack.context):
        bound = bind_policy(model.shape, PUBLIC, 60, len(QUESTION))
        talk = PlainConversation(model, bound, context)
        answers.append(list(talk.ask(QUESTION, 4, Sampling(), ())))
    assert answers[0] == answers[1] and len(answers[0]) == 4
