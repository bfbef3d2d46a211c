"""Randomness that hides a secret: AES-CTR keyed from the operating system's entropy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from threading import Thread
from types import ModuleType
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpcache.errors import Reuse
from mpcache.tensor_bytes import tensor_at
from mpcache.transport.link import Spec

SEED_BYTES = 32
_ZEROS = memoryview(bytes(1 << 18))  # what is encrypted: so much at once stays in the CPU's cache


def fresh_seed() -> bytes:
    """Take a new seed of 32 bytes from the operating system."""
    return os.urandom(SEED_BYTES)


def derive_key(seed: bytes, label: str) -> bytes:
    """Derive a 32-byte key for one purpose; different labels give independent keys (HKDF-SHA256)."""
    return HKDF(SHA256(), 32, salt=None, info=label.encode()).derive(seed)


class Tapes:
    """The key streams of one seed, each phase's given out once.

    Every key, mask and correlation comes from one of them, and a stream only moves forward: so nothing is
    used twice.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed, self._given = seed, set[str]()

    def begin(self, phase: str) -> KeyStream:
        """Give out the stream of a phase. Raises Reuse if it was begun before."""
        if phase in self._given:
            raise Reuse(f"the randomness of {phase} was used already; a phase runs once in a session")
        self._given.add(phase)
        return KeyStream(self._seed, f"tape/{phase}")


class CompiledLoops:
    """Load `mpcache.runtime.tree_loops` beside what runs: compiling it, once per machine, takes seconds."""

    def __init__(self) -> None:
        self.module: ModuleType | None = None
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin, if nobody has."""
        if self._thread is None:
            self._thread = Thread(target=self._load, name="compile", daemon=True)
            self._thread.start()

    def wait(self) -> ModuleType | None:
        """Return the loops, once they are there; None where this machine has none."""
        self.start()
        assert self._thread is not None
        self._thread.join()
        return self.module

    def _load(self) -> None:
        with suppress(ImportError):  # no numba, or no AES instructions
            self.module = import_module("mpcache.runtime.tree_loops")


COMPILED = CompiledLoops()


class TreeCipher:
    """AES under the public key of one session and phase: what that phase's key trees grow by.

    A key for ever would let one evaluation be compared with the trees of all sessions (Guo, Katz, Wang, Yu,
    S&P 2020). The dealer and both parties know the two names, so no byte travels for it. One party's own:
    it is not shared between threads.
    """

    def __init__(self, session: str, phase: str) -> None:
        self.key = derive_key(session.encode(), f"trees/{phase}")[:16]
        # Blocks are independent of each other, so the context is never reset.
        self._aes = Cipher(AES(self.key), ECB()).encryptor()
        COMPILED.start()
        self._rounds: Any = None

    @property
    def compiled(self) -> tuple[ModuleType, Any] | None:
        """Loops that grow the same trees with the CPU's own AES, and round keys; None without, or not yet."""
        loops = COMPILED.module
        if loops is not None and self._rounds is None:
            self._rounds = loops.round_keys(self.key)
        return None if loops is None else (loops, self._rounds)

    def encrypt(self, blocks: bytes) -> bytes:
        """Encrypt whole blocks of 16 bytes, each alone."""
        return self._aes.update(blocks)


class KeyStream:
    """The AES-256-CTR key stream of one (seed, label), read in order and never twice."""

    def __init__(self, seed: bytes, label: str, start: int = 0) -> None:
        """Stand before byte `start`."""
        self._key, self._at = derive_key(seed, label), start
        self._aes: Any = None  # once it is read, and again after `skip`

    def skip(self, n: int) -> None:
        """Go past the next n bytes, at no cost."""
        self._at, self._aes = self._at + n, None

    def read(self, n: int) -> bytearray:
        """Read the next n bytes."""
        stream = bytearray(n)
        self._cipher(n).update_into(stream, stream)  # of zeros
        return stream

    def fill(self, room: memoryview) -> None:
        """Read the next bytes into `room`."""
        aes = self._cipher(len(room))
        for start in range(0, len(room), len(_ZEROS)):
            part = room[start : start + len(_ZEROS)]
            aes.update_into(_ZEROS[: len(part)], part)

    def _cipher(self, n: int) -> Any:
        """Return what encrypts the next n bytes."""
        if self._aes is None:
            # The counter starts at zero: every key is derived for this one label and used once.
            counter = (self._at // 16).to_bytes(16, "big")
            self._aes = Cipher(AES(self._key), CTR(counter)).encryptor()
            self._aes.update(bytes(self._at % 16))
        self._at += n
        return self._aes

    def tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Read uniform integers over the whole range of `dtype`."""
        return tensor_at(self.read(math.prod(shape) * dtype.itemsize), dtype, shape)

    def tensors(self, specs: tuple[Spec, ...]) -> Iterator[torch.Tensor]:
        """Yield several tensors, one after another, as `tensor` reads them: small ones in one go."""
        starts, total = _places(specs)
        if not starts:
            for dtype, shape in specs:
                yield self.tensor(shape, dtype)
            return
        data = self.read(total)
        for (dtype, shape), start in zip(specs, starts, strict=True):
            yield tensor_at(data, dtype, shape, start)


_TOGETHER = 1 << 16  # bytes: tensors of one reading keep each other's memory


@lru_cache(maxsize=4096)  # a step draws the same ones again for every token
def _places(specs: tuple[Spec, ...]) -> tuple[tuple[int, ...], int]:
    """Return where each tensor begins in what is read for all, and the bytes; no place if that cannot be."""
    starts, end = list[int](), 0
    for dtype, shape in specs:
        if end % dtype.itemsize:
            return (), 0
        starts.append(end)
        end += math.prod(shape) * dtype.itemsize
    return (tuple(starts) if end <= _TOGETHER else (), end)
