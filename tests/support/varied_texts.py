"""Texts that a tokenizer may cut wrongly: scripts, digits, spaces, marks, and mixtures of them."""

from __future__ import annotations

import random

PIECES = (
    "the gate", "  two  spaces", "\n\n\tx \r\n", "é€😀", "日本語", "it's I'M we'll", "12345", " 6.78e9",
    "١٢ ½Ⅷ", "a\u0301 ﬁ", "<s>", "</s>", "<|x|>", "...!?", " ", "", "\u200b", "Zürich", "x = 12345 + 6",
    "العربية हिन्दी", "\x00\x01",
)  # fmt: skip


def varied_texts(n: int) -> list[str]:
    """Each piece, and n mixtures of up to six."""
    rng = random.Random(5)
    return [*PIECES, *("".join(rng.choices(PIECES, k=rng.randrange(1, 7))) for _ in range(n))]
