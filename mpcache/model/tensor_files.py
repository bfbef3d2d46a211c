"""Read the tensors of a Hugging Face folder: one or several *.safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpcache.errors import ModelError
from mpcache.model.checks import first_words, read_small_file, shorten

_COMPILED = "_orig_mod."  # before all names of a compiled module: nobody takes it off
READABLE = {torch.float32, torch.float16, torch.bfloat16, torch.float64}


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises ModelError."""
    try:
        data = json.loads(read_small_file(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {first_words(error)}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file}: holds a JSON {type(data).__name__}, not an object")
    return data


class Tensors(Protocol):
    """The tensors of a checkpoint by name."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor `name`."""

    def read(self, name: str, *size: int) -> Tensor:
        """Read the tensor `name` of exactly this size, as float32. Raises ModelError."""

    def check_all_read(self) -> None:
        """Raise ModelError where a tensor is left that changes what the model computes."""


def finite(tensor: Tensor, where: Path, name: str) -> Tensor:
    """Return the tensor. Raises ModelError on a value that is not finite."""
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{where}: tensor {name} holds NaN or infinity; the file is damaged")
    return tensor


class TensorFiles:
    """The tensors of a folder by name, each checked and digested as it is read.

    folder: holds model.safetensors, or shards with their index; where it has both, the one file counts.
    prefix: stands before the stored names and is taken off.
    digest: takes the bytes of what is read.
    """

    def __init__(self, folder: Path, prefix: str, digest: Callable[[Any], None]) -> None:
        """Open the files. Raises ModelError."""
        self._folder, self._digest = folder, digest
        self._file_of: dict[str, tuple[Path, str]] = {}  # name without the prefix -> file, stored name
        for file in _files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
            except (OSError, SafetensorError, ValueError) as error:
                raise ModelError(f"{file}: cannot be read as safetensors: {first_words(error)}") from error
            for stored in names:
                name = stored.removeprefix(prefix)
                if name in self._file_of:
                    raise ModelError(f"{file}: tensor {shorten(stored)} is there twice; copy the files again")
                self._file_of[name] = file, stored

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        return name in self._file_of

    def read(self, name: str, *size: int) -> Tensor:
        """Read the stored tensor `name` of exactly this size, as float32, laid out as the file has it.

        Raises ModelError when it is missing, of another size or dtype, or not finite.
        """
        if name not in self._file_of:
            compiled = any(stored.startswith(_COMPILED) for stored in self._file_of)
            why = f"save the model without the {_COMPILED} of torch.compile" if compiled else (
                "the files do not match config.json"
            )  # fmt: skip
            raise ModelError(f"{self._folder}: tensor {name} is missing; {why}")
        file, stored = self._file_of[name]
        try:
            with safe_open(file, framework="pt") as opened:  # each time: what is mapped counts as memory
                found = tuple(opened.get_slice(stored).get_shape())
                if found != size:
                    raise ModelError(
                        f"{self._folder}: tensor {stored} is {found}, config.json makes it {size}"
                    )
                tensor: Tensor = opened.get_tensor(stored)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self._folder}: tensor {stored} cannot be read: {first_words(error)}"
            ) from error
        if tensor.dtype not in READABLE:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{self._folder}: tensor {stored} is {kind}; supported: float32, float16, bfloat16"
            )
        self._digest(f"{name} {found} {tensor.dtype}\n".encode())
        self._digest(tensor.contiguous().view(torch.uint8).numpy())
        return finite(tensor.to(torch.float32), self._folder, stored)

    def check_all_read(self) -> None:
        """Pass over what is left: folders carry masks and buffers along."""


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds an adapter; merge it into its model, and save that")
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _shards(folder, index)
    raise ModelError(
        f"{folder}: no model.safetensors in it, nor shards with a {index.name}; other weight files are not "
        "supported"
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index}: has no weight_map; copy it again from where the model came from")
    names = sorted({str(name) for name in shards.values()})
    there = {file.name for file in folder.iterdir() if file.is_file()}
    for name in names:
        # The name comes from a file that somebody else wrote: it must not lead out of the folder.
        if name not in there:
            raise ModelError(f"{folder}: {shorten(name)}, named by the index, is not there; copy it here")
    return [folder / name for name in names]
