"""A policy's plan and its openings for people and as data: layers that do the same are told once."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from mpcache.argmax import GROUP
from mpcache.audit.catalog import told_of
from mpcache.audit.explain import Explained, Step, explained
from mpcache.model import ModelShape
from mpcache.policy.plan import alike, layers_told
from mpcache.runtime.program import RequestKind

WIDTH = 118  # characters of a line of prose

# Words of plans and symbols of formulas; those of an explanation that has them are told.
WORDS = {
    "n": "tokens in the cache",
    "kept": "context tokens in the cache",
    "attended": "context tokens that a query attends to, at most",
    "representatives": "keys that a query is scored against beside the tokens",
    "sink": "first tokens, which always attend",
    "recent": "last tokens, which always attend, or are never dropped",
    "living": "tokens that live after a step",
    "old": "tokens that may be dropped",
    "sizes": "tokens in a cluster, level by level",
    "counts": "clusters of the context, level by level",
    "keeps": "clusters that are chosen, level by level",
    "clusters": "clusters of the first level by now",
    "rest": "tokens in no cluster, which always attend",
    "size": "tokens in an item that is chosen",
    "keep": "items that are chosen",
    "items": "items to choose from by now",
    "choice of": "the layer whose choice is attended to",
}
FUNCTIONS = {
    "pairs": "x (x - 1) / 2",
    "modulus": "the power of two from x on, which ranks are opened modulo",
    "rank_bytes": "bytes of such a rank",
    "count_bytes": "bytes of a count up to x",
    "groups": f"x / {GROUP}, rounded up",
    "eighths": "x / 8, rounded up",
}
Group = tuple[list[int] | None, Step]  # layers, None: outside of them; and what each of them does


def explain_policy(shape: ModelShape, spec: str, context: int, question: int, protocol: str) -> Iterator[str]:
    """Yield lines of text about the first decode step after the question. Raises PolicyError."""
    plan = explained(shape, spec, context, question, protocol)
    policy, common = plan.bound.policy, plan.symbols[None]
    yield f"{policy.spec}: {policy.source}"
    yield ""
    yield f"Public, besides the model's shape (context {context} tokens, question {question} tokens):"
    lines = plan.bound.plan.lines()
    yield from (f"  {line}" for line in lines)
    yield f"Leaks beyond that: {policy.leak}."
    yield ""
    yield "One decode step. A round is one message, or one each way at once. What is opened is masked by"
    yield "randomness that is used once, but for the logits, which are the client's answer. Bytes are"
    if protocol == "stock":
        yield "those that each sender sends, with the dimensions of what it opens. CrypTen's maxima, sums of"
        yield "bits and top-k go level by level, as many as the length has bits, so they have no one formula:"
        yield "`mpcache audit --context A,B --protocol stock` prices lengths. The dimensions are made of"
    else:
        yield "those that each sender sends, with their formula; in it"
    yield "  " + ", ".join(f"{name} = {value}" for name, value in common.items())
    yield "  (width, heads, KV heads, heads in a group, head size, FFN width, vocabulary),"
    own = [
        {name: value for name, value in plan.symbols[i].items() if name not in common}
        for i in range(shape.layers)
    ]
    for which, symbols in alike(own):
        yield f"  {which}: " + ", ".join(f"{name} = {value}" for name, value in symbols.items())
    formulas = [line.formula or "" for step in plan.steps.values() for line in step.opened]
    formulas += [step.offline or "" for step in plan.steps.values()]
    yield from _glossary({word for one in own for word in one}, " ".join(lines), " ".join(formulas))
    if not plan.any_heads:
        yield "  The path depends on the number of heads: formulas hold for this model's, of any other size."
    yield from told_steps(*groups_of(plan), shape.layers)


def explained_policy(
    shape: ModelShape, spec: str, context: int, question: int, protocol: str
) -> dict[str, Any]:
    """Return the same as data: layers that do the same are one entry of `steps`. Raises PolicyError."""
    plan = explained(shape, spec, context, question, protocol)
    policy = plan.bound.policy
    return {
        "policy": policy.spec,
        "source": policy.source,
        "leakage": policy.leak,
        "protocol": protocol,
        "context_tokens": context,
        "question_tokens": question,
        "model": shape.to_dict(),
        "plan": plan.bound.plan.to_dict(),
        "symbols": {
            "model": dict(plan.symbols[None]),
            "layers": [dict(plan.symbols[i]) for i in range(shape.layers)],
        },
        "steps": [step_as_data(*group) for part in groups_of(plan) for group in part],
    }


def step_as_data(numbers: list[int] | None, step: Step) -> dict[str, Any]:
    """Return a step of some layers as data; layers: null outside of them."""
    return {
        "step": step.name,
        "layers": numbers,
        "rounds": step.rounds,
        "protocols": [{"kind": str(kind), "says": told_of(kind)} for kind in step.kinds],
        "opened": [{**asdict(line), "bytes": line.bytes * line.times} for line in step.opened],
        "offline_formula": step.offline,
        "offline_bytes": step.offline_bytes,
        "key_bytes": {f"key{i}": size for i, size in enumerate(step.keys, 1)},
    }


def groups_of(plan: Explained) -> tuple[list[Group], list[Group], list[Group]]:
    """Return the steps before the layers, within them and behind them, in program order."""
    layers: dict[int, dict[str, Step]] = defaultdict(dict)
    before: list[Group] = []
    after: list[Group] = []
    for (number, op), step in plan.steps.items():
        if number is not None:
            layers[number][op] = step
        else:
            (after if layers else before).append((None, step))
    return before, group_steps(layers), after


def group_steps(layers: Mapping[int, Mapping[str, Step]]) -> list[Group]:
    """Group equal steps of layers, in program order."""
    found: list[Group] = []
    for op in merged(layers[number] for number in sorted(layers)):
        mine: dict[Step, list[int]] = defaultdict(list)
        for number in sorted(layers):
            if op in layers[number]:
                mine[layers[number][op]].append(number)
        found += [(numbers, step) for step, numbers in mine.items()]
    return found


def merged(orders: Iterable[Iterable[str]]) -> list[str]:
    """Merge lists that have names in common, each in its own order, into one."""
    found: list[str] = []
    for order in orders:
        place = 0
        for name in order:
            if name not in found:
                found.insert(place, name)
            place = found.index(name) + 1
    return found


def told_steps(
    before: Sequence[Group], within: Sequence[Group], after: Sequence[Group], layers: int
) -> Iterator[str]:
    """Yield lines of all steps; one that does what an earlier one does is told by that one's name."""
    told: dict[Step, str] = {}
    for part, title in ((before, ""), (within, "each layer, or those that are named:"), (after, "then:")):
        if title:
            yield title
        for numbers, step in part:
            some = numbers is not None and len(numbers) < layers
            which = f" ({layers_told(numbers or [])})" if some else ""
            same = replace(step, name="")
            if same in told:
                yield f"  {step.name}{which}: as {told[same]}"
                continue
            told[same] = step.name
            yield from _told_step(step, which)


