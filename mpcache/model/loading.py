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
from mpcache.model.shape import LARGEST, ModelShape
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
    config, source = _read_configs(Path(path))
    return shape_from_config(config, source)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the tokenizer of a model folder; needs no weights. Raises ModelError."""
    return _tokenizer(Path(folder), load_shape(folder))


def load_model(folder: Path | str) -> Model:
    """Read a Hugging Face folder: its config.json, generation_config.json, tokenizer.json and weights.

    float16 and bfloat16 become float32. Every problem is a ModelError of one line.
    """
    folder = Path(folder)
    config, source = _read_configs(folder)
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


# What else a generation_config.json may say about where an answer begins or ends.
_ENDINGS = (
    "min_length", "min_new_tokens", "stop_strings", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty",
)  # fmt: skip


def _read_configs(path: Path) -> tuple[dict[str, Any], str]:
    """Read a config.json, given the file or its folder, and return its name as well.

    The tokens that begin and end a text are those of the generation_config.json beside it, if there is
    one, even where it names none. How it chooses tokens is left to the user's flags.
    """
    config, source = _read_config(path)
    file = Path(source).with_name("generation_config.json")
    if not file.is_file():
        return config, source
    values = ConfigValues(read_json_object(file), str(file))
    for key in _ENDINGS:
        if values.get(key):
            raise ModelError(f"{file}: {key} is not supported; take it out")
    special = {}
    for key in ("bos_token_id", "eos_token_id"):
        values.tokens(key, LARGEST["vocab"])  # checked here, where the file's name is known
        special[key] = values.get(key)
    return config | special, source


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Read a config.json, given the file or its folder, and return its name as well."""
    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ModelError(f"{path}: no such model folder; give a Hugging Face model folder")
    if not file.is_file():
        raise ModelError(f"{path}: no config.json in it; give a Hugging Face model folder")
    return read_json_object(file), str(file)
