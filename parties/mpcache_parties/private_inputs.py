"""Hold what a party brings in private: the server its model and document, the client its question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mpcache.console.inputs import read_text
from mpcache.demo import DEMO_DOCUMENT
from mpcache.model import Model, demo_model_dir, find_model, load_model, load_shape, load_tokenizer
from mpcache.sampling import Sampling


@dataclass(frozen=True)
class Document:
    """What the server brings. tokens: of the document, with BOS.  device: where it is read."""

    model: Model
    tokens: list[int]
    device: str = "cpu"


@dataclass(frozen=True)
class Question:
    """What the client brings. Without `stop_at_eos` the answer's length tells nothing about it."""

    text: str
    sampling: Sampling = Sampling()
    stop_at_eos: bool = True


PrivateInput = Document | Question | None  # None: the dealer's


def read_document(model: str | None, context: Path | None) -> Document:
    """Load the server's model and read its document; those of the demo where there is None.

    Raises BadInput: a model or a text that cannot be used, or more tokens than the model allows.
    """
    text = read_text(context or DEMO_DOCUMENT)
    path = demo_model_dir() if model is None else find_model(model)
    # The text is looked at before the weights are: they take minutes where a model is large.
    tokens = load_tokenizer(path).encode_within(text, True, load_shape(path).max_positions, "the context")
    return Document(load_model(path), tokens, "cuda" if torch.cuda.is_available() else "cpu")
