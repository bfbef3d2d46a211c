"""What every policy has to meet, and what each one promises of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch

from mpcache.cache import LayerCache, SplitLayer
from mpcache.engines.plain import PlainOps
from mpcache.errors import PolicyError
from mpcache.ledger import Ledger
from mpcache.model.rope import rope_tables, rotate
from mpcache.ops import as_tensor, as_value
from mpcache.policy import POLICIES, LeakClass, parse_policy
from mpcache.policy.clusters import ClusterPlan
from mpcache.policy.plan import LayerPlan, SplitPlan
from mpcache.rank import Rank
from mpcache.runtime.party import ShapeParty
from mpcache.runtime.program import Opening, Program, local, run
from mpcache.session import Session
from mpcache_kernels import Backend
from tests.support.policy_specs import (
    ALL_PRIVATE,
    CONTEXT,
    EVERY,
    EVERY_MORE,
    PRIVATE,
    SMALL,
    by_name,
)
from tests.support.tiny_policies import (
    KERNELS,
    Counting,
    chunks,
    cost,
    model,
    plain,
    prefilled,
    secure,
    shape,
    tokens,
)


def run_plain(program: Program[Any]) -> Any:
    nobody: Any = None
    return run(program, nobody)


def steps(ledger: Ledger) -> dict[str, dict[str, int]]:
    """What was exchanged, by step; traffic with the dealer apart from who sent it."""
    return {step: asdict(entry) for step, entry in ledger.steps.items()}


def test_every_policy_is_tested() -> None:
    assert set(SMALL) == set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_says_what_it_is(name: str) -> None:
    cls = POLICIES[name]
    assert isinstance(cls.leaks, LeakClass) and cls.source and cls.needs and cls.__doc__
    assert parse_policy(name) == cls()
    spec = parse_policy(SMALL[name]).spec
    assert parse_policy(spec).spec == spec  # what a user reads can be typed again


def bare(spec: str) -> str:
    """Without options."""
    return "|".join(part.partition(":")[0] for part in spec.split("|"))


def public(spec: str) -> str:
    """Without options, but for what makes the plan public and shares no choice."""
    return (
        bare(spec)
        .replace("compact|mpcache", "compact|mpcache:share=none")
        .replace("compact", "compact:counts=equal")
        .replace("sepllm", "sepllm:ids=2/5")
    )


def parts_of(layer: LayerCache | SplitLayer, plan: LayerPlan) -> list[tuple[int, LayerCache, LayerPlan]]:
    """A layer's parts: KV heads, cache and plan of each."""
    if isinstance(layer, LayerCache):
        return [(shape().kv_heads, layer, plan)]
    assert isinstance(plan, SplitPlan) and plan.heads == layer.heads
    each = zip(plan.heads, layer.parts, plan.parts, strict=True)
    return [(len(heads), part, planned) for heads, part, planned in each]


@pytest.mark.parametrize("context", [1, 2, 3, CONTEXT])
@pytest.mark.parametrize("spec", EVERY_MORE)
def test_sizes_are_as_planned(spec: str, context: int) -> None:
    if context < CONTEXT:  # its budgets are larger than such a context
        spec = public(spec)
    s = shape(layers=2)
    ops = Counting()
    logits, session = plain(spec, s, tokens(context), [], ops=ops)
    layers = zip(session.cache.layers, session.policy.plan.layers, strict=True)
    parts = [part for pair in layers for part in parts_of(*pair)]
    for heads, layer, planned in parts:
        assert layer.k.shape == layer.v.shape == (heads, planned.kept, s.head_dim)
        memory: Any = layer.memory
        if isinstance(planned, ClusterPlan) and memory is not None:
            operands = [x for x in (*memory.floors, *memory.spans) if x is not None]
            assert sum(x.shape[1] for x in operands) == planned.representatives
        else:
            assert planned.representatives == 0
    session.chunk([3], 1)
    for (least, most), (_, _, planned) in zip(ops.seen, parts, strict=True):
        assert least == most == planned.attended + 1
    assert session.policy.plan.to_dict()["context"] == context


