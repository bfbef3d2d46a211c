"""Load a model, or only its shape or tokenizer, from a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcache.demo import DEMO
from mpcache.errors import ModelError
from mpcache.model.families import ConfigValues, family_of, shape_from_config
from mpcache.model.folding import read_folded
from mpcache.model.shape import ModelShape
from mpcache.model.tensor_files import TensorFiles, read_json_object
from mpcache.model.tokenizer import Tokenizer
from mpcache.model.weights import Weights


@dataclass(frozen=True, eq=False)
class Model:
    """A model as its owner holds it.

    `digest`: sha256, in hex, of the config and of every tensor read, as stored; how a checkpoint is
    cut into files does not change it.
    """

    shape: ModelShape
    weights: Weights
    tokenizer: Tokenizer
    digest: str
    folder: Path


def demo_model_dir() -> Path:
    """Return the folder of the model that ships with mpcache. Raises ModelError when it is not there."""
    folder = DEMO / "model"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: the demo model is not there; reinstall mpcache or name a --model DIR")
    return folder


def load_shape(path: Path | str) -> ModelShape:
    """Read the shape from a model folder or a config.json; needs no weights. Raises ModelError."""
    config, source = _read_config(Path(path))
    return shape_from_config(config, source)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the tokenizer of a model folder; needs no weights. Raises ModelError."""
    return _tokenizer(Path(folder), load_shape(folder))


def load_model(folder: Path | str) -> Model:
    """Read a Hugging Face folder: config.json, *.safetensors (whole or sharded), tokenizer.json.

    float16 and bfloat16 become float32. Every problem is a ModelError of one line.
    """
    folder = Path(folder)
    config, source = _read_config(folder)
    shape = shape_from_config(config, source)
    tokenizer = _tokenizer(folder, shape)
    values = ConfigValues(config, source)
    family = family_of(values)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors = TensorFiles(folder, family.prefix, digest.update)
    weights = read_folded(tensors, family, shape, tied=values.flag("tie_word_embeddings", family.tied))
    return Model(shape, weights, tokenizer, digest.hexdigest(), folder)


def _tokenizer(folder: Path, shape: ModelShape) -> Tokenizer:
    return Tokenizer.load(folder, shape.vocab, shape.bos_id)


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Read a config.json, given the file or its folder, and return its name as well."""
    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ModelError(f"{path}: no such model folder; give a Hugging Face model folder")
    if not file.is_file():
        raise ModelError(f"{path}: no config.json in it; give a Hugging Face model folder")
    return read_json_object(file), str(file)