def _glossary(symbols: set[str], lines: str, formulas: str) -> Iterator[str]:
    """Yield what the words of this explanation mean."""
    plain = {symbol.rstrip("0123456789") for symbol in symbols}
    told = [f"{word}: {says}" for word, says in WORDS.items() if word in plain or f"{word} " in lines]
    told += [f"{name}(x): {says}" for name, says in FUNCTIONS.items() if f"{name}(" in formulas]
    text = f"({'; '.join(told)}; the numbers 1, 2 behind a word count levels)."
    yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _told_step(step: Step, which: str) -> Iterator[str]:
    """Yield what a step opens, and to whom, in lines. which: its layers, where not all have it."""
    many = "" if step.rounds == 1 else "s"
    rounds = f"{step.rounds} round{many}" if step.rounds else "beside another step"
    yield f"  {step.name}{which}: {rounds}, {_kinds(step.kinds)}"
    for to, lines in groupby(step.opened, lambda line: line.to):
        begun = f"    to {to}: "
        for line in lines:
            times = f"{line.times} x " if line.times > 1 else ""
            formula = f"{times}{line.told} = " if line.told else ""
            told = f"{line.why}: {formula}{line.bytes * line.times:,} B"
            if begun.endswith("B") and len(begun) + len(told) < WIDTH:
                begun += f"; {told}"
            elif begun.endswith("B"):
                yield begun
                begun = f"    to {to}: {told}"
            else:
                begun += told
        yield begun
    if step.offline_bytes:
        keys = [
            f"key{i} = {size} B" for i, size in enumerate(step.keys, 1) if f"key{i}" in (step.offline or "")
        ]
        told = f" ({', '.join(keys)})" if keys else ""
        formula = f"{step.offline} = " if step.offline and not step.offline.isdigit() else ""
        yield f"    from the dealer, ahead: {formula}{step.offline_bytes:,} B{told}"


def _kinds(kinds: Sequence[RequestKind]) -> str:
    return "; ".join(told_of(kind) for kind in kinds) or "nothing from the dealer"
