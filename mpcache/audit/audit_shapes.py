"""The shapes and lengths that an audit prices, as flags name them."""

from __future__ import annotations

import re
from pathlib import Path

from mpcache.console import terminal
from mpcache.console.inputs import listed
from mpcache.errors import BadInput, ModelError
from mpcache.model import ModelShape, demo_model_dir, find_model, load_shape
from mpcache.model.shapes import NAMES, config_of
from mpcache.model.sources import is_gguf

CONTEXTS = (512, 1024, 2048, 4096)


def shape_of(text: str) -> tuple[str, ModelShape]:
    """Find a shape and its name: demo, a packaged one, or a folder. Raises BadInput or ModelError."""
    if text == "demo":
        return text, load_shape(demo_model_dir())
    if text in NAMES:
        return text, load_shape(config_of(text))
    try:
        path = find_model(text, weights=False)
    except ModelError as error:
        raise BadInput(f"{error}; or one of demo, {', '.join(NAMES)}") from None
    return path.name or text, load_shape(path)


def weights_of(given: str) -> Path:
    """Find the model behind --shape, which the parties need. Raises BadInput or ModelError."""
    if given not in NAMES:
        path = demo_model_dir() if given == "demo" else find_model(given)
        if is_gguf(path) or any(path.glob("*.safetensors")):
            return path
    raise BadInput(
        f"--measure runs the parties, and --shape {given} has no weights; give demo, or a model with weights"
    )


def contexts_of(text: str | None, given: str, shape: ModelShape, more: int) -> list[int]:
    """Read context lengths that the model can take, with `more` tokens after them. Raises BadInput.

    A packaged shape with rotary positions may be priced beyond its lengths, since such positions can be
    stretched at no cost. A model with weights could not run there.
    """
    limit = shape.max_positions - more
    if limit < 1:
        raise BadInput(f"question and answer make {more} tokens, the model allows {shape.max_positions}")
    if text is None:
        return [c for c in CONTEXTS if c <= limit] or [limit]
    contexts = lengths_of("--context", text)
    beyond = [c for c in contexts if c > limit]
    if beyond and (given not in NAMES or shape.positions != "rope"):
        raise BadInput(
            f"--context {beyond[0]} is beyond the model, which takes up to {limit} tokens besides question "
            f"and answer ({more})"
        )
    if beyond:
        trained = shape.max_positions
        terminal.say(
            f"note: {given} was trained for {trained} tokens; beyond, rotary positions are taken as stretched"
        )
    return contexts


def lengths_of(option: str, text: str) -> list[int]:
    """Read numbers of tokens with commas: `512`, `32k`, or `512..32k`, which doubles. Raises BadInput."""
    return list(dict.fromkeys(n for item in listed(option, text) for n in _lengths(option, item)))


def _lengths(option: str, item: str) -> list[int]:
    ends = [re.fullmatch(r"([1-9]\d{0,8})(k?)", end, re.ASCII) for end in item.split("..", 1)]
    if not all(ends):
        raise BadInput(f"{option} {item!r} is not a number of tokens; as in 512,1024 or 512..32k")
    first, last = (int(end[1]) * (1024 if end[2] else 1) for end in (ends[0], ends[-1]) if end)
    if last < first:
        raise BadInput(f"{option} {item!r} ends below its beginning")
    lengths = [first]
    while lengths[-1] < last:
        lengths.append(min(last, 2 * lengths[-1]))
    return lengths
