"""Read what a Hugging Face folder says of its model: config, end tokens, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpcache.errors import ModelError
from mpcache.model.chat_template import template_of_folder
from mpcache.model.families import ConfigValues, family_of, shape_from_config
from mpcache.model.shape import LARGEST
from mpcache.model.tensor_files import TensorFiles, read_json_object
from mpcache.model.tokenizer import Tokenizer

# What else a generation_config.json may say about where an answer begins or ends.
_ENDINGS = (
    "min_length", "min_new_tokens", "stop_strings", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty",
)  # fmt: skip


class HfFolder:
    """A folder with config.json, generation_config.json, tokenizer.json and *.safetensors.

    Its config.json alone may be given, where only the shape is asked for.
    """

    def __init__(self, path: Path) -> None:
        """Read the configs. Raises ModelError."""
        self._config, source = _read_configs(path)
        values = ConfigValues(self._config, source)
        self._folder = Path(source).parent
        self.family = family_of(values)
        self.about = f"{self.family.model_type}, a Hugging Face folder"
        self.shape = shape_from_config(self._config, source)
        self.tied = values.flag("tie_word_embeddings", self.family.tied)

    @property
    def digested(self) -> bytes:
        """What the model's digest begins with."""
        return json.dumps(self._config, sort_keys=True).encode()

    def tokenizer(self) -> Tokenizer:
        """Read tokenizer.json and the chat template. Raises ModelError."""
        shape = self.shape
        return Tokenizer.load(self._folder, shape.vocab, shape.bos_id, template_of_folder(self._folder))

    def tensors(self, digest: Callable[[Any], None]) -> TensorFiles:
        """Open the weights. Raises ModelError."""
        return TensorFiles(self._folder, self.family.prefix, digest)


def _read_configs(path: Path) -> tuple[dict[str, Any], str]:
    """Read a config.json, given the file or its folder, and return its name as well.

    The tokens that begin and end a text are those of the generation_config.json beside it, if there is
    one, even where it names none. How it chooses tokens is left to the user's flags.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path}: no config.json in it; give a Hugging Face folder or a .gguf file")
    config, source = read_json_object(file), str(file)
    beside = file.with_name("generation_config.json")
    if not beside.is_file():
        return config, source
    values = ConfigValues(read_json_object(beside), str(beside))
    for key in _ENDINGS:
        if values.get(key):
            raise ModelError(f"{beside}: {key} is not supported; take it out")
    special = {}
    for key in ("bos_token_id", "eos_token_id"):
        values.tokens(key, LARGEST["vocab"])  # checked here, where the file's name is known
        special[key] = values.get(key)
    return config | special, source
