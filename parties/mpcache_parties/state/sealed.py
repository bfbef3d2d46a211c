"""Seal files: only their owner can read them and nobody can change them unseen (AES-256-GCM).

A file is there as a whole or not at all.

A sealed file is a header in the clear and a body in chunks:

    b"mpcache" version | length of the header (4 bytes) | header, JSON | chunk | chunk | ... | last chunk

Every file has a key of its own, derived from the owner's key and a random salt in the header, so the
nonce of a chunk is its number and never comes twice. Header, number and "this is the last" are
authenticated with each chunk: a file that was cut, reordered, changed or renamed does not open.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpcache.errors import InUse, StateError

# 1: before the classes in a checkpoint took their names; 2: key trees under one key for ever; 3: before turns
VERSION = 4
MAGIC = b"mpcache" + bytes([VERSION])
KEY_BYTES = 32
SALT_BYTES = 32
TAG_BYTES = 16
CHUNK_BYTES = 4 << 20  # of plaintext
HEADER_BYTES = 64 << 10  # the longest header that a reader takes
# What a file system answers that does not know a call: FAT, FUSE, 9p and network file systems lack some.
LACKING = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR)
LOCK_FILE = "lock"  # locked in place of its folder where folders cannot be
PARTIAL = ".partial"  # the end of the name of a file that is being written


def load_key(file: Path, make: bool = True) -> bytes:
    """Read the owner's key; make one, from the operating system and for the owner alone, if there is none.

    make: whether one is made. Raises StateError on a key that others may read, or that is none.
    """
    if make:
        with suppress(FileExistsError), telling(f"{file}: no key can be written here"):
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
                new.write(os.urandom(KEY_BYTES))
                sync_as_it_can(new.fileno())
            _to_disk_folder(file.parent)
    with telling(f"{file}: this key cannot be read"), open(file, "rb") as old:
        others = os.fstat(old.fileno()).st_mode & 0o077
        key = old.read(KEY_BYTES + 1)
    if others:
        raise StateError(f"{file}: others may read this key; run `chmod 600 {file}`, or give another")
    if len(key) != KEY_BYTES:
        raise StateError(
            f"{file}: is not a key of {KEY_BYTES} bytes; give another, or remove it for a new one"
        )
    return key


def seal(file: Path, key: bytes, header: Mapping[str, Any], body: Iterable[bytes | memoryview]) -> int:
    """Seal a body; return its size on disk in bytes. Afterwards the file is there as a whole, on the disk.

    header: JSON values, readable by all. Raises StateError as `write_whole` does.
    """
    return write_whole(file, sealed_pieces(key, header, body))


def sealed_pieces(
    key: bytes, header: Mapping[str, Any], body: Iterable[bytes | memoryview]
) -> Iterator[bytes]:
    """Yield what stands in a sealed file, in order."""
    salt = os.urandom(SALT_BYTES)
    front = _front({**header, "salt": salt.hex()})
    aes = AESGCM(_derived(key, salt))
    yield front
    for number, (chunk, last) in enumerate(_chunks(body)):
        yield aes.encrypt(_nonce(number, last), chunk, front)


def write_whole(file: Path, pieces: Iterable[bytes]) -> int:
    """Write a file for its owner alone, as a whole; return its size in bytes.

    Raises StateError when it cannot be written (a full disk, no permission); nothing of it is left then, and
    an older file of that name is as it was.
    """
    size = 0
    partial = file.with_name(file.name + PARTIAL)
    try:
        with telling(f"{file}: cannot be written"):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as out:
                for piece in pieces:
                    _write_all(out.fileno(), piece)
                    size += len(piece)
                sync_as_it_can(out.fileno())
            os.rename(partial, file)
            _to_disk_folder(file.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    return size


def read_header(file: Path) -> dict[str, Any]:
    """Read what a sealed file says of itself. Not authenticated: `unseal` does that. Raises StateError."""
    with telling(f"{file}: cannot be read"), open(file, "rb") as source:
        return _read_front(source, file)[0]


def unseal(file: Path, key: bytes, expected: Mapping[str, Any]) -> bytearray:
    """Read the body of a sealed file whose header says what is expected.

    Raises StateError, which names the first header field that differs, or says that the file is
    damaged, was changed, or belongs to another key.
    """
    with telling(f"{file}: cannot be read"), open(file, "rb") as source:
        return unseal_stream(source, os.fstat(source.fileno()).st_size, file, key, expected)


def unseal_stream(
    source: BinaryIO, size: int, name: object, key: bytes, expected: Mapping[str, Any]
) -> bytearray:
    """Read the body of what was sealed, all `size` bytes, as `unseal` does. name: the file's, for errors."""
    header, front = _read_front(source, name)
    for field, value in expected.items():
        if header.get(field) != value:
            found = "nothing" if field not in header else f"{header[field]!r:.80}"
            raise StateError(f"{name}: its {field} is {found}, this party's is {value!r:.80}")
    try:
        salt = bytes.fromhex(header["salt"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(name) from None
    left = size - len(front)
    aes, body, number, last = AESGCM(_derived(key, salt)), bytearray(), 0, False
    while not last:
        sealed = source.read(min(left, CHUNK_BYTES + TAG_BYTES))
        left -= len(sealed)
        last = left <= 0 or not sealed
        try:
            body += aes.decrypt(_nonce(number, last), sealed, front)
        except (InvalidTag, ValueError):
            raise _damaged(name) from None
        number += 1
    return body


def clear_partial(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for file in folder.glob(f"*{PARTIAL}"):
        with suppress(OSError):
            file.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder for the owner alone. Raises StateError."""
    with telling(f"{folder}: no folder can be made here"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def lock(folder: Path, what: str) -> int:
    """Keep everybody else away from this folder as long as the returned descriptor is open.

    Everybody else: other processes, and other threads of this one, for each call opens the folder anew.
    Raises InUse if somebody is there already; `what`: what both want.
    """
    with telling(f"{folder}: cannot be used"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InUse(f"{folder}: another process uses {what}") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in LACKING:
                raise
            descriptor = _lock_file(folder, what)
    return descriptor


def _lock_file(folder: Path, what: str) -> int:
    """Lock a file in the folder: network file systems lock nothing that is not open for writing."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise InUse(f"{folder}: another process uses {what}") from None
        raise
    return descriptor


def to_disk(folder: Path) -> None:
    """Make names in this folder that were added, changed or removed stay so, whatever happens next."""
    with telling(f"{folder}: cannot be written"):
        _to_disk_folder(folder)


def sync_as_it_can(descriptor: int) -> None:
    """Bring a file or a folder to the disk, as far as its file system knows how."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING:
            raise


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn the system's errors into one line: what could not be done, why, and what to do."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; free some space, or give another folder" if full else ""
        raise StateError(f"{what}: {error.strerror or error}{advice}") from None


# ------------------------------------------------------------------------------------------- parts


def _front(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(dict(header), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes; at most {HEADER_BYTES} are read")
    return MAGIC + len(text).to_bytes(4, "little") + text


def _read_front(source: BinaryIO, file: object) -> tuple[dict[str, Any], bytes]:
    magic = source.read(len(MAGIC))
    if magic != MAGIC:
        if magic[:-1] == MAGIC[:-1] and len(magic) == len(MAGIC):
            raise StateError(
                f"{file}: is of format {magic[-1]}, which another release of mpcache wrote; "
                f"this release reads format {VERSION}"
            )
        raise StateError(f"{file}: is not a file that mpcache wrote")
    length = source.read(4)
    size = int.from_bytes(length, "little")
    text = source.read(size) if size <= HEADER_BYTES else b""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if len(length) < 4 or not isinstance(header, dict):
        raise _damaged(file)
    return header, magic + length + text


def _damaged(file: object) -> StateError:
    return StateError(f"{file}: is damaged, was changed, or was sealed with another key")


def _derived(key: bytes, salt: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=salt, info=b"mpcache sealed file").derive(key)


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "little") + bytes([last])


def _chunks(body: Iterable[bytes | memoryview]) -> Iterator[tuple[bytes, bool]]:
    """Yield the body in pieces of CHUNK_BYTES; the last one, shorter or empty, is marked."""
    room = bytearray()
    for part in body:
        view, start = memoryview(part), 0
        while start < len(view):
            if len(room) == CHUNK_BYTES:
                yield bytes(room), False
                room.clear()
            end = start + CHUNK_BYTES - len(room)
            room += view[start:end]
            start = end
    yield bytes(room), True


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _to_disk_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_as_it_can(descriptor)
    finally:
        os.close(descriptor)
