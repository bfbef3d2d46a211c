"""Load a model, or only its shape or tokenizer, from a Hugging Face folder or a .gguf file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mpcache.demo import DEMO
from mpcache.errors import ModelError
from mpcache.model.families import Family
from mpcache.model.folding import StoredWeights, read_and_drop, read_folded
from mpcache.model.gguf_model import GgufModel
from mpcache.model.hf_folder import HfFolder
from mpcache.model.shape import ModelShape
from mpcache.model.sources import find_model, is_gguf
from mpcache.model.tensor_files import Tensors
from mpcache.model.tokenizer import Tokenizer
from mpcache.model.weights import Weights


@dataclass(frozen=True, eq=False)
class Model:
    """A model as its owner holds it.

    `digest`: sha256, in hex, of the config and of every tensor read, as stored; how a checkpoint is
    cut into files does not change it.  `path`: the folder or file that it was read from.
    """

    shape: ModelShape
    weights: Weights
    tokenizer: Tokenizer
    digest: str
    path: Path


class StoredModel(Protocol):
    """What a file format says of a model.

    about: names architecture and format.  tied: head and embedding are one, if no more is stored.
    """

    about: str
    shape: ModelShape
    family: Family
    tied: bool

    @property
    def digested(self) -> bytes:
        """What the model's digest begins with."""

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. Raises ModelError."""

    def tensors(self, digest: Callable[[Any], None]) -> Tensors:
        """Open the weights; `digest` takes what is read. Raises ModelError."""


def demo_model_dir() -> Path:
    """Return the folder of the model that ships with mpcache. Raises ModelError when it is not there."""
    folder = DEMO / "model"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: the demo model is not there; reinstall mpcache or name a --model")
    return folder


def load_shape(path: Path | str) -> ModelShape:
    """Read the shape of a model as --model names it, or of a config.json. Raises ModelError."""
    return open_model(path, weights=False).shape


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read the tokenizer of a model; needs no weights. Raises ModelError."""
    return open_model(path, weights=False).tokenizer()


def load_model(path: Path | str, keep: bool = True) -> Model:
    """Read a model: a Hugging Face folder, a .gguf file, or one of the hub.

    What is stored in fewer bits becomes float32, a matrix at a time. Every problem is a ModelError of
    one line. keep: whether the weights stay in memory, or are read again whenever they are asked for.
    """
    found = find_model(path)
    opened = open_model(found)
    tokenizer = opened.tokenizer()
    digest = hashlib.sha256(opened.digested)
    tensors, about = opened.tensors(digest.update), (opened.family, opened.shape, opened.tied)
    if keep:
        weights = read_folded(tensors, *about)
    else:
        read_and_drop(tensors, *about)
        weights = StoredWeights(opened.tensors(lambda data: None), *about)
    tensors.check_all_read()
    return Model(opened.shape, weights, tokenizer, digest.hexdigest(), found)


def stored_weights(path: Path | str) -> Weights:
    """Open a model's weights, which are read when they are asked for. Raises ModelError."""
    opened = open_model(path)
    return StoredWeights(opened.tensors(lambda data: None), opened.family, opened.shape, opened.tied)


def open_model(path: Path | str, weights: bool = True) -> StoredModel:
    """Read what is public about a model. weights: whether its tensors are needed, too. Raises ModelError."""
    found = find_model(path, weights)
    return GgufModel(found) if is_gguf(found) else HfFolder(found)
