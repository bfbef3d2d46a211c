"""Documents, questions and their answers, for any model: text alone.

The text is the demo's held-out verses and facts (`mpcache.demo.documents`), drawn by seeds that
training never used: it seeds by numbers, this by words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from mpcache.demo.documents import (
    CountTokens,
    insert_at_depths,
    load_lines,
    make_document,
    take_verses,
)
from mpcache.errors import BadInput

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTS, ASKED = 8, 4  # recall: facts in a document, and how many of them are asked in turn
TIMES, GIVEN, COPIED = 3, 8, 4  # copy: places where the verse stands; words of it given, and wanted
CONTINUED = 64  # bits: tokens of the text that goes on, about
FULL_AT_LEAST = 0.95  # what the full cache must reach for a task to be judged
BITS_AT_MOST = 2.5  # bits per byte, the same; a good compressor of single verses needs about as many


@dataclass(frozen=True)
class TaskTurn:
    """A question and its answer, which begins with a space. part: what it is counted under, too.

    lead: of a chat, the answer's first words, which are given.
    """

    question: str
    answer: str
    part: str
    lead: str = ""


@dataclass(frozen=True)
class Sample:
    """One session: a context, and the turns that follow it, each after the right answer before it."""

    context: str
    turns: tuple[TaskTurn, ...]

    def inside(self) -> Sample:
        """Move the first question to the end of the context, but for its last word, which asks."""
        first, *later = self.turns
        head, _, word = first.question.rpartition(" ")
        return Sample(self.context + head, (replace(first, question=" " + word), *later))

    def apart(self) -> list[Sample]:
        """Make each turn a session of its own.

        All that was said before a turn, with the right answers, is the beginning of its question.
        """
        found, said = [], ""
        for turn in self.turns:
            found.append(Sample(self.context, (replace(turn, question=said + turn.question),)))
            said += turn.question + turn.answer
        return found


@dataclass(frozen=True)
class Task:
    """A kind of question whose answers are known.

    make(rng, count tokens, context tokens, i): the i-th sample.  per_document: answers that one sample
    counts for in `--samples`.  room: tokens that questions and answers take beyond the context, at most,
    with a tokenizer like the demo's.  by_token: every token of the answer is an answer.  chat: questions are
    messages.  apart: of a chat, each question is asked alone; else all are in one conversation.
    """

    name: str
    about: str
    make: Callable[[random.Random, CountTokens, int, int], Sample]
    room: int
    per_document: int = 1
    by_token: bool = False
    questions: tuple[str, ...] = ("inside", "after")
    chat: bool = False
    apart: bool = False

    def samples(self, answers: int) -> int:
        """Return how many documents give this many answers."""
        return -(-answers // self.per_document)

    def sample(self, i: int, seed: int, count_tokens: CountTokens, context: int) -> Sample:
        """Make document i of a seed, of at most `context` tokens. Raises BadInput."""
        try:
            kind = "chat" if self.chat else self.name  # all tasks of a chat ask about the same documents
            return self.make(random.Random(f"eval {kind} {seed} {i}"), count_tokens, context, i)
        except ValueError as error:
            raise BadInput(f"--context {context}: too short for task {self.name}: {error}") from None


def passkey(rng: random.Random, count_tokens: CountTokens, context: int, i: int) -> Sample:
    """Hide one fact in a document, at a depth."""
    depth = DEPTHS[i % len(DEPTHS)]
    text, facts = make_document(rng, count_tokens, context, 1, [depth])
    return Sample(text, tuple(TaskTurn(*fact, f"depth {depth:.2f}") for fact in facts))


def recall(rng: random.Random, count_tokens: CountTokens, context: int, i: int) -> Sample:
    """Ask some of a document's facts, one after another in one session."""
    text, facts = make_document(rng, count_tokens, context, FACTS)
    asked = facts[:ASKED]
    return Sample(
        text,
        tuple(
            TaskTurn(("\n" if j else "") + question, answer, f"question {j + 1}")
            for j, (question, answer) in enumerate(asked)
        ),
    )


def copy(rng: random.Random, count_tokens: CountTokens, context: int, i: int) -> Sample:
    """Begin a verse that stands in several places, and is to go on word for word."""
    long_enough = [
        verse for verse in load_lines("verses.txt") if GIVEN + COPIED <= len(verse.split(" ")) <= 40
    ]
    verse = rng.choice(long_enough)
    left = context - TIMES * count_tokens(verse + "\n")
    if left < 1:
        raise ValueError(f"{TIMES} verses do not fit")
    verses = [other for other in take_verses(rng, count_tokens, left) if other != verse]
    text = insert_at_depths(verses, [verse] * TIMES, [rng.random() for _ in range(TIMES)])
    words = verse.split(" ")
    question, answer = " ".join(words[:GIVEN]), " " + " ".join(words[GIVEN : GIVEN + COPIED])
    return Sample(text, (TaskTurn(question, answer, f"{GIVEN} words given"),))


def bits(rng: random.Random, count_tokens: CountTokens, context: int, i: int) -> Sample:
    """Let verses go on: one question, their first word, and a long answer."""
    verses = take_verses(rng, count_tokens, context + CONTINUED)
    before: list[str] = []
    used = 0
    while verses and (used := used + count_tokens(verses[0] + "\n")) <= context:
        before.append(verses.pop(0))
    word, _, rest = "\n".join(verses).partition(" ")
    if not before or not rest:
        raise ValueError("no verse fits")
    return Sample("".join(verse + "\n" for verse in before), (TaskTurn(word, " " + rest, "continued"),))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("passkey", "one fact, by its depth in the document", passkey, 16),
        Task("recall", f"{ASKED} of {FACTS} facts, asked in one session", recall, 16 * ASKED, ASKED),
        Task("copy", f"a verse that stands in {TIMES} places goes on", copy, 48),
        Task("bits", "held-out verses go on", bits, 2 * CONTINUED, 8, by_token=True, questions=("after",)),
    )
}
