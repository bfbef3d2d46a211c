"""The cost reading equals the ledgers of three real parties: every step, to the byte and the round."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch

from mpcache.cost.pricing import price
from mpcache.cost.reader import MemoizedOps
from mpcache.cost.tally import Tally, split_step
from mpcache.ledger import Entry
from mpcache.model import LayerWeights, ModelShape, Weights
from mpcache.model.prefill import Prefill
from mpcache.policy import POLICIES, parse_policy
from mpcache.rank import Rank
from mpcache.session import Session
from mpcache_kernels import backend
from tests.support.play import Played, play
from tests.support.policy_specs import NEED_A_MODEL, SLOW_ONLY, by_name
from tests.support.priced_shapes import GPT, LLAMA

QUESTION = 3
SHAPES = {"gqa": LLAMA, "gpt": GPT}
SHAPES |= {f"small-{name}": replace(shape, layers=2) for name, shape in SHAPES.items()}
SECURE = [name for name, policy in POLICIES.items() if not getattr(policy, "plain_only", False)]
# No model has read the random context here: tests/mpcache/policy prices what needs one.
SECURE[SECURE.index("compact")] = "compact:counts=equal,score=static,refit=none"
SECURE = [name for name in SECURE if name not in NEED_A_MODEL]


def random_weights(shape: ModelShape) -> Weights:
    def filled(like: Any) -> Any:
        return None if like is None else 0.1 * torch.randn(like.shape)

    blank = Weights.meta(shape)
    layers = (LayerWeights(*(filled(getattr(w, f.name)) for f in fields(w))) for w in blank.layers)
    embed, positions, lm_head, lm_bias = map(
        filled, (blank.embed, blank.positions, blank.lm_head, blank.lm_bias)
    )
    return Weights(embed, positions, tuple(layers), lm_head, lm_bias)


def random_prefill(shape: ModelShape, context: int, window: int) -> Prefill:
    def each(heads: int, n: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(heads, n, shape.head_dim) for _ in range(shape.layers))

    k, v = each(shape.kv_heads, context), each(shape.kv_heads, context)
    return Prefill(k, v, each(shape.heads, window), context - window, torch.zeros(shape.vocab))


@cache
def played(kind: str, spec: str, context: int, protocol: str, decoded: int) -> Played:
    """A whole session between three parties: set-up, context, a question, and a few decode steps."""
    shape, policy = SHAPES[kind], parse_policy(spec).bind(context, SHAPES[kind])
    torch.manual_seed(0)
    weights = random_weights(shape)
    prefill = random_prefill(shape, context, policy.window)

    def program(ops: Any, party: Any, rank: Rank) -> None:
        session = Session(ops, party, shape, policy)
        session.setup(weights if rank is Rank.SERVER else None)
        session.context(prefill if rank is Rank.SERVER else None, backend("cpu"))
        session.chunk([1, 2, 3] if rank is Rank.CLIENT else None, QUESTION)
        for token in range(decoded):
            session.chunk([token] if rank is Rank.CLIENT else None, 1)

    return play(program, protocol)


def as_entry(tally: Tally, rank: Rank) -> Entry:
    """What `rank`'s ledger should say."""
    server, client = tally.server_sent, tally.client_sent
    match rank:
        case Rank.SERVER:
            return Entry(tally.rounds, server, client, 0, tally.server_offline)
        case Rank.CLIENT:
            return Entry(tally.rounds, client, server, 0, tally.client_offline)
        case Rank.DEALER:
            return Entry(offline_sent=tally.offline)


