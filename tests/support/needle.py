"""A model made by hand whose selection, answer and reading follow the question and the needle's place.

The document is filler but for one token at a place of its own. Question `west` looks for needles W0
and W1, question `east` for E0 and E1; the answer is the needle's digit. So question, depth and answer
are secrets that each steer what an insecure run would show.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from mpcache.model import LayerWeights, Model, ModelShape, Weights
from mpcache.model.tokenizer import Tokenizer

WORDS = ("<unk>", "west", "east", "W0", "W1", "E0", "E1", "zero", "one", "who", "is", "there",
         "sand", "dune", "rock", "wind")  # fmt: skip
FILLER = WORDS[12:]
CONTEXT, CLUSTER, PLACES = 32, 4, 4  # tokens, tokens per cluster, clusters on each side
WIDTH = len(WORDS)
SHAPE = ModelShape(
    layers=1, width=WIDTH, heads=1, kv_heads=1, head_dim=4, ffn=4, vocab=len(WORDS), max_positions=64,
    norm="rms", norm_eps=1e-5, activation="silu", gated=True, positions="learned",
)  # fmt: skip


@dataclass(frozen=True)
class Secret:
    """What a session hides. question: west or east (0, 1).  depth: the needle's cluster on that side
    (0 to 3).  answer: its digit (0, 1).  words: the question's filler, and the document's."""

    question: int
    depth: int
    answer: int
    words: int

    @property
    def text(self) -> str:
        first, second = random.Random(self.words).sample(("who", "is", "there"), 2)
        return f"{first} {second} {('west', 'east')[self.question]}"

    def document(self) -> list[int]:
        """Token ids: a needle of each side among filler; the asked one at `depth`."""
        rng = random.Random(self.words + 1)
        words = [rng.choice(FILLER) for _ in range(CONTEXT)]
        for side, needles in enumerate((("W0", "W1"), ("E0", "E1"))):
            asked = side == self.question
            depth = self.depth if asked else rng.randrange(PLACES)
            digit = self.answer if asked else rng.randrange(2)
            words[(side * PLACES + depth) * CLUSTER + rng.randrange(CLUSTER)] = needles[digit]
        return [WORDS.index(word) for word in words]


def secrets_for(n: int, seed: int) -> list[Secret]:
    """n independent uniform secrets."""
    rng = random.Random(seed)
    return [
        Secret(rng.randrange(2), rng.randrange(PLACES), rng.randrange(2), rng.getrandbits(30))
        for _ in range(n)
    ]


def weights() -> Weights:
    """One attention head; every other token has its own direction and no part in it."""

    def matrix(rows: int, columns: int, **entries: float) -> torch.Tensor:
        made = torch.zeros(rows, columns)
        for place, value in entries.items():
            word, _, column = place.partition("_")
            made[WORDS.index(word), int(column)] = value
        return made

    looks = matrix(WIDTH, 4, west_0=1.0, east_1=1.0)  # normed one-hots are 4 long: scores of 64
    shows = matrix(WIDTH, 4, W0_0=4.0, W1_0=4.0, E0_1=4.0, E1_1=4.0)
    tells = matrix(WIDTH, 4, W0_0=1.0, E0_0=1.0, W1_1=1.0, E1_1=1.0)
    writes = torch.zeros(4, WIDTH)
    writes[0, WORDS.index("zero")] = writes[1, WORDS.index("one")] = 1.0
    none = torch.zeros
    layer = LayerWeights(
        wq=looks, bq=None, wk=shows, bk=None, wv=tells, bv=None, wo=writes, bo=None,
        w_gate=none(WIDTH, 4), b_gate=None, w_up=none(WIDTH, 4), b_up=None,
        w_down=none(4, WIDTH), b_down=None,
    )  # fmt: skip
    return Weights(torch.eye(WIDTH), none(SHAPE.max_positions, WIDTH), (layer,), torch.eye(WIDTH), None)


def model(folder: Path) -> Model:
    """The model; `folder` gets its tokenizer.json, which the client takes from the server."""
    inner = tokenizers.Tokenizer(models.WordLevel(dict(zip(WORDS, range(WIDTH), strict=True)), "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))
    return Model(SHAPE, weights(), Tokenizer.load(folder, WIDTH, None), "made by hand", folder)
