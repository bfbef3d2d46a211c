"""Read the header of a GGUF file: its metadata, and where each tensor lies.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read here, and not by the `gguf`
package, because the file may be hostile: each length and count is compared with what is left of the file
before anything of that size is made, and a vocabulary takes a tenth of a second.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mpcache.errors import ModelError
from mpcache.model.checks import first_words, shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER = 256 << 20  # bytes; the largest vocabularies take a tenth
MOST_ITEMS = 1 << 22  # of one array
MOST_KEYS, MOST_TENSORS = 1 << 16, 1 << 18
LARGEST_ALIGNMENT = 1 << 20  # bytes

_SCALARS: Mapping[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place. size: outermost dimension first; start, length: bytes of the file."""

    name: str
    kind: GGMLQuantizationType
    size: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class GgufHeader:
    """metadata: numbers, texts, flags, lists of texts, and arrays of numbers; tensors: by name."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


class _Damaged(Exception):
    """What is wrong with the file."""


def read_gguf_header(file: Path) -> GgufHeader:
    """Read a .gguf file's header. Raises ModelError."""
    try:
        with file.open("rb") as opened:
            if opened.read(4) != MAGIC:
                raise ModelError(f"{file}: is no GGUF file; its first four bytes are not GGUF")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _parse(file, mapped)
    except _Damaged as error:
        raise ModelError(f"{file}: {error}; the file is damaged: copy it again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {first_words(error)}") from error


def _parse(file: Path, mapped: mmap.mmap) -> GgufHeader:
    whole = len(mapped)
    cursor = _Cursor(mapped, len(MAGIC), min(whole, LARGEST_HEADER))
    version = cursor.number("I")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise ModelError(
            f"{file}: GGUF version {version} is not supported; supported: {known}, little-endian"
        )
    tensors, keys = cursor.count("tensors", MOST_TENSORS), cursor.count("keys", MOST_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text()
        if name in metadata:
            raise _Damaged(f"key {shorten(name)} is there twice")
        metadata[name] = cursor.value(cursor.kind())
    described = [_described(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {shorten(alignment)}, not a power of two")
    data = -(-cursor.place // alignment) * alignment
    found: dict[str, StoredTensor] = {}
    for name, size, kind, offset in described:
        if name in found:
            raise _Damaged(f"tensor {shorten(name)} is there twice")
        found[name] = _placed(name, size, kind, offset, data, alignment, whole)
    return GgufHeader(file, metadata, found)


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read a tensor's name, its size, the number of its type, and its offset."""
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= 4:
        raise _Damaged(f"tensor {shorten(name)} has {dimensions} dimensions")
    size = tuple(cursor.number("Q") for _ in range(dimensions))
    return name, size[::-1], cursor.number("I"), cursor.number("Q")


def _placed(
    name: str, size: tuple[int, ...], number: int, offset: int, data: int, alignment: int, whole: int
) -> StoredTensor:
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _Damaged(f"tensor {shorten(name)} is of type {number}, which is none") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    count = 1
    for length in size:
        count *= length
    if count == 0 or size[-1] % block:
        raise _Damaged(f"tensor {shorten(name)} has size {shorten(size)}, which {kind.name} cannot have")
    length = count // block * block_bytes
    if offset % alignment or data + offset + length > whole:
        raise _Damaged(f"tensor {shorten(name)} lies beyond the end of the file")
    return StoredTensor(name, kind, size, data + offset, length)


class _Cursor:
    """Reads one value after the other from `data`, up to `end`. Raises _Damaged there."""

    def __init__(self, data: mmap.mmap, place: int, end: int) -> None:
        self._data, self.place, self._end = data, place, end

    def take(self, length: int) -> bytes:
        end = self.place + length
        if end > self._end:
            raise _Damaged(f"its header ends within a value of {length} bytes")
        taken = self._data[self.place : end]
        self.place = end
        return taken

    def number(self, code: str) -> Any:
        code = f"<{code}"
        (value,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return value

    def count(self, what: str, most: int) -> int:
        value: int = self.number("Q")
        if value > most:
            raise _Damaged(f"it counts {value} {what}; at most {most} are possible")
        return value

    def kind(self) -> GGUFValueType:
        number = self.number("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _Damaged(f"a value is of type {number}, which is none") from None

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("a text in its header is not UTF-8") from None

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        of, items = self.kind(), self.count("items of an array", MOST_ITEMS)
        if of == GGUFValueType.STRING:
            return [self.text() for _ in range(items)]
        if of not in _SCALARS:
            raise _Damaged("it holds an array of arrays")
        numbers = np.dtype(f"<{_SCALARS[of]}")
        return np.frombuffer(self.take(items * numbers.itemsize), numbers)
