"""Keep what stays of a document in a file: read and evicted once, opened as often as it is served.

A pack is a safetensors file, of tensors by layer, part and name and one JSON text in its metadata, or these
bytes sealed (`mpcache_parties.state.sealed`): under a key of 32 bytes, or under one that scrypt makes of a
passphrase. Values and keys of a cache tell what the document says: a plain pack is as private as its text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from safetensors import SafetensorError
from safetensors.torch import load, save

from mpcache.errors import PolicyError, StateError, TextError
from mpcache.model import ModelShape
from mpcache.policy import BoundPolicy, Plan, parse_policy
from mpcache.policy.layer_view import Kept, PackedContext
from mpcache.policy.plan import SplitPlan
from mpcache_parties.state import sealed

FORMAT = 1
KIND = "mpcache-pack"
LENGTH_BYTES = 8  # of a safetensors header
LARGEST_HEADER = 64 << 20  # bytes
LARGEST_PASSPHRASE = 1024  # bytes
SHORTEST_PASSPHRASE = 8  # characters
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 17, 8, 1  # 128 MiB, and a good part of a second
NAMES = ("rows", "k", "v", "bias")


@dataclass(frozen=True)
class PackLock:
    """What a pack is sealed with, as files: a key, or a passphrase; neither: it is not."""

    key: Path | None = None
    passphrase: Path | None = None

    def check(self) -> None:
        """Raise TextError where both are given."""
        if self.key is not None and self.passphrase is not None:
            raise TextError("--pack-key and --pack-passphrase: give one of them", private=False)

    @property
    def kind(self) -> str:
        """What it is called in a sealed file's header."""
        return "key" if self.key is not None else "passphrase" if self.passphrase is not None else ""

    def flags(self) -> list[str]:
        """Return it as a party's flags."""
        given = {"--pack-key": self.key, "--pack-passphrase": self.passphrase}
        return [part for flag, file in given.items() if file is not None for part in (flag, str(file))]

    def key_bytes(self, salt: bytes, make: bool) -> bytes:
        """Return the key; make: a key file that is not there is made. Raises StateError."""
        if self.key is not None:
            return sealed.load_key(self.key, make)
        assert self.passphrase is not None
        return Scrypt(salt, sealed.KEY_BYTES, SCRYPT_N, SCRYPT_R, SCRYPT_P).derive(
            _passphrase(self.passphrase)
        )


OPEN = PackLock()


@dataclass(frozen=True)
class PackFacts:
    """What a pack says of where it comes from.

    framing: "raw", or where the chat template found the document.  kernels: what it was read with.
    release: of mpcache.  The digests are of what a session compares, too.
    """

    model_digest: str
    tokenizer_digest: str
    template_digest: str
    framing: str
    kernels: str
    release: str


@dataclass(frozen=True)
class Pack:
    """A document that was read and evicted before. written: there is a document, beside the template."""

    facts: PackFacts
    context: PackedContext
    written: bool = True


def is_pack(file: Path) -> bool:
    """Whether this file is a pack and no text, by its first bytes."""
    try:
        with file.open("rb") as opened:
            first = opened.read(LENGTH_BYTES + 1)
    except OSError:
        return False
    size = int.from_bytes(first[:LENGTH_BYTES], "little")
    plain = len(first) > LENGTH_BYTES and first[-1:] == b"{" and size <= LARGEST_HEADER
    return plain or first.startswith(sealed.MAGIC[:-1])


# ----------------------------------------------------------------------------------------- written


def write_pack(file: Path, pack: Pack, lock: PackLock = OPEN) -> int:
    """Write a pack for its owner alone; return its bytes. Raises StateError where it cannot be written."""
    tensors = {
        f"{i}.{j}.{name}": tensor.cpu().contiguous()
        for i, parts in enumerate(pack.context.layers)
        for j, kept in enumerate(parts)
        for name in NAMES
        if (tensor := getattr(kept, name)) is not None
    }
    known = asdict(pack.facts) | {"written": pack.written, "format": FORMAT}
    known |= {name: getattr(pack.context, name) for name in _TOLD}
    known["digest"] = _digest_of(tensors, known)
    body = save(tensors, {KIND: json.dumps(known, allow_nan=False)})
    if not lock.kind:
        return sealed.write_whole(file, [body])
    salt = os.urandom(sealed.SALT_BYTES)
    header = {"kind": KIND, "lock": lock.kind, "lock_salt": salt.hex()}
    return sealed.seal(file, lock.key_bytes(salt, make=True), header, [body])


