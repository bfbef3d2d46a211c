"""Everything that reads what others wrote, as functions of bytes, with valid inputs to damage.

A target returns, or raises an MpcacheError of one printable line. Anything else is a finding.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
import yaml
from google.protobuf.message import DecodeError
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mpcache.cache import Cache, LayerCache
from mpcache.certificates import Identity, make_identity
from mpcache.config import PublicConfig, Settings, load_settings
from mpcache.console.inputs import read_text
from mpcache.cost.quality_file import read_quality
from mpcache.errors import MpcacheError
from mpcache.ledger import Ledger
from mpcache.limits import bind_policy
from mpcache.model import load_model, load_shape
from mpcache.model.families import shape_from_config
from mpcache.model.tokenizer import Tokenizer
from mpcache.phases import ChunkPlace
from mpcache.policy import parse_policy
from mpcache.policy.layer_view import Kept, PackedContext
from mpcache.rank import Rank
from mpcache.runtime.shares import MaskedOperand, Share
from mpcache.transport.frames import FrameLink
from mpcache.transport.link import Hello
from mpcache.transport.local import local_pair
from mpcache_parties.client_pace import hear_more
from mpcache_parties.facts import facts_of
from mpcache_parties.handshake import PROTOCOL_VERSION, compare_hellos
from mpcache_parties.public_texts import read_tokenizer, receive_tokenizer
from mpcache_parties.state import sealed, snapshot
from mpcache_parties.state.packs import Pack, PackFacts, bind_packed, read_pack, write_pack
from mpcache_protos import party_pb2 as pb
from tests.fuzz.chats import chats
from tests.fuzz.gguf_files import gguf_files
from tests.fuzz.kept import resumes, tapes
from tests.fuzz.mutate import damaged, replaced
from tests.fuzz.wire import wires

Make = Callable[[random.Random], bytes]
LONGEST_LINE = 2500  # characters of an error


@dataclass(frozen=True)
class Target:
    """run: reads one case.  make: the next case.  share: of all cases.  whole: an undamaged one."""

    run: Callable[[bytes], None]
    make: Make
    share: int
    whole: bytes


def check_line(error: MpcacheError) -> None:
    """What a person or a peer gets to see of an error: short, and nothing that steers a terminal."""
    line = " ".join(str(error).split())
    assert line and len(line) <= LONGEST_LINE, f"an error of {len(line)} characters: {line[:200]}"
    assert line.isprintable(), f"an error with unprintable characters: {line!r:.300}"


def targets(folder: Path) -> dict[str, Target]:
    """All targets; `folder` is theirs to write to."""
    from tests.support.tiny_models import make, save

    model = save(make("llama-gqa"), folder / "model")
    learned = save(make("gpt2-gelu"), folder / "learned")
    found: dict[str, Target] = {}

    def bytes_of(
        name: str, share: int, run: Callable[[bytes], None], seeds: Sequence[bytes], whole: bytes = b""
    ) -> None:
        def make(rng: random.Random) -> bytes:
            return damaged(rng, rng.choice(seeds), seeds)

        found[name] = Target(run, make, share, whole or seeds[0])

    def json_of(name: str, share: int, run: Callable[[bytes], None], seeds: Sequence[Any]) -> None:
        texts = [json.dumps(seed).encode() for seed in seeds]

        def make(rng: random.Random) -> bytes:
            if rng.random() < 0.3:
                return damaged(rng, rng.choice(texts), texts)
            return json.dumps(replaced(rng, rng.choice(seeds))).encode()

        found[name] = Target(run, make, share, texts[0])

    _files(folder, model, learned, bytes_of, json_of)
    _messages(model, bytes_of, json_of)

    def made(name: str, share: int, run: Callable[[bytes], None], make: Make, whole: bytes) -> None:
        found[name] = Target(run, make, share, whole)

    chats(bytes_of, json_of, made)
    gguf_files(folder, bytes_of, json_of)
    tapes(folder, bytes_of, json_of)
    resumes(folder, made)
    wires(folder, made)
    return found


def _files(folder: Path, model: Path, learned: Path, bytes_of: Any, json_of: Any) -> None:
    """What a party reads from its own disk."""
    place = folder / "damaged"
    place.mkdir()

    def copy(source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, place / name))

    own, other = copy(model, "own"), copy(learned, "learned")
    configs = [json.loads((m / "config.json").read_text()) for m in (model, learned)]

    def config(data: bytes) -> None:
        (own / "config.json").write_bytes(data)
        shape = load_shape(own)
        bind_policy(shape, PublicConfig(policy="mpcache:n_keep=0.5", max_new_tokens=4), 40, 4)

    json_of("config.json", 14, config, configs)

    def whole(data: bytes) -> None:
        (other / "config.json").write_bytes(data)
        load_model(other)

    json_of("config.json of a model", 2, whole, [configs[1]])

    weights = (model / "model.safetensors").read_bytes()
    header = int.from_bytes(weights[:8], "little") + 8
    names = json.loads(weights[8:header])
    damaged_model, largest = copy(model, "weights"), 1 << 15

    def tensors(data: bytes) -> None:
        (damaged_model / "model.safetensors").write_bytes(data)
        load_model(damaged_model)

    pieces = [weights[: header + largest], weights[:header], weights[:200]]
    bytes_of("safetensors", 4, tensors, pieces, whole=weights)

    def names_of(data: bytes) -> None:
        tensors(len(data).to_bytes(8, "little") + data + weights[header:])

    json_of("safetensors header", 4, names_of, [names])

    sharded = copy(model, "sharded")
    (sharded / "model.safetensors").rename(sharded / "part-1.safetensors")
    index = {"metadata": {}, "weight_map": {name: "part-1.safetensors" for name in list(names)[:9]}}

    def shards(data: bytes) -> None:
        (sharded / "model.safetensors.index.json").write_bytes(data)
        load_model(sharded)

    json_of("safetensors index", 2, shards, [index])

    spoken = copy(model, "tokenizer")
    vocabularies = [json.loads((model / "tokenizer.json").read_text()), *map(json.loads, _vocabularies())]

    def tokenizer(data: bytes) -> None:
        (spoken / "tokenizer.json").write_bytes(data)
        _speak(Tokenizer.load(spoken, 300, 1))

    json_of("tokenizer.json", 8, tokenizer, vocabularies)

    file = place / "text"
    plain = Tokenizer.load(model, 300, 1)

    def text(data: bytes) -> None:
        file.write_bytes(data)
        plain.encode(read_text(file), bos=True)

    bytes_of("document", 8, text, ["the gate of the city. α β 漢字 🙂\n".encode() * 3, b"the gate"])

    def settings(data: bytes) -> None:
        file.write_bytes(data)
        load_settings(file, {"public.policy": None})

    sections = Settings().model_dump()
    written = yaml.safe_dump(sections).encode()
    bytes_of("party config", 5, settings, [written, b"public: {policy: full}\n", BOMB])
    json_of("party config values", 5, settings, [sections])

    _kept(place, bytes_of, json_of)
    shape = shape_from_config(configs[0])
    specs = ("mpcache:n_keep=0.5,coarse=16,fine=8,coarse_keep=0.5,share=0-1", "quest:page=4,pages=2",
             "streaming:sink=2,recent=5", "snapkv:cap=8,queries=3,pool=3", "h2o:heavy=4,recent=3",
             "tova:cap=6", "mpcache:n_keep=10/20/30,alpha=0.3,score=bound,threshold=0.1")  # fmt: skip

    def policy(data: bytes) -> None:
        spec = data.decode("utf-8", "surrogateescape")
        public = load_settings(None, {"public.policy": spec, "public.max_new_tokens": 4}).public
        bind_policy(shape, public, 60, 4)
        parse_policy(spec)

    bytes_of("policy", 10, policy, [spec.encode() for spec in specs])


def _vocabularies() -> list[str]:
    """Tokenizers of the other kinds that models come with."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("▁the", -1.0), ("a", -2.0)]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Lowercase()]
    )
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    parts = {"[UNK]": 0, "[CLS]": 1, "gate": 2, "##s": 3}
    words = tokenizers.Tokenizer(models.WordPiece(parts, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    words.enable_padding(length=8)
    words.enable_truncation(6)
    return [unigram.to_str(), words.to_str()]


def _kept(place: Path, bytes_of: Any, json_of: Any) -> None:
    """What a party, or a run of another command, left on the disk."""
    file, key = place / "kept", bytes(32)
    sealed.seal(file, key, {"step": 1}, [b"x" * 500])

    def state(data: bytes) -> None:
        file.write_bytes(data)
        sealed.read_header(file)
        sealed.unseal(file, key, {"step": 1})

    bytes_of("checkpoint", 6, state, [file.read_bytes()])
    share = Share(torch.arange(6).reshape(2, 3), 16, Rank.SERVER)
    k, v = cast(Any, MaskedOperand(share.data, share.data, 16)), cast(Any, share)
    layer = LayerCache(k, v, None)
    tree = {
        "cache": Cache([layer], 7),
        "words": ["x", 1, 2.5, None],
        "bytes": torch.ones(5, dtype=torch.uint8),
    }

    def content(data: bytes) -> None:
        snapshot.deserialize(bytearray(data))

    bytes_of("checkpoint's content", 6, content, [b"".join(snapshot.serialize(tree))])

    shape = shape_from_config(json.loads((place / "own" / "config.json").read_text()))
    rows, ones = (shape.kv_heads, 3, shape.head_dim), (1.0,) * shape.layers
    layers = tuple((Kept(torch.arange(3), torch.ones(rows), torch.ones(rows)),) for _ in ones)
    context = PackedContext(9, "streaming:sink=1,recent=2", (), layers, ones, ones)
    about = PackFacts("0" * 64, "0" * 64, "none", "raw", "reference", "source")
    write_pack(file, Pack(about, context))

    def pack(data: bytes) -> None:
        file.write_bytes(data)
        bind_packed(read_pack(file).context, shape, file)

    bytes_of("pack", 6, pack, [file.read_bytes()])

    own = make_identity(Rank.SERVER)
    keys = own.write(place / "keys")
    for path, good in zip(keys, (own.key, own.certificate), strict=True):

        def identity(data: bytes, path: Path = path, good: bytes = good) -> None:
            try:
                path.write_bytes(data)
                Identity.read(place / "keys", Rank.SERVER)
            finally:
                path.write_bytes(good)

        # Damaged as text, and inside of its armour, where the encoding itself gets it.
        lines = good.decode().splitlines()

        def inside(data: bytes, lines: list[str] = lines, run: Any = identity) -> None:
            run("\n".join((lines[0], base64.b64encode(data).decode(), lines[-1], "")).encode())

        bytes_of(path.suffix, 3, identity, [good])
        bytes_of(f"{path.suffix}, inside", 3, inside, [base64.b64decode("".join(lines[1:-1]))])

    def quality(data: bytes) -> None:
        file.write_bytes(data)
        read_quality(file)

    row = {
        "policy": "mpcache",
        "task": "needle",
        "accuracy": 0.5,
        "context": 880,
        "budget": 25,
        "question": "-",
    }
    json_of("quality", 4, quality, [{"rows": [row, row]}])


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (b, b, *([b - 1] * 9)) for b in range(98, 106)
)


def _speak(tokenizer: Tokenizer) -> None:
    """What a party does with a tokenizer that it was given."""
    ids = tokenizer.encode("the gate of <s> 漢字", bos=True)
    stream = tokenizer.stream()
    for token in [*ids[:8], 0, 5, 299]:
        stream.push(token)
    stream.end()


def _messages(model: Path, bytes_of: Any, json_of: Any) -> None:
    """What a party gets from its peers."""
    loaded = load_model(model)
    hello = Hello(PROTOCOL_VERSION, Rank.CLIENT, "00ff", PublicConfig().flat())
    mine = Hello(PROTOCOL_VERSION, Rank.SERVER, "11", hello.public)
    words, bits = torch.arange(24).reshape(4, 6), torch.ones(7, dtype=torch.uint8)
    specs = [(torch.int64, (4, 6)), (torch.uint8, (7,))]
    conversation = _frames(
        lambda link: link.send_hello(hello),
        lambda link: link.send_facts("facts", {"question_tokens": 3}),
        lambda link: link.send("layer0/select", [words, bits]),
        lambda link: link.send_facts("more/decode1", {"more": True}),
        lambda link: link.close(),
    )

    def stream(data: bytes) -> None:
        """Frames, each with its length before it, through the program that expects this conversation."""
        link, _ = local_pair(Ledger(), Ledger(), timeout=0.01)
        offset = 0
        while offset < len(data):
            size = int.from_bytes(data[offset : offset + 2], "little")
            if not link.arrived(data[offset + 2 : offset + 2 + size]):
                break
            offset += 2 + size
        compare_hellos(mine, link.recv_hello(), Rank.CLIENT)
        link.recv_facts("facts")
        link.recv("layer0/select", specs)
        hear_more(link, ChunkPlace(1, 1))

    joined = b"".join(len(f).to_bytes(2, "little") + f for f in conversation)
    bytes_of("frames", 22, stream, [joined])

    def one(data: bytes) -> None:
        """A single message where tensors are expected, whatever it says of its sizes."""
        link, _ = local_pair(Ledger(), Ledger(), timeout=0.01)
        link.arrived(data)
        link.recv("layer0/select", specs)

    extreme = [pb.Frame(tensors=pb.Tensors(step="layer0/select", sequence=s, layout=t, offset=o, data=d))
               for s in (0, 2**64 - 1) for o in (0, 2**63) for d in (b"", b"x" * 300)
               for t in ("int64(4, 6) uint8(7,)", f"int64({2**62}, 6)", "")]  # fmt: skip
    (plain,) = _frames(lambda link: link.send("layer0/select", [words, bits]))
    bytes_of("tensors", 10, one, [f.SerializeToString() for f in extreme], whole=plain)

    def introduction(data: bytes) -> None:
        try:
            tree = json.loads(data)
            said = pb.Hello(**tree) if isinstance(tree, dict) else pb.Hello()
        except (ValueError, TypeError, DecodeError, RecursionError):
            return  # no such message can be written
        link, _ = local_pair(Ledger(), Ledger(), timeout=0.01)
        link.arrived(pb.Frame(hello=said).SerializeToString())
        compare_hellos(mine, link.recv_hello(), Rank.CLIENT)

    json_of(
        "hello",
        4,
        introduction,
        [{"version": PROTOCOL_VERSION, "rank": 1, "nonce": "0", "public": dict(hello.public)}],
    )

    facts = {
        "shape": loaded.shape.to_dict(), "model_digest": loaded.digest, "tokenizer_bytes": 1000,
        "tokenizer_digest": "00", "context_tokens": 40, "kernels": "cpu", "question_tokens": 4,
        "new_tokens": 4, "private_tokens": 0,
    }  # fmt: skip

    def public(data: bytes) -> None:
        _, link = local_pair(Ledger(), Ledger(), timeout=0.01)
        message = pb.Facts(step="facts/model", json=data.decode("utf-8", "replace"))
        link.arrived(pb.Frame(facts=message).SerializeToString())
        said = link.recv_facts("facts/model")
        config = PublicConfig(policy="mpcache:n_keep=0.5", max_new_tokens=4)
        facts_of({"model": said, "question": said}, config)

    json_of("facts", 12, public, [facts])

    vocabulary = (model / "tokenizer.json").read_bytes()

    def given(data: bytes) -> None:
        sender, link = local_pair(Ledger(), Ledger(), timeout=0.01)
        sender.send("facts/tokenizer", [torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)])
        taken = receive_tokenizer(link, facts | {"tokenizer_bytes": max(1, len(data))})
        _speak(read_tokenizer(taken.numpy().tobytes(), loaded.shape))

    bytes_of("tokenizer from the server", 4, given, [vocabulary])


def _frames(*steps: Callable[[FrameLink], None]) -> list[bytes]:
    """The frames that a link sends by these calls."""
    link, other = local_pair(Ledger(), Ledger(), Rank.CLIENT, Rank.SERVER, 0.01)
    frames: list[bytes] = []

    def keep(data: bytes) -> bool:
        frames.append(data)
        return True

    other.arrived = keep  # type: ignore[method-assign]
    for step in steps:
        step(link)
    return frames