@pytest.mark.parametrize("spec", EVERY)
def test_a_whole_budget_is_the_full_cache(spec: str) -> None:
    whole = {
        "full": "full", "streaming": "streaming:recent=1.0", "snapkv": "snapkv:cap=1.0",
        "h2o": "h2o:heavy=0.5,recent=0.5", "tova": "tova:cap=1.0", "quest": "quest:pages=1.0,page=4",
        "mpcache": "mpcache:n_keep=1.0,coarse_keep=1.0,fine_keep=1.0,coarse=4,fine=2",
        "tidal": "tidal:k=1.0", "delta": "delta:pages=1.0,page=4", "recycled": "recycled:k=1.0",
        "windowkv": "windowkv:cap=1.0,decay=0.0",
        "sepllm": "sepllm:separators=1.0,ids=2",
        "promptdistill": "promptdistill:k=1.0",
        "topv": "topv:cap=1.0",
        "pod": "pod",
        "shadowkv": "shadowkv:pages=1.0,rank=0",
        "nosa": "nosa:pages=1.0",
        "keyformer": "keyformer:cap=1.0",
        "pact": "pact:centres=1.0",
        "cascade": "cascade:places=1.0,tiers=1",
        "tokenselect": "tokenselect:k=1.0", "hip": "hip:k=1.0,full=0",
        "compact": "compact:keep=1.0,counts=equal", "random": "random:n_keep=1.0", "oracle": "oracle:k=1.0",
    }  # fmt: skip
    s, ask = shape(), chunks(3)
    want, _ = plain("full", s, tokens(CONTEXT), ask)
    got, _ = plain(whole[spec.partition(":")[0]], s, tokens(CONTEXT), ask)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", EVERY_MORE)
