"""Make documents with facts to recall from the held-out verses beside this file.

A document is a run of consecutive King James verses, one a line, among which lines such
as "The gate of Shimei is 4831." stand at random depths. A question is the start of such
a line, "The gate of Shimei is", and its answer is the rest of it, " 4831.". Append the
question to the document, the answer to the question, a newline to the answer, and go on with
the next question.

Nothing here needs torch or a tokenizer: the caller passes a function that counts tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOUNS = ("gate", "well", "tower", "field", "house", "vineyard", "altar", "garden")

CountTokens = Callable[[str], int]
QuestionAnswer = tuple[str, str]


@lru_cache
def load_lines(name: str) -> tuple[str, ...]:
    """Read the lines of a text file in this folder: "verses.txt", "names.txt" or "people.txt"."""
    return tuple((HERE / name).read_text(encoding="utf-8").splitlines())


def make_facts(rng: random.Random, n_facts: int) -> list[QuestionAnswer]:
    """Make `n_facts` (question, answer) pairs about different names, the numbers four random digits."""
    names = rng.sample(load_lines("names.txt"), n_facts)
    return [(f"The {rng.choice(NOUNS)} of {name} is", f" {rng.randrange(10000):04d}.") for name in names]


def insert_at_depths(verses: list[str], facts: list[str], depths: Sequence[float]) -> str:
    """Put each fact's line at its depth, 0 before the first verse and 1 after the last.

    The text ends with a newline; facts that fall between the same two verses stand in order of depth.
    """
    places = sorted(
        ((round(depth * len(verses)), depth, fact) for fact, depth in zip(facts, depths, strict=True)),
        reverse=True,
    )
    lines = list(verses)
    for place, _, fact in places:
        lines.insert(place, fact)
    return "".join(line + "\n" for line in lines)


def take_verses(rng: random.Random, count_tokens: CountTokens, n_tokens: int) -> list[str]:
    """Take consecutive verses from a random start, `n_tokens` tokens of them, the last one cut."""
    verses = load_lines("verses.txt")
    start, taken, left = rng.randrange(len(verses)), list[str](), n_tokens
    while left > 0:
        verse = verses[(start + len(taken)) % len(verses)]
        cost = count_tokens(verse + "\n")
        if cost > left:
            words = verse.split(" ")
            while words and count_tokens(" ".join(words) + "\n") > left:
                words.pop()
            return [*taken, " ".join(words)] if words else taken
        taken.append(verse)
        left -= cost
    return taken


def make_document(
    rng: random.Random,
    count_tokens: CountTokens,
    n_tokens: int,
    n_facts: int,
    depths: Sequence[float] | None = None,
) -> tuple[str, list[QuestionAnswer]]:
    """Make a document of at most (and nearly) `n_tokens` tokens with `n_facts` facts in it.

    Returns the text, which ends with a newline, and the facts as (question, answer) pairs
    in the random order in which to ask them.

    Parameters
    ----------
    rng
        Where all that is random comes from.
    count_tokens
        Counts the tokens of a piece of text, without any start-of-text token.
    n_tokens, n_facts
        Sizes of the document.
    depths
        Where the facts stand, from 0 (the start) to 1 (the end); random without it.

    Raises
    ------
    ValueError
        When the facts alone are longer than the document.

    """
    facts = make_facts(rng, n_facts)
    lines = [question + answer for question, answer in facts]
    left = n_tokens - sum(count_tokens(line + "\n") for line in lines)
    if left < 0:
        raise ValueError(f"{n_facts} facts do not fit in {n_tokens} tokens")
    if depths is None:
        depths = [rng.random() for _ in facts]
    text = insert_at_depths(take_verses(rng, count_tokens, left), lines, depths)
    rng.shuffle(facts)
    return text, facts