_TOLD = ("length", "spec", "counts", "largest_scores", "largest_values")


def _digest_of(tensors: Mapping[str, torch.Tensor], known: Mapping[str, Any]) -> str:
    """Digest tensors, and all that is said of them but the digest itself."""
    told = {name: value for name, value in known.items() if name != "digest"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -------------------------------------------------------------------------------------------- read


def read_pack(file: Path, lock: PackLock = OPEN) -> Pack:
    """Read a pack that is whole in itself; `check_pack` says whether it fits a model.

    Raises TextError: it is none, damaged, of another release, or sealed with something else.
    """
    lock.check()
    body = _body(file, lock)
    with _told_as_damage(file):
        known = _metadata(body, file)
        tensors = load(body)
        if _digest_of(tensors, known) != known["digest"]:
            raise ValueError("it is not what was written")
        facts = PackFacts(**{f.name: _text(known[f.name]) for f in fields(PackFacts)})
        context = PackedContext(
            _count(known["length"]), _text(known["spec"]), tuple(map(_count, known["counts"])),
            _layers(tensors), _sizes(known["largest_scores"]), _sizes(known["largest_values"]),
        )  # fmt: skip
        return Pack(facts, context, known["written"] is True)


def _body(file: Path, lock: PackLock) -> bytes:
    """Return a pack's bytes, unsealed."""
    if not is_pack(file):
        with sealed_errors(), sealed.telling(f"{file}: cannot be read"):
            file.open("rb").close()
        raise TextError(f"{file}: is not a pack; make one with `mpcache pack`")
    with sealed_errors():
        with sealed.telling(f"{file}: cannot be read"), file.open("rb") as opened:
            if opened.read(len(sealed.MAGIC) - 1) != sealed.MAGIC[:-1]:
                if lock.kind:
                    raise TextError(f"{file}: is not sealed; leave --pack-{lock.kind} out")
                opened.seek(0)
                return opened.read()
        header = sealed.read_header(file)
        if header.get("kind") != KIND:
            raise TextError(f"{file}: is another of mpcache's files, not a pack")
        if header.get("lock") != lock.kind:
            given = f"--pack-{lock.kind} does not open it" if lock.kind else "it is sealed"
            wanted = "passphrase" if header.get("lock") == "passphrase" else "key"
            raise TextError(f"{file}: {given}; give --pack-{wanted} FILE")
        salt = header.get("lock_salt")
        if not isinstance(salt, str) or len(salt) != 2 * sealed.SALT_BYTES or not salt.isalnum():
            raise TextError(f"{file}: is damaged; pack the document anew")
        try:
            key = lock.key_bytes(bytes.fromhex(salt), make=False)
        except ValueError:
            raise TextError(f"{file}: is damaged; pack the document anew") from None
        return bytes(sealed.unseal(file, key, {"kind": KIND}))


@contextmanager
def sealed_errors() -> Iterator[None]:
    """Tell what is wrong with a sealed file as it is told of any document."""
    try:
        yield
    except StateError as error:
        raise TextError(str(error)) from None


@contextmanager
def _told_as_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (
        SafetensorError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
        OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise TextError(
            f"{file}: is damaged, or no pack of this release ({type(error).__name__}); pack the document anew"
        ) from None


def _metadata(body: bytes, file: Path) -> dict[str, Any]:
    """Read the JSON text in a safetensors header. Raises TextError for a pack of another format."""
    size = int.from_bytes(body[:LENGTH_BYTES], "little")
    if size > LARGEST_HEADER:
        raise ValueError("a header that is too large")
    header = json.loads(body[LENGTH_BYTES : LENGTH_BYTES + size])
    found = header.get("__metadata__", {}).get(KIND)
    if found is None:
        raise TextError(f"{file}: is a safetensors file, and not a pack; make one with `mpcache pack`")
    known = json.loads(found)
    if known["format"] != FORMAT:
        raise TextError(
            f"{file}: is a pack of format {known['format']!r:.20}, which another release of mpcache wrote; "
            f"this one reads format {FORMAT}: pack the document anew"
        )
    return dict(known)


def _layers(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[Kept, ...], ...]:
    """Arrange tensors by layer and part. Raises ValueError on names, types or numbers that none has."""
    found: dict[int, dict[int, dict[str, torch.Tensor]]] = {}
    for full, tensor in tensors.items():
        layer, part, name = full.split(".")
        if name not in NAMES or tensor.dtype is not (torch.int64 if name == "rows" else torch.float32):
            raise ValueError(full)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{full} is not finite")
        found.setdefault(int(layer), {}).setdefault(int(part), {})[name] = tensor
    return tuple(tuple(Kept(**found[i][j]) for j in range(len(found[i]))) for i in range(len(found)))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("not a count")
    return value


def _sizes(values: Any) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if not all(math.isfinite(value) and value >= 0 for value in found):
        raise ValueError("not sizes")
    return found


def _passphrase(file: Path) -> bytes:
    """Read a passphrase, a line that its owner alone may read. Raises StateError."""
    with sealed.telling(f"{file}: this passphrase cannot be read"), file.open("rb") as opened:
        others = os.fstat(opened.fileno()).st_mode & 0o077
        found = opened.read(LARGEST_PASSPHRASE + 1).strip()
    if others:
        raise StateError(f"{file}: others may read this passphrase; run `chmod 600 {file}`")
    if not SHORTEST_PASSPHRASE <= len(found) <= LARGEST_PASSPHRASE:
        raise StateError(
            f"{file}: a passphrase has {SHORTEST_PASSPHRASE} to {LARGEST_PASSPHRASE} characters; this one "
            f"has {len(found)}"
        )
    return found


# ------------------------------------------------------------------------------------------- fitting


def bind_packed(context: PackedContext, shape: ModelShape, file: Path) -> BoundPolicy:
    """Bind a pack's policy to a model, and check that each layer holds what is planned. Raises TextError."""
    if not 0 < context.length <= shape.max_positions:
        raise TextError(f"{file}: is of {context.length} tokens, the model allows {shape.max_positions}")
    try:
        policy = parse_policy(context.spec)
        bound = policy.bind(context.length, shape)
        if not bound.plan_is_public:
            bound = bound.with_counts(context.counts, shape)
        bound.check_packs()
    except (PolicyError, ValueError) as error:
        raise TextError(f"{file}: its policy {context.spec:.80} does not fit here: {error}") from None
    most = bound.policy.largest_bias
    wanted, found = _sizes_wanted(bound.plan, shape, most > 0), _sizes_found(context)
    if len(found) != len(wanted) or not len(context.largest_scores) == len(context.largest_values) == len(
        found
    ):
        raise TextError(f"{file}: does not hold the model's {len(wanted)} layers; pack the document anew")
    for i, (mine, theirs) in enumerate(zip(wanted, found, strict=True)):
        if mine != theirs:
            raise TextError(f"{file}: layer {i} does not hold what its plan keeps; pack the document anew")
    for i, parts in enumerate(context.layers):
        for kept in parts:
            beyond = kept.bias is not None and bool((kept.bias.abs() > most + 1e-4).any())
            rows = kept.rows.reshape(-1)
            if beyond or int(rows.min()) < 0 or int(rows.max()) >= context.length:
                raise TextError(f"{file}: layer {i} holds what no document leaves; pack the document anew")
    return bound


def _sizes_wanted(plan: Plan, shape: ModelShape, biased: bool) -> list[list[tuple[object, ...]]]:
    every = []
    for layer in plan.layers:
        parts = [(shape.kv_heads, layer.kept)]
        if isinstance(layer, SplitPlan):
            parts = [(len(heads), part.kept) for heads, part in zip(layer.heads, layer.parts, strict=True)]
        every.append([_sizes_of(kv, n, shape.head_dim, biased) for kv, n in parts])
    return every


def _sizes_of(kv: int, n: int, d: int, biased: bool) -> tuple[object, ...]:
    return (kv, n, d), (kv, n, d), (kv, n) if biased else None, n


def _sizes_found(context: PackedContext) -> list[list[tuple[object, ...]]]:
    def found(kept: Kept) -> tuple[object, ...]:
        bias = None if kept.bias is None else tuple(kept.bias.shape)
        heads = kept.rows.dim() == 1 or kept.rows.shape[0] == kept.k.shape[0]
        return tuple(kept.k.shape), tuple(kept.v.shape), bias, kept.rows.shape[-1] if heads else None

    return [[found(kept) for kept in parts] for parts in context.layers]