def test_kernels_change_nothing(spec: str) -> None:
    """Whole steps by kernels, over several blocks: the answer of the single operations."""
    s, ask = shape(layers=3), chunks(3, *[1] * 20)
    want, _ = plain(spec, s, tokens(CONTEXT), ask)
    called: set[str] = set()
    got, _ = plain(spec, s, tokens(CONTEXT), ask, ops=PlainOps(noting(called)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    plan = parse_policy(spec).plan(CONTEXT, s).layers[-1]
    selects = isinstance(plan, ClusterPlan) and bool(plan.sizes)
    assert ("select_and_attend" in called) is selects
    score = getattr(parse_policy(spec.rpartition("|")[2]), "score", "")
    assert (("cluster_bounds" if score == "bound" else "cluster_scores") in called) is selects


class Elsewhere(PlainOps):
    """On a device that is not the CPU, and has no values: whatever mixes the two fails."""

    def reveal(self, x: torch.Tensor, to: Rank, why: str) -> Program[Any]:
        assert x.device.type == "meta"
        return local(x)


@pytest.mark.parametrize("kernels", [None, KERNELS])
@pytest.mark.parametrize("spec", EVERY_MORE)
def test_the_plain_engine_stays_on_its_device(spec: str, kernels: Backend | None) -> None:
    s, policy = shape(), parse_policy(spec)
    session = Session(Elsewhere(kernels, "meta"), None, s, policy.bind(CONTEXT, s))
    session.setup(model(s).weights)
    known = prefilled(policy, s, tokens(CONTEXT))
    there: dict[str, Any] = {
        f: tuple(x.to("meta") for x in getattr(known, f)) for f in ("k", "v", "q_window")
    }
    session.context(replace(known, **there), KERNELS)
    for chunk in chunks(3, *[1] * 9):
        session.chunk(chunk, len(chunk))


def noting(called: set[str]) -> Backend:
    """The kernels, and which of them were called."""

    def note(name: str, fn: Any) -> Any:
        def call(*arguments: Any) -> Any:
            called.add(name)
            return fn(*arguments)

        return call

    names = [f.name for f in fields(Backend) if f.name != "name"]
    return replace(KERNELS, **{name: note(name, getattr(KERNELS, name)) for name in names})


@pytest.mark.parametrize("spec", ALL_PRIVATE)
def test_secure_equals_plain_and_costs_what_shapes_say(spec: str) -> None:
    """A question of three tokens, then six more: blocks form, tokens die."""
    s, context, ask = shape(), tokens(CONTEXT), chunks(3, 1, 1, 1, 1, 1, 1)
    want, _ = plain(spec, s, context, ask)
    got, ledgers = secure(spec, s, context, ask)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 0.02
    # The shapes never saw a secret: equal ledgers depend on none.
    by_shapes = cost(spec, s, CONTEXT, [len(chunk) for chunk in ask])
    assert steps(ledgers[Rank.SERVER]) == steps(by_shapes)


class Watching(ShapeParty):
    """Notes why anything is opened, and to whom."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: set[tuple[str, Rank | None]] = set()

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        self.reasons |= {(item.why, item.to) for item in items}
        return super().open(items, step)


@pytest.mark.parametrize("spec", ALL_PRIVATE)
def test_what_is_opened_is_what_is_declared(spec: str) -> None:
    """Leak class none: both parties see what is masked; the client its logits, and that all was in range."""
    party = Watching()
    cost(spec, shape(), CONTEXT, [3, 1, 1, 1, 1, 1], party)
    assert parse_policy(spec).leak == "none"
    for why, to in party.reasons:
        if to is None:
            assert "masked" in why or "rotated" in why, why
        else:
            assert why in ("logits for the client", "whether all was in range") and to is Rank.CLIENT


@pytest.mark.parametrize("spec", EVERY_MORE)
def test_long_generations_stay_bounded(spec: str) -> None:
    ops, s = Counting(), shape()
    many = 60
    logits, session = plain(spec, s, tokens(CONTEXT), chunks(2, *[1] * many), ops=ops)
    assert all(x.isfinite().all() for x in logits)
    last = ops.seen[-s.layers :]
    match bare(spec.rpartition("|")[2]):
        case "streaming":
            assert [session.cache.whole(i).k.shape[1] for i in range(2)] == [7, 7]
            assert all(most == 8 for _, most in last)
        case "h2o":  # living ones and the new one
            assert all(most == 8 for _, most in last)
        case "cascade":
            assert all(most == 10 for _, most in last)
        case "keyformer":
            assert all(most == 8 for _, most in last)
        case "tova":
            assert all(most == 7 for _, most in last)
        case "mpcache" if "dynamic" not in spec:
            tail = 2 + 4 + 2  # recent, an unfinished cluster, steps since the refresh
            chosen = 8 if "fine_keep=1.0" in spec else 6
            assert all(most <= 1 + tail + chosen for _, most in last)
        case "quest":
            assert last[1][1] <= 2 * 4 + 4 + 3  # the unfinished page, and what no page covers at first
        case "recycled" if "dense" not in spec:  # a full step, or its choice and what came since
            assert all(most <= 6 + 3 or most > many for _, most in last)
        case "tidal" | "delta" | "recycled" | "tokenselect" | "hip" | "nosa":
            assert last[1][1] <= 32  # of hip: what fills no chunk of the first level, too
        case _:
            assert all(most > many for _, most in last)


TINY = {
    "mpcache": "mpcache:coarse=2,fine=1,sink=0,recent=1",
    "quest": "quest:page=2,full=0",
    "compact": "compact:counts=equal",
    "sepllm": "sepllm:ids=2/5",
    "A|B": "random:n_keep=1.0|quest:page=2,full=0",
}


@pytest.mark.parametrize("context", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", by_name([*PRIVATE, "A|B"]))
def test_secure_equals_plain_on_tiny_contexts(name: str, context: int) -> None:
    """Default options otherwise; the selecting ones form their first cluster while they answer."""
    spec, s, ask = TINY.get(name, name), shape(layers=1), chunks(1, 1, 1, 1)
    want, _ = plain(spec, s, tokens(context), ask)
    got, _ = secure(spec, s, tokens(context), ask)
    assert all((a - b).abs().max() < 0.02 for a, b in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL_PRIVATE)
def test_secure_equals_plain_over_many_blocks(spec: str) -> None:
    """The longest answer makes six clusters of four tokens out of what was generated, on shares."""
    s, context, ask = shape(), tokens(CONTEXT), chunks(2, *[1] * 28)
    want, session = plain(spec, s, context, ask)
    got, _ = secure(spec, s, context, ask)
    # A near tie may go the other way on shares, and moves what follows: most steps are equal, none wild.
    errors = torch.stack([(a - b).abs().max() for a, b in zip(got, want, strict=True)])
    assert errors.median() < 0.02 and (errors < 0.02).double().mean() > 0.8, errors
    _, layer, plan = parts_of(session.cache.layers[-1], session.policy.plan.layers[-1])[-1]
    memory: Any = layer.memory
    if bare(spec.rpartition("|")[2]) in ("mpcache", "quest") and memory is not None:
        planned: Any = plan
        assert memory.clusters >= planned.counts[0] + 6


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL_PRIVATE)
def test_stock_equals_plain(spec: str) -> None:
    s, context, ask = shape(layers=2), tokens(CONTEXT), chunks(1, 2, 1)  # no choice is a near tie
    want, _ = plain(spec, s, context, ask)
    got, _ = secure(spec, s, context, ask, protocol="stock")
    assert all((a - b).abs().max() < 0.2 for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------- of single policies


def test_a_sharing_layer_selects_nothing() -> None:
    spec = SMALL["mpcache"].replace("share=none", "share=1-2-3")
    ledger = cost(spec, shape(layers=4), CONTEXT, [1, 1])
    for layer, selects in ((0, True), (1, True), (2, False), (3, False)):
        names = {step for step in ledger.steps if step.startswith(f"decode1/layer{layer}/")}
        assert any("/select" in name for name in names) is selects
        assert any(name.endswith("/gather") for name in names) is not selects
        assert any(name.endswith("/scatter") for name in names)
    # Nor does it hold representatives.
    plan = parse_policy(spec).plan(CONTEXT, shape(layers=4))
    assert [bool(layer.representatives) for layer in plan.layers] == [True, True, False, False]


def test_between_refreshes_nothing_is_selected() -> None:
    ledger = cost(SMALL["mpcache"] + ",refresh=3", shape(layers=1), CONTEXT, [2, 1, 1, 1, 1, 1])
    select = [any(s.startswith(f"decode{i}/") and "/select" in s for s in ledger.steps) for i in range(1, 6)]
    assert select == [True, False, False, True, False]


@pytest.mark.parametrize("first", by_name(name for name, cls in POLICIES.items() if cls.evicts))
@pytest.mark.parametrize("then", by_name(name for name, cls in POLICIES.items() if cls.selects))
def test_any_two_that_may_stand_together(first: str, then: str) -> None:
    right = {
        "quest": "quest:page=2,pages=1,full=0",
        "mpcache": "mpcache:coarse=2,fine=1,sink=0,recent=1,coarse_keep=1,fine_keep=1",
        "oracle": "oracle:k=3",
        "pod": "pod:sink=1,recent=2",
        "tidal": "tidal:k=3,full=0,dense=false",
        "delta": "delta:page=1,pages=2,recent=0,full=0,dense=false",
        "recycled": "recycled:k=3,dense=false",
        "tokenselect": "tokenselect:k=3,sink=0,recent=0",
        "hip": "hip:k=2,block=1,sink=0,recent=0,full=0",
    }[then]
    small = "compact:keep=9,counts=equal" if first == "compact" else SMALL[first]  # all heads alike
    s, ops, left = shape(), Counting(), parse_policy(small)
    _, session = plain(f"{small}|{right}", s, tokens(CONTEXT), chunks(1), ops=ops)
    kept = [layer.kept for layer in left.plan(CONTEXT, s).layers]
    assert [layer.kept for layer in session.policy.plan.layers] == kept
    behind = [parse_policy(right).as_selector().plan(n, s).layers[i].attended for i, n in enumerate(kept)]
    assert [most - 1 for _, most in ops.seen] == behind
    assert POLICIES[then].attends_to_all or all(b < n for b, n in zip(behind, kept, strict=True))


def test_a_part_that_does_nothing_changes_nothing() -> None:
    s, ask = shape(), chunks(3, 1, 1, 1)
    for combined, alone in (
        (SMALL["snapkv"] + "|quest:pages=1.0,page=4", SMALL["snapkv"]),
        (SMALL["random"] + "|mpcache:coarse=4,fine=2,coarse_keep=1.0,fine_keep=1.0", SMALL["random"]),
        ("random:n_keep=1.0|" + SMALL["quest"], SMALL["quest"]),
        (SMALL["mpcache"] + ",dynamic=false|" + SMALL["mpcache"].replace("n_keep=20,", ""), SMALL["mpcache"]),
    ):
        got, _ = plain(combined, s, tokens(CONTEXT), ask)
        want, _ = plain(alone, s, tokens(CONTEXT), ask)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert (
        parse_policy("mpcache:threshold=0.1|quest").leak == "count"
        and parse_policy(SMALL["snapkv"] + "|quest").leak == "none"
    )


def test_default_sharing_is_by_pairs() -> None:
    policy: Any = parse_policy("mpcache")
    assert policy.leaders(8) == [0, 1, 2, 2, 4, 4, 6, 7]
    assert policy.leaders(5) == [0, 1, 2, 3, 4] and policy.leaders(1) == [0]


def test_observing_adds_no_round() -> None:
    """Evictions and blocks share the rounds of the layer's second half."""
    s = shape(layers=1)
    rounds = {n: cost(SMALL[n], s, CONTEXT, [1] * 9).total("decode8").rounds for n in ("full", "h2o", "tova")}
    assert rounds["h2o"] == rounds["tova"] == rounds["full"]
    spec = SMALL["mpcache"] + ",score=bound"
    ledger = cost(spec, s, CONTEXT, [1] * 9)
    assert any("observe/block" in step for step in ledger.steps)
    assert len({ledger.total(f"decode{i}").rounds for i in range(1, 9)}) == 1


def test_streaming_takes_a_chunk_as_single_tokens() -> None:
    s, ask = shape(), tokens(9, 4)
    whole, _ = plain(SMALL["streaming"], s, tokens(CONTEXT), [ask])
    single, _ = plain(SMALL["streaming"], s, tokens(CONTEXT), [[t] for t in ask])
    torch.testing.assert_close(whole[-1], single[-1], atol=1e-4, rtol=1e-4)


def test_streaming_renumbers_positions() -> None:
    """One step attends as if every key had been rotated to its place in the cache."""
    s = shape(layers=1)
    policy = parse_policy(SMALL["streaming"])  # 2 sinks and 5 tokens before each one
    bound, known = policy.bind(CONTEXT, s), prefilled(policy, s, tokens(CONTEXT))
    session = Session(PlainOps(), None, s, bound)
    session.context(known, KERNELS)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        """(1, heads, d) -> (heads, 1, d)."""
        return rotate(x, *rope_tables(s, torch.tensor([position]))).transpose(0, 1)

    q, k, v = (torch.randn(1, n, s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads))
    run_plain(session.cache.append(session.ops, 0, as_value(turned(k, CONTEXT).transpose(0, 1)), as_value(v)))
    view = bound.view(session.ops, s, session.cache, 0, session.cache.advance(1))
    grouped = (s.kv_heads, s.group, s.head_dim)
    got = run_plain(policy.attend(view, as_value(turned(q, CONTEXT).reshape(grouped))))

    kept = [0, 1, 19, 20, 21, 22, 23]
    unturned = [turned(known.k[0][:, t].unsqueeze(0), -t).transpose(0, 1) for t in kept]
    keys = torch.cat([turned(x, place) for place, x in enumerate([*unturned, k])], 1)
    scores = turned(q, 7).reshape(grouped) @ keys.transpose(1, 2)
    torch.testing.assert_close(
        got, scores.softmax(-1) @ as_tensor(session.cache.whole(0).v), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_the_least_attended_token_dies(name: str) -> None:
    """Against a list of living tokens: one question token, then a step at a time."""
    s = shape(layers=1, heads=4, kv_heads=2)
    policy = parse_policy(SMALL[name])
    plan: Any = policy.plan(CONTEXT, s).layers[0]
    context, ask = tokens(CONTEXT), chunks(*[1] * 12)
    noted: list[torch.Tensor] = []

    class Noting(PlainOps):
        def weighted_sum(self, weights: torch.Tensor, values: torch.Tensor) -> Program[torch.Tensor]:
            noted.append(weights / weights.sum(-1, keepdim=True))
            return super().weighted_sum(weights, values)

    _, session = plain(SMALL[name], s, context, [], ops=Noting())
    sets = s.kv_heads if name == "h2o" else 1
    memory: Any = session.cache.whole(0).memory
    n = plan.kept
    alive = [list(range(n)) for _ in range(sets)]
    paid = [memory.importance[a].tolist() if name == "h2o" else [0.0] * n for a in range(sets)]
    for chunk in ask:
        session.chunk(chunk, 1)
        p = noted[-1]  # (KV, g, n)
        n += 1
        for a in range(sets):
            alive[a].append(n - 1)
            now = (p[a] if name == "h2o" else p.reshape(-1, n)).sum(0).tolist()
            before = [*paid[a], 0.0] if name == "h2o" else [0.0] * n
            paid[a] = [x + y for x, y in zip(before, now, strict=True)]
            if len(alive[a]) > plan.living:
                weak = [t for t in alive[a] if t < n - plan.recent]
                alive[a].remove(min(weak, key=lambda t: (paid[a][t], t)))
            marks = memory.alive[a] if memory.alive is not None else torch.ones(n)
            assert marks.nonzero().flatten().tolist() == alive[a]


def test_snapkv_keeps_the_voted_and_the_window() -> None:
    s = shape(layers=1)
    policy = parse_policy("snapkv:cap=8,queries=3,pool=3")
    known = prefilled(policy, s, tokens(CONTEXT))
    rows = policy.evict(known, 0, policy.plan(CONTEXT, s), KERNELS)
    for head in range(s.kv_heads):
        votes = torch.zeros(CONTEXT)
        for h in range(head * s.group, (head + 1) * s.group):
            for i in range(3):
                last = CONTEXT - 3 + i
                votes[: last + 1] += torch.softmax(known.k[0][head, : last + 1] @ known.q_window[0][h, i], 0)
        before = [0.0, *votes[: CONTEXT - 3].tolist(), 0.0]
        pooled = [sum(before[t : t + 3]) for t in range(CONTEXT - 3)]
        best = sorted(range(CONTEXT - 3), key=lambda t: -pooled[t])[:5]
        assert rows[head].tolist() == sorted(best) + [21, 22, 23]


def test_oracle_runs_in_plaintext_only() -> None:
    s = shape()
    with pytest.raises(PolicyError, match="plaintext only"):
        cost("oracle", s, CONTEXT, [1])


BAD = [
    ("mpcache:n_keep=0", "n_keep.*1 or more"),
    ("mpcache:n_keep=25", "n_keep=25 .* 1 to 24"),
    ("mpcache:n_keep=1.5", "n_keep"),
    ("mpcache:n_keep=8/8/8", "n_keep=8/8/8 .* 2 layers"),
    ("mpcache:n_keep=8/9,share=0-1", "n_keep=8/9 .* layers 0 and 1"),
    ("mpcache:coarse=6,fine=4", "fine=4 .* divisor of coarse, 6"),
    ("mpcache:coarse=4,coarse_keep=3,n_keep=24,recent=12", "coarse_keep=3 .* 1 to 2"),
    ("mpcache:share=0-2", "share=0-2 .* layers 0 to 1"),
    ("mpcache:share=0-1/1-0", "share"),
    ("mpcache:share=1", "share"),
    ("mpcache:alpha=1.5", "alpha=1.5 .* 0 to 1"),
    ("mpcache:score=best", "score=best .* linear, mean, bound"),
    ("mpcache:score=bound,blocks=mean", "blocks=mean .* auto, extremes"),
    ("mpcache:gqa=both", "gqa=both .* head, sum"),
    ("mpcache:refresh=0", "refresh=0"),
    ("mpcache:threshold=1.5", "threshold=1.5 .* 0 to 1"),
    ("mpcache:threshold=0.1,n_keep=8/25", "n_keep=8/25 .* 1 to 24"),
    ("mpcache:sink=-1", "sink=-1"),
    ("mpcache:keep=3", "no option 'keep'.*options"),
    ("quest:pages=7,page=4", "pages=7 .* 1 to 6"),
    ("quest:full=3", "full=3 .* 0 to 2"),
    ("quest:share=0-1", "share=0-1"),
    ("streaming:recent=25", "recent=25 .* 1 to 24"),
    ("snapkv:cap=25", "cap=25 .* 1 to 24"),
    ("snapkv:pool=4", "pool=4 .* odd"),
    ("h2o:heavy=25", "heavy=25 .* 1 to 24"),
    ("tova:cap=0", "cap"),
    ("random:n_keep=30", "n_keep=30 .* 1 to 24"),
    ("oracle:k=25", "k=25 .* 1 to 24"),
    ("compact:keep=25,counts=equal", "keep=25 .* 1 to 24"),
    ("compact:score=best", "score=best .* kvzip., kvzip, rms, expected"),
    ("compact:counts=public", "counts=public .* curve, joint, adakv, equal"),
    ("compact:refit=values", "refit=values .* both, bias, none"),
    ("compact:heads=3/4/5", "heads=3/4/5 .* one number, 2, or 4: for each KV head"),
    ("compact:heads=3/25", "heads=3/25 .* 1 to 24"),
    ("compact:heads=9/12|mpcache:share=0-1", "layers 0 and 1 keep tokens of their own .* share=none"),
    ("compact:counts=equal|mpcache:share=0-1", "layers 0 and 1 keep tokens of their own .* share=none"),
    ("compact:heads=9/12|quest:page=4,pages=3", "behind compact:heads=9/12, policy quest: pages=3"),
    ("snapvk", "did you mean snapkv"),
    ("full|quest", "full evicts no context; on the left of . may stand streaming, snapkv"),
    ("snapkv|h2o", "h2o selects nothing; on the right of . may stand quest, mpcache, tidal.*, oracle"),
    ("snapkv|quest|quest", "more than two parts"),
    ("snapkv|quset", "did you mean quest"),
    ("snapkv:cap=30|quest", "cap=30 .* 1 to 24"),
    ("snapkv:cap=9|quest:page=4,pages=3", "behind snapkv:cap=9, policy quest: pages=3 .* 1 to 2"),
    ("snapkv|mpcache:n_keep=9", "n_keep=9 .* none on the right"),
    ("mpcache:n_keep=8/9,share=none|quest:full=0,share=0-1", "layers 0 and 1 keep 8 and 9 tokens"),
]


@pytest.mark.parametrize(("spec", "said"), BAD)
def test_bad_options_are_one_line_that_names_the_range(spec: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said) as caught:
        parse_policy(spec).plan(CONTEXT, shape())
    assert "\n" not in str(caught.value)