def ledger_of(run: Played, rank: Rank, phase: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = defaultdict(Entry)
    for step, entry in run.ledgers[rank].steps.items():
        head, _, rest = step.partition("/")
        if head == phase and entry != Entry():
            entries[rest] += entry
    return dict(entries)


def check(kind: str, spec: str, context: int, protocol: str, decoded: int = 3) -> None:
    run = played(kind, spec, context, protocol, decoded)
    # These threads keep nothing for later: weights and document are masked anew.
    found = price(SHAPES[kind], spec, context, QUESTION, protocol, new_tokens=decoded + 1, standing=False)
    phases = ["setup", "context", "question", *(f"decode{i + 1}" for i in range(decoded))]
    assert list(found.phases) == phases and found.steps == decoded
    for phase, steps in found.phases.items():
        for rank in Rank:
            told = {s: e for s, t in steps.items() if (e := as_entry(t, rank)) != Entry()}
            assert told == ledger_of(run, rank, phase), (phase, rank)


@pytest.mark.parametrize("context", [20, 90])
@pytest.mark.parametrize("kind", ["gqa", "gpt"])
@pytest.mark.parametrize("spec", by_name(SECURE))
def test_fast_equals_the_ledgers(spec: str, kind: str, context: int) -> None:
    check(kind, spec, context, "fast")


@pytest.mark.parametrize("spec", by_name(SECURE))
def test_fast_bits_equals_the_ledgers(spec: str) -> None:
    check("gqa", spec, 90, "fast-bits")


@pytest.mark.parametrize("kind", ["small-gqa", pytest.param("small-gpt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", ["full", pytest.param("mpcache", marks=pytest.mark.slow)])
def test_stock_equals_the_ledgers(spec: str, kind: str) -> None:
    check(kind, spec, 70, "stock", decoded=1)


@pytest.mark.slow
@pytest.mark.parametrize("spec", by_name(name for name in SECURE if name not in ("full", "mpcache")))
def test_every_policy_on_stock_equals_the_ledgers(spec: str) -> None:
    check("gqa", spec, 90, "stock", decoded=1)


@pytest.mark.parametrize("protocol", ["fast", "stock"])
def test_layers_and_operations_add_up(protocol: str) -> None:
    found = price(LLAMA, "mpcache", 90, QUESTION, protocol, new_tokens=3)
    for phase in [*found.phases, "decode"]:
        for parts in (found.by_layer(phase).values(), found.by_op(phase).values()):
            together = Tally()
            for tally in parts:
                together += tally
            assert together == found.total(phase)
    layers = found.by_layer("decode")
    assert set(layers) == {*range(LLAMA.layers), None}
    assert {"qkv/norm", "softmax", "gate", "lm_head"} <= set(found.by_op("decode"))
    assert found.peak > found.held > 0


def test_reading_again_gives_the_same() -> None:
    """What is repeated from memory costs what was read."""
    one, two = (price(LLAMA, "mpcache", 90, QUESTION) for _ in range(2))
    assert one.phases == two.phases and one.held == two.held


def test_counts_of_a_product_with_an_operand_and_of_comparisons() -> None:
    """(1, 24) by (24, 24): a product of two secrets takes one product at the server, who knows one."""
    ops = price(LLAMA, "full", 20, QUESTION).by_op("decode")
    per_layer = ops["o"].multiplications // LLAMA.layers
    assert per_layer == 24 * 24
    assert ops["o"].multiply_adds // LLAMA.layers >= 24 * 24
    assert ops["softmax"].comparisons > 0 and ops["softmax"].lookups > 0
    stock = price(LLAMA, "full", 20, QUESTION, "stock").by_op("decode")
    rows, n = LLAMA.heads, 20 + QUESTION + 1
    assert stock["softmax"].comparisons >= rows * (n - 1)  # a maximum of n takes at least n - 1


def test_a_large_shape_is_read_once_not_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pricing takes does not grow with layers that are alike: operations that were read are repeated."""
    read = MemoizedOps._read
    reads = 0

    def counting(self: MemoizedOps, *arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return read(self, *arguments)

    monkeypatch.setattr(MemoizedOps, "_read", counting)
    counts = []
    for layers in (8, 32):
        shape = ModelShape(
            layers, 4096, 32, 8, 128, 14336, 128256 + layers, 8192, "rms", 1e-5, "silu", True, "rope"
        )
        reads = 0
        for name in [name for name in SECURE if name not in SLOW_ONLY]:
            assert price(shape, name, 32768).total("decode").rounds > 0
        counts.append(reads)
    # A vocabulary of its own for each shape: nothing of the first is remembered for the second but layers.
    assert 0 < counts[1] <= counts[0], counts


def test_names() -> None:
    assert split_step("layer31/select/coarse") == (31, "select/coarse")
    assert split_step("layer2") == (2, "together")
    assert split_step("lm_head") == (None, "lm_head")
