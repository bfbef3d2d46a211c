"""Write docs/protocols.md and docs/policies.md from their texts, the programs and the policies themselves.

    python tools/docs.py [--check]

Texts: mpcache/audit/protocols.md and mpcache/audit/policies.md.

Rounds and bytes: the programs are read at several sizes, and the
formulas are those that hold at all of them (`mpcache.audit.formula`).
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mpcache.audit.catalog import CATALOG
from mpcache.audit.explain import StepTrace, TensorTrace, TraceParty, explained, formula_of
from mpcache.audit.formula import Names, modulus, total
from mpcache.model import demo_model_dir, load_shape
from mpcache.policies_command import PLAIN, PRIVATE, reveals, side
from mpcache.policy import POLICIES
from mpcache.policy.describe import describe
from mpcache.protocols.compaction import shuffle
from mpcache.protocols.compare import Digits, Keys, less
from mpcache.protocols.linear import mask_operand, matmul_masked_operand, product, truncate, truncate_product
from mpcache.protocols.lookup import lookup
from mpcache.protocols.reciprocal import reciprocal
from mpcache.protocols.softmax import exp, exp_by_digits
from mpcache.protocols.topk import HotSelection, topk_by_tables
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import Program, RequestKind, run
from mpcache.runtime.ring import matmul
from mpcache.runtime.shares import MaskedOperand, Share
from mpcache.runtime.side import Side

ROOT = Path(__file__).resolve().parents[1]
TEXTS, PAGES = ROOT / "mpcache/audit", ROOT / "docs"
NOTE = "<!-- Made by tools/docs.py from mpcache/audit/{} and {}: edit those. -->\n\n"
SIDE = Side(Rank.SERVER, "meta")
# n, m, k, c, rows at each reading: unlike each other, on both sides of a power of two
SIZES = {
    "n": (40, 70, 23, 90, 55, 130, 31),
    "m": (3, 7, 4, 6, 11, 5, 13),
    "k": (6, 17, 9, 5, 12, 21, 8),
    "c": (13, 3, 19, 29, 5, 7, 10),
    "rows": (2, 5, 7, 3, 11, 13, 4),
}


def meta(*shape: int) -> Any:
    """Make a tensor that has a size and no values; the protocols take it where they take a tensor."""
    return MetaTensor(shape)


def share(*shape: int, bits: int = 16, ring: int = 64) -> Share:
    """Make a share of that size."""
    return Share(meta(*shape), bits, ring=ring)


def kept(*shape: int, ring: int = 64) -> MaskedOperand:
    """Make an operand of that size that was masked once."""
    return MaskedOperand(meta(*shape), meta(*shape), 16, None, ring)


def scatter(rows: int, n: int, k: int, c: int) -> Program[Share]:
    """Scatter k slots of c weights to n items, in each row."""
    hot, opened = meta(rows, k, n), meta(rows, n)
    return HotSelection(SIDE, hot, opened, modulus(n), None).scatter(share(rows, k, c), 56)


# What is read for each protocol of the catalog, with the sizes that are symbols in it.
EXAMPLES: Mapping[RequestKind, tuple[str, Callable[..., Program[object]]]] = {
    RequestKind.TRUNCATION: (
        "n values, ring of 48 bits", lambda n, **_: truncate(SIDE, share(n, bits=32, ring=48), 16)
    ),
    RequestKind.MASK: ("n values, ring of 48 bits", lambda n, **_: mask_operand(share(n), 48)),
    RequestKind.MASKED_OPERAND: (
        "(m, k) times masked (k, n), ring of 48 bits",
        lambda m, k, n, **_: matmul_masked_operand(SIDE, share(m, k), kept(k, n, ring=48)),
    ),
    RequestKind.TRUNCATIONS_PRODUCT: (
        "n values by n values, rings of 24 and 40 bits",
        lambda n, **_: truncate_product(SIDE, share(n, ring=24), share(n, ring=40)),
    ),
    RequestKind.LINE: (
        "n reciprocals from 2^-7 to 2^13",
        lambda n, **_: reciprocal(SIDE, share(n, bits=20), 2.0**-7, 2.0**13),
    ),
    RequestKind.TRIPLE_MUL: ("n values by n values", lambda n, **_: product(SIDE, share(n), share(n))),
    RequestKind.TRIPLE_MATMUL: (
        "(m, k) times (k, n)", lambda m, k, n, **_: product(SIDE, share(m, k), share(k, n), matmul)
    ),
    RequestKind.COMPARE: (
        "n values of 32 bits, any number of public thresholds",
        lambda n, **_: less(SIDE, meta(n), 32),
    ),
    RequestKind.ONE_HOT: (
        "n values, a table of 1024 entries",
        lambda n, **_: lookup(SIDE, meta(n), torch.empty(1024, dtype=torch.int64)),
    ),
    RequestKind.EXP: ("n values", lambda n, **_: exp(SIDE, share(n, bits=13, ring=24))),
    RequestKind.HIGHEST: (
        "n scores in each row, and their exponentials by tables of the masks' digits",
        lambda rows, n, **_: exp_by_digits(SIDE, share(rows, n, bits=13, ring=24), None),
    ),
    RequestKind.TOPK: (
        "k of n, scores of 24 bits, c values each, in each row",
        lambda rows, n, k, c, **_: topk_by_tables(
            SIDE, share(rows, n, bits=13, ring=24), k, share(rows, n, c, bits=13, ring=24), 24, Keys
        ),
    ),
    RequestKind.TOPK_DIGITS: (
        "k of n, scores of 24 bits, c values each, fewer than 2^16 pairs",
        lambda n, k, c, **_: topk_by_tables(
            SIDE, share(n, bits=13, ring=24), k, share(n, c, bits=13, ring=24), 24, Digits
        ),
    ),
    RequestKind.SHUFFLE: (
        "n rows of c values, ring of 48 bits, in each row",
        lambda rows, n, c, **_: shuffle(SIDE, [share(rows, n, c, ring=48)], Rank.CLIENT),
    ),
    RequestKind.SCATTER: (
        "k slots of c weights, to n items, in each row",
        lambda rows, n, k, c, **_: scatter(rows, n, k, c),
    ),
}  # fmt: skip


def read(program: Program[object]) -> list[StepTrace]:
    """Run a program on sizes alone and return what each step opens and draws."""
    witness = TraceParty()
    run(program, witness)
    return list(witness.said.values())


def blocks() -> Iterator[str]:
    """Yield the table of building blocks, line by line."""
    yield "| protocol | for | rounds | bytes sent per party | bytes from the dealer | error | source |"
    yield "|---|---|---|---|---|---|---|"
    names = Names(SIZES)
    for kind, (what, example) in EXAMPLES.items():
        readings = [
            read(example(**{name: values[i] for name, values in SIZES.items()}))
            for i in range(len(SIZES["n"]))
        ]
        assert all(len(said) == 1 for said in readings), kind
        every = [said[0] for said in readings]
        one, sent = CATALOG[kind], _bytes(names, [said.opened for said in every])
        dealt = _bytes(names, [said.dealt for said in every])
        yield (
            f"| {one.says} (`{one.code}`) | {what} | {every[0].rounds} | {sent} | {dealt} "
            f"| {one.error} | {one.source} |"
        )


def digits() -> Iterator[str]:
    """Yield the rows of the dealer's bytes for a comparison, by key trees and by digits."""
    for width, dtype in ((24, torch.int8), (24, torch.int16), (28, torch.int16)):
        keys, *levels = (
            sum(part.nbytes * (2 if part.public else 1) for part in derived)
            for derived in (Keys(1, width, dtype).derived,
                            *(Digits(1, width, dtype, level).derived for level in (1, 2)))
        )  # fmt: skip
        yield f"| {width} bits | {8 * dtype.itemsize} bits | {keys} B | {levels[0]} B | {levels[1]} B |"


