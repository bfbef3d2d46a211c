"""Read the tensors of a GGUF file, dequantised one at a time from the mapped file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from mpcache.errors import ModelError
from mpcache.model.checks import first_words, shorten
from mpcache.model.gguf_header import GgufHeader, StoredTensor
from mpcache.model.tensor_files import finite

# What is dequantised, in the order in which an error lists it.
READABLE = tuple(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "F64", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K",
                 "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
)  # fmt: skip


class GgufTensors:
    """The tensors of a file by name, each checked and digested as it is read.

    digest: takes what is read, as stored.  read_before: tensors that need not be read.
    """

    def __init__(
        self, header: GgufHeader, digest: Callable[[Any], None], read_before: Collection[str] = ()
    ) -> None:
        """Take what the header says; the file is read later."""
        self._header, self._digest = header, digest
        self._unread = set(header.tensors) - set(read_before)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        return name in self._header.tensors

    def read(self, name: str, *size: int) -> Tensor:
        """Read the tensor `name` of exactly this size, as float32.

        Raises ModelError when it is missing, of another size or type, or not finite.
        """
        file, stored = self._header.file, self._header.tensors.get(name)
        if stored is None:
            raise ModelError(f"{file}: tensor {name} is missing; the file is no whole model")
        if stored.size != size:
            raise ModelError(f"{file}: tensor {name} is {stored.size}, its metadata make it {size}")
        if stored.kind not in READABLE:
            known = ", ".join(kind.name for kind in READABLE)
            raise ModelError(f"{file}: tensor {name} is {stored.kind.name}; supported: {known}")
        self._unread.discard(name)
        try:  # mapped each time: what stays mapped counts as memory
            whole = np.memmap(file, np.uint8, "r").view(np.ndarray)  # whose slices cost less
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read: {first_words(error)}") from error
        raw = whole[stored.start : stored.start + stored.length]
        if len(raw) < stored.length:
            raise ModelError(f"{file}: has become shorter while it was read; copy it again")
        self._digest(f"{name} {size} {stored.kind.name}\n".encode())
        self._digest(raw)
        return finite(_floats(raw, stored), file, name)

    def check_all_read(self) -> None:
        """Raise ModelError where the file holds a tensor that nobody asked for: the model computes more."""
        if self._unread:
            raise ModelError(
                f"{self._header.file}: holds tensor {shorten(min(self._unread))}, which a model of this "
                "architecture does not have; it is not supported"
            )


def _floats(raw: np.ndarray[Any, Any], stored: StoredTensor) -> Tensor:
    """Dequantise the bytes of one tensor."""
    if stored.kind == GGMLQuantizationType.F32:
        found = np.array(raw.view("<f4"))  # a copy: what is mapped cannot be written to
    elif stored.kind == GGMLQuantizationType.F64:
        found = raw.view("<f8").astype(np.float32)
    else:
        block, block_bytes = GGML_QUANT_SIZES[stored.kind]
        rows = raw.reshape(-1, stored.size[-1] // block * block_bytes)
        with np.errstate(all="ignore"):  # of damaged scales; what is not finite is refused afterwards
            found = dequantize(rows, stored.kind)
    return torch.from_numpy(np.ascontiguousarray(found)).reshape(stored.size)
