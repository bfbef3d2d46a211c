"""What is asked of a model that chats: verses with facts about people and a number among them.

All tasks ask about the same documents, so that each is read once. A question is a message; the answer's
first words are given, as RULER does (arXiv 2404.06654), so that what is measured is the document and not how
the model likes to begin.
"""

from __future__ import annotations

import random

from mpcache.demo.documents import CountTokens, insert_at_depths, load_lines, take_verses
from mpcache.evaluate.tasks import COPIED, DEPTHS, GIVEN, Sample, Task, TaskTurn

PEOPLE, ALONE, QUOTES = 8, 4, 3  # facts in a document, those that are asked alone, and quotes
_SHORTEST_QUOTED = 14  # words of a verse that is quoted

# Of people: first names, last names, cities, jobs, pets and what these are called; and places of a number.
_FIRST, _LAST, _CITIES, _JOBS, _PETS, _CALLED, _PLACES = (line.split() for line in load_lines("people.txt"))


def _fact(rng: random.Random, name: str, kind: int) -> TaskTurn:
    """Make a fact of one of four kinds: the line of the document is `lead` and answer."""
    lead, values, question = (
        (f"{name} lives in", _CITIES, f"In which city does {name} live?"),
        (f"{name} works as a", _JOBS, f"What is the job of {name}?"),
        (f"The house number of {name} is", None, f"What is the house number of {name}?"),
        (f"{name} has a {rng.choice(_PETS)} called", _CALLED, f"What is the name of the pet of {name}?"),
    )[kind]
    value = str(rng.randrange(100, 1000)) if values is None else rng.choice(values)
    part = ("city", "job", "house number", "pet")[kind]
    return TaskTurn(question, f" {value}.", part, lead)


def _sheet(rng: random.Random, count_tokens: CountTokens, context: int, i: int) -> dict[str, Sample]:
    """Make document i and all that is asked about it, by task."""
    names = zip(rng.sample(_FIRST, PEOPLE), rng.sample(_LAST, PEOPLE), strict=True)
    facts = [_fact(rng, f"{first} {last}", j % 4) for j, (first, last) in enumerate(names)]
    depth = DEPTHS[i % len(DEPTHS)]
    place = rng.choice(_PLACES)
    key = TaskTurn(
        f"What is the special magic number for {place} mentioned in the text?",
        f" {rng.randrange(10000, 100000)}.", f"depth {depth:.2f}", f"The special magic number for {place} is",
    )  # fmt: skip
    lines = [turn.lead + turn.answer for turn in (*facts, key)]
    left = context - sum(count_tokens(line + "\n") for line in lines)
    if left < 1:
        raise ValueError(f"{PEOPLE} facts and a number do not fit")
    verses = take_verses(rng, count_tokens, left)
    text = insert_at_depths(verses, lines, [*(rng.random() for _ in facts), depth])
    long = [words for words in (verse.split(" ") for verse in verses) if len(words) >= _SHORTEST_QUOTED]
    quotes = [
        TaskTurn(
            "Repeat the sentence of the text that begins like this.",
            " " + " ".join(words[GIVEN : GIVEN + COPIED]), f"{GIVEN} words given", " ".join(words[:GIVEN]),
        )
        for words in rng.sample(long, min(QUOTES, len(long)))
    ]  # fmt: skip
    rng.shuffle(facts)
    in_turn = [
        TaskTurn(fact.question, fact.answer, f"question {j}", fact.lead)
        for j, fact in enumerate(facts[ALONE:], 1)
    ]
    asked = {"passkey": [key], "facts": facts[:ALONE], "quotes": quotes, "turns": in_turn}
    return {name: Sample(text, tuple(turns)) for name, turns in asked.items()}


def _task(name: str, about: str, per_document: int, apart: bool = True) -> Task:
    def make(rng: random.Random, count_tokens: CountTokens, context: int, i: int) -> Sample:
        return _sheet(rng, count_tokens, context, i)[name]

    return Task(name, about, make, 400, per_document, chat=True, apart=apart)


CHAT_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("passkey", "one number, by its depth in the document", 1),
        _task("facts", f"{ALONE} of {PEOPLE} facts about different people, each asked alone", ALONE),
        _task("quotes", "a verse of the text, begun, goes on", QUOTES),
        _task("turns", "the other facts, asked in one conversation", PEOPLE - ALONE, apart=False),
    )
}