def _bytes(names: Names, readings: list[list[TensorTrace]]) -> str:
    text = formula_of(names, [[one.size for one in seen] for seen in zip(*readings, strict=True)])
    assert text is not None, readings[0]
    return f"`{text}`"


def layer(spec: str, index: int) -> Iterator[str]:
    """Yield the table of one layer of a decode step, by its steps.

    The steps outside of the layers are left out.
    """
    plan = explained(load_shape(demo_model_dir()), spec, 500, 16, "fast")
    yield "| step | rounds | bytes sent per party | bytes from the dealer | draws |"
    yield "|---|---|---|---|---|"
    for (number, name), step in plan.steps.items():
        if number != index:
            continue
        parts = [
            f"`{total([[str(line.times), line.formula or '?']])}`{_one_way(line.to)}" for line in step.opened
        ]
        assert step.offline is not None and not any("?" in part for part in parts), (spec, name)
        sent = " + ".join(parts) or "0"
        kinds = ", ".join(step.kinds)
        yield f"| {name} | {step.rounds or 'beside another'} | {sent} | `{step.offline}` | {kinds} |"


def _one_way(to: str) -> str:
    """Say who sends what does not go both ways."""
    return f" {to.rpartition('from ')[2]}" if "from" in to else ""


def overview() -> Iterator[str]:
    """Yield the table of all policies."""
    yield "| policy | source | runs | of `A|B` | reveals |".replace("A|B", "A\\|B")
    yield "|---|---|---|---|---|"
    for name, cls in POLICIES.items():
        runs = PLAIN if cls.plain_only else PRIVATE
        leaks = reveals(cls.leaks, cls.may_leak)
        yield f"| [`{name}`](#{name}) | {cls.source} | {runs} | {side(cls.evicts, cls.selects)} | {leaks} |"


def policies() -> Iterator[str]:
    """Yield a section for each policy."""
    for cls in POLICIES.values():
        facts = describe(cls)
        yield f"## {facts.name}\n"
        for paragraph in facts.mechanism:
            yield textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False) + "\n"
        yield f"* Source: {facts.source}."
        yield f"* Needs: {facts.needs}."
        yield f"* Reveals: {reveals(facts.leaks, facts.may_leak)}."
        yield f"* Example: `{facts.example}`.\n"
        if facts.options:
            yield "| option | default | allowed | meaning |"
            yield "|---|---|---|---|"
            for one in facts.options:
                yield f"| `{one.name}` | {one.default} | {one.allowed} | {one.meaning} |"
            yield ""


def page(name: str, source: str, made: Mapping[str, Iterator[str]]) -> str:
    """Return a page: its text, with what is made put in."""
    text = (TEXTS / name).read_text(encoding="utf-8")
    for mark, lines in made.items():
        text = text.replace("{{" + mark + "}}", "\n".join(lines).strip("\n"))
    assert "{{" not in text
    return NOTE.format(name, source) + text


def pages() -> dict[str, str]:
    """Return the pages by their file's name."""
    tables = {
        "blocks": blocks(), "digits": digits(), "full": layer("full", 0), "mpcache": layer("mpcache", 0),
        "sharing": layer("mpcache", 3),
    }  # fmt: skip
    told = {"overview": overview(), "policies": policies()}
    return {
        "protocols.md": page("protocols.md", "the programs", tables),
        "policies.md": page("policies.md", "mpcache/policy", told),
    }


def main() -> None:
    """Write the pages, or with --check say which one is out of date."""
    torch.set_num_threads(1)
    for name, text in pages().items():
        file = PAGES / name
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{name} is not what the programs say; run `make docs` and commit the page")


if __name__ == "__main__":
    main()
