"""compact: what stays, how much of each head, and how it is fitted; against literal readings of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpcache.answer import bind_to_document
from mpcache.errors import ModelError, OutOfRange, PolicyError
from mpcache.limits import check_fitted, largest_score_held
from mpcache.model import demo_model_dir, load_model
from mpcache.model.prefill import prefill
from mpcache.model.reread import LEAD, reread
from mpcache.policy import counts, curve, parse_policy
from mpcache.policy.curve import LEVELS, HeadCurve, curve_of, read_curve
from mpcache.policy.plan import SplitPlan
from mpcache.policy.refit import (
    LARGEST_BIAS,
    Targets,
    chosen_targets,
    fit,
    fit_biases,
    fit_values,
    reference_queries,
    targets_of,
)
from mpcache.policy.scores import SCORES, SINK, best_queries, score_tokens
from tests.support.literal_compact import best_positions, dealt, joint_counts, repeated
from tests.support.tiny_policies import KERNELS, chunks, model, plain, prefilled, shape, tokens

CASES = 150


# -------------------------------------------------------------------------------- the second reading


def test_a_second_reading_is_the_document_going_on() -> None:
    """Behind the document, with all of it in view: as if the chunk had come next."""
    s, ids = shape(), tokens(40)
    known = prefill(model(s), ids)
    (part,) = reread(known)
    assert (part.begin, part.end) == (0, 40)
    longer = prefill(model(s), [*ids, *ids], window=40)
    for layer in range(s.layers):
        torch.testing.assert_close(part.q[layer], longer.q_window[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(part.k[layer], longer.k[layer][:, 40:], atol=1e-4, rtol=1e-4)


def test_a_second_reading_fits_into_the_models_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcache.model.reread.SHORTEST", 16)
    s, ids = shape(max_positions=70), tokens(40)
    first, second = reread(prefill(model(s), ids))
    assert [(p.begin, p.end) for p in (first, second)] == [(0, 22), (22, 40)]
    assert second.q[0].shape[1] == 18 + LEAD  # with the tokens that lead to it
    overlapping = reread(prefill(model(s), tokens(66)))  # positions of the document's end are used again
    assert [p.end - p.begin for p in overlapping] == [16, 16, 16, 16, 2]
    assert all(torch.isfinite(p.q[-1]).all() for p in overlapping)


# ------------------------------------------------------------------------------- what a token is worth


def nested(x: torch.Tensor) -> Any:
    return x.tolist()


def test_the_best_tokens_are_the_literal_ones() -> None:
    """Scores of a second reading, with and without weights, and what stays by them; many small cases."""
    rng = random.Random(1)
    for case in range(CASES):
        kv, group = rng.choice([(1, 1), (1, 3), (2, 2)])
        s = shape(layers=1, heads=kv * group, kv_heads=kv)
        context = rng.choice([1, 2, 7, 9, 17, 30])
        known = prefill(model(s, case % 7), tokens(context, case))
        (part,) = reread(known)
        name = rng.choice(["kvzip", "kvzip+"])
        n = rng.randint(1, context)
        k, v = known.k[0], known.v[0]
        keys = torch.cat([k[:, :SINK], k, part.k[0]], 1)
        rows, columns = [1.0] * context, [[1.0] * context for _ in range(s.heads)]
        if name == "kvzip+":
            out = model(s, case % 7).weights.layers[0].wo.reshape(s.heads, s.head_dim, -1)
            columns = [nested((v[h // group] @ out[h]).norm(dim=-1)) for h in range(s.heads)]
            rows = nested(1 / part.sizes[0])
        want, whose = repeated(
            nested(part.q[0]), nested(keys), min(SINK, context), context, group, rows, columns
        )
        scale = torch.tensor(columns)
        got, query = KERNELS.repeat_importance(
            part.q[0], keys, min(SINK, context), context, torch.tensor(rows), scale
        )
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=1e-3)
        for head in range(kv):  # the same query, or one that looks as much
            for t, (mine, theirs) in enumerate(zip(query[head].tolist(), whose[head], strict=True)):
                assert mine == theirs or abs(got[head, t] - want[head][t]) < 1e-5
        policy = parse_policy(f"compact:heads={n},counts=equal,score={name},refit=none")
        rows_kept = policy.evict(known, 0, policy.plan(context, s), KERNELS)
        values = nested(score_tokens(name, known, 0, KERNELS, n))
        for head in range(kv):
            assert rows_kept[head].tolist() == best_positions(values[head], n, 4, 4)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("context", [1, 3, 9, 40])
def test_every_score_takes_contexts_of_any_length(name: str, context: int) -> None:
    s = shape(layers=2)
    policy = parse_policy(f"compact:score={name},counts=equal,keep=0.3")
    known = prefilled(policy, s, tokens(context))
    budget = policy.plan(context, s).kept
    for layer in range(2):
        scores = score_tokens(name, known, layer, KERNELS, budget)
        assert scores.shape == (s.kv_heads, context) and not scores.isnan().any()
        assert policy.evict(known, layer, policy.plan(context, s), KERNELS).shape == (s.kv_heads, budget)


def test_a_score_is_computed_once_for_all_budgets() -> None:
    s = shape()
    known = prefill(model(s), tokens(30))
    first = score_tokens("kvzip+", known, 0, KERNELS, 5)
    assert score_tokens("kvzip+", known, 0, KERNELS, 9) is first
    assert known.last_queries(0).notes is known.notes


# --------------------------------------------------------------------------------- counts of the heads


def test_counts_of_a_document_are_the_literal_ones() -> None:
    rng = random.Random(2)
    for _ in range(CASES):
        layers, kv, context = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 30)
        budget = rng.randint(1, context)
        whole = torch.randint(0, 6, (layers, kv, context)).float()  # full of ties
        heads = nested(whole.flatten(0, 1))
        joint = counts.joint(whole, budget)
        own = counts.least_of(budget)
        assert joint.flatten().tolist() == joint_counts(heads, budget, own)
        ada = counts.adakv(whole, budget)
        own = max(own, int(0.2 * budget))
        assert ada.tolist() == [joint_counts(nested(layer), budget, own) for layer in whole]
        for found in (joint, ada):
            assert found.sum() == budget * layers * kv and found.min() >= min(8, budget)
            assert found.max() <= context


def test_shares_are_those_of_dealing_in_small_steps() -> None:
    rng = random.Random(3)
    levels = [0.0, 0.1, 0.3, 0.6, 1.0]
    for _ in range(12):
        errors = [[rng.random() * 2 ** -(3 * i) for i in range(4)] + [0.0] for _ in range(3)]
        ratio = rng.choice([0.05, 0.2, 0.5])
        got = counts.shares(levels, torch.tensor(errors, dtype=torch.float64)[None], ratio)[0]
        assert float(got.sum()) == pytest.approx(3 * ratio)
        assert got.tolist() == pytest.approx(dealt(levels, errors, ratio), abs=4e-3)


def test_counts_of_a_curve_add_up_to_the_budget() -> None:
    rng = random.Random(4)
    for _ in range(CASES):
        layers, kv, context = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 900)
        budget = rng.randint(1, context)
        share = torch.rand(layers, kv, dtype=torch.float64) ** rng.choice([1, 8])
        found = counts.from_shares(share, budget, context)
        assert int(found.sum()) == budget * layers * kv
        assert counts.least_of(budget) <= int(found.min()) and int(found.max()) <= context


# -------------------------------------------------------------------------------------------- the refit


def queries_and_context(seed: int, n: int = 60, length: int = 30) -> tuple[Targets, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(m, 8, generator=g) for m in (n, length, length))
    return targets_of(2 * q, k, v), v


def test_a_refit_answers_nearer_to_the_whole() -> None:
    for seed in range(5):
        targets, v = queries_and_context(seed)
        kept = targets.attention.sum(0).topk(10).indices.sort().values

        def missed(bias: torch.Tensor, values: torch.Tensor) -> float:
            x = targets.attention[:, kept] * bias.exp()  # noqa: B023
            return float((x / x.sum(-1, keepdim=True) @ values - targets.out).square().mean())  # noqa: B023

        bias, values = fit(targets, kept, v)
        plain_error = missed(torch.zeros(10), v[kept])
        assert missed(bias, values) < 0.75 * plain_error
        assert missed(bias, values) < missed(bias, v[kept])
        assert bias.abs().max() <= LARGEST_BIAS + 1e-6


def test_biases_solve_the_bounded_least_squares() -> None:
    """No feasible small move does better; and a kept key in place of several equal ones gets their number."""
    targets, _ = queries_and_context(7)
    kept = torch.arange(0, 30, 3)
    b = fit_biases(targets, kept).double()
    m = targets.attention[:, kept].double()
    ridge = 1e-3 * m.square().sum(0).mean()

    def cost(x: torch.Tensor) -> float:
        return float((m @ x - 1).square().sum() + ridge * (x - 1).square().sum())

    least = cost(b)
    for i in range(len(b)):
        for move in (-0.02, 0.02):
            x = b.clone()
            x[i] = (x[i] + move).clamp(torch.e**-3, torch.e**3)
            assert cost(x) >= least - 1e-4 * least
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(40, 4, generator=g), torch.randn(3, 4, generator=g)
    many = targets_of(q, torch.cat([k[:1].expand(5, -1), k[1:]]), torch.zeros(7, 4))
    assert fit_biases(many, torch.tensor([0, 5, 6])).tolist() == pytest.approx([5, 1, 1], rel=0.05)


def test_values_solve_the_ridge_regression() -> None:
    targets, v = queries_and_context(8)
    kept, factors = torch.arange(0, 30, 3), torch.ones(10)
    got = fit_values(targets, kept, factors, v).double()
    x = targets.attention[:, kept].double()
    x = x / x.sum(-1, keepdim=True)
    ridge = 1e-2 * x.square().sum(0).mean()
    gradient = x.T @ (x @ got - targets.out.double()) + ridge * (got - v[kept].double())
    assert gradient.abs().max() < 1e-5


def test_of_many_queries_each_keys_best_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(m, 8, generator=g) for m in (60, 30, 30))
    targets, kept = targets_of(q, k, v), torch.tensor([2, 11])
    assert torch.equal(chosen_targets(q, k, v, kept, None).attention, targets.attention)
    monkeypatch.setattr("mpcache.policy.refit.ALL_ROWS", 20)
    monkeypatch.setattr("mpcache.policy.refit.RANDOM_ROWS", 5)
    for best in (None, targets.attention.argmax(0)):
        fewer = chosen_targets(q, k, v, kept, best)
        assert len(fewer.attention) <= 7
        for key in kept.tolist():
            assert fewer.attention[:, key].max() == pytest.approx(float(targets.attention[:, key].max()))


def test_the_query_that_looks_most_is_known_by_the_rows_of_the_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a context is read again in several chunks."""
    s, ids = shape(), tokens(20)
    monkeypatch.setattr("mpcache.model.reread.CHUNK", 9)
    known = prefill(model(s), ids)
    assert best_queries(known, 0, "kvzip") is None
    SCORES["kvzip"].of(known, 0, KERNELS, 0)
    best, parts = best_queries(known, 0, "kvzip"), reread(known)
    assert best is not None and best_queries(known, 0, "kvzip+") is None and len(parts) > 1
    assert best_queries(known, 0, "rms") is None
    for head in range(s.kv_heads):
        q, before = reference_queries(parts, 0, head, s.kv_heads), 0
        for part in parts:
            own, n = part.k[0][head], part.q[0].shape[1]
            keys = torch.cat([known.k[0][head, :4], known.k[0][head, part.begin : part.end], own])
            scores = q[before : before + s.group * n] @ keys.T
            later = torch.ones(n, n).triu_(1).repeat(s.group, 1).bool()
            scores[:, -n:] = scores[:, -n:].masked_fill(later, -torch.inf)
            most = scores.softmax(-1)[:, 4 : 4 + part.end - part.begin].argmax(0) + before
            assert torch.equal(best[head, part.begin : part.end], most)
            before += len(scores)
        assert before == len(q)


def test_heads_that_keep_most_of_theirs_are_not_fitted() -> None:
    s, ids = shape(), tokens(20)
    known = prefill(model(s), ids)
    policy = parse_policy("compact:heads=6/15,counts=equal")
    few, many = policy.retain(known, 0, policy.plan(20, s), KERNELS)
    assert few.bias is not None and many.bias is not None
    assert few.bias.abs().max() > 0 and not many.bias.any()
    assert torch.equal(many.v[0], known.v[0][1][many.rows[0]])
    assert torch.equal(few.k[0], known.k[0][0][few.rows[0]])  # keys are never touched
    q = reference_queries(reread(known), 0, 0, s.kv_heads)
    bias, values = fit(targets_of(q, known.k[0][0], known.v[0][0]), few.rows[0], known.v[0][0])
    assert torch.equal(few.bias[0], bias) and torch.equal(few.v[0], values)


def test_values_that_fixed_point_cannot_hold_are_refused() -> None:
    s, ids = shape(), tokens(20)
    policy = parse_policy("compact:heads=6/15,counts=equal").bind(20, s)
    assert largest_score_held(policy, s) == largest_score_held(parse_policy("full").bind(20, s), s) - 3
    known = prefill(model(s), ids)
    check_fitted(known, policy, KERNELS, 6)
    wide = prefill(model(s), ids)
    wide.v[1].mul_(1e4)
    with pytest.raises(OutOfRange, match="layer 1: values of the document reach"):
        check_fitted(wide, policy, KERNELS, 6)


# ------------------------------------------------------------------------------------------- the curve


def some_curve(layers: int, kv: int, digest: str = "0" * 64) -> HeadCurve:
    g = torch.Generator().manual_seed(0)
    errors = torch.rand(layers, kv, len(LEVELS), generator=g, dtype=torch.float64).sort(-1, descending=True)
    return HeadCurve(digest, errors.values, {"judged": True})


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    made = some_curve(2, 3)
    file.write_text(made.to_json())
    again = read_curve(file)
    assert again.digest == made.digest and again.check == made.check
    assert torch.equal(again.counts(20, 100), made.counts(20, 100))
    for damage in (
        {"version": 2},
        {"levels": [0, 1]},
        {"errors": [[1]]},
        {"model_digest": "x"},
        {"check": 1},
    ):
        file.write_text(json.dumps(json.loads(made.to_json()) | damage))
        with pytest.raises(ModelError, match="is no curve of this release; make it anew"):
            read_curve(file)
    for text in ("", "[]", "nan", made.to_json().replace("[[[", "[[[-")):
        file.write_text(text)
        with pytest.raises(ModelError, match="no curve"):
            read_curve(file)


def test_a_curve_belongs_to_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model or apart; one of another model is none."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = tmp_path / "model"
    folder.mkdir()
    mine: Any = SimpleNamespace(digest="a" * 64, path=folder, shape=shape(layers=2))
    beside, apart = curve.places(folder, mine.digest)
    assert curve_of(mine) is None
    beside.write_text(some_curve(2, 2, "b" * 64).to_json())
    assert curve_of(mine) is None
    apart.parent.mkdir(parents=True)
    apart.write_text(some_curve(2, 2, mine.digest).to_json())
    found = curve_of(mine)
    assert found is not None and found.digest == mine.digest
    beside.write_text(some_curve(3, 2, mine.digest).to_json())
    with pytest.raises(ModelError, match="not the curve of a model of 2 layers and 2 KV heads"):
        curve_of(mine)


def test_the_demo_models_curve_is_its_own() -> None:
    demo = load_model(demo_model_dir())
    found = curve_of(demo)
    assert found is not None and found.digest == demo.digest
    right, full = found.check["right"], found.check["full"]
    assert full >= 20 and right["20"] == right["10"] == full and right["5"] <= full
    greedy = found.counts(88, 880)
    assert greedy.sum() == 88 * 12 and int(greedy.max()) > 400


# ------------------------------------------------------------------------------------ what it reveals


def test_a_model_without_a_curve_is_one_line() -> None:
    s = shape()
    lonely: Any = SimpleNamespace(digest="c" * 64, path=Path("/nowhere"), shape=s)
    with pytest.raises(
        PolicyError, match="this model has no curve; .*mpcache calibrate.*counts=joint"
    ) as caught:
        parse_policy("compact").bind(40, s).count_from_model(lonely)
    assert "\n" not in str(caught.value)


def test_counts_of_the_model_do_not_depend_on_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leak class model-count: nothing but the model and the length tells them; count: the document does."""
    s = shape()
    for rule, leak, same in (
        ("curve", "model-count", True),
        ("joint", "count", False),
        ("adakv", "count", False),
    ):
        policy = parse_policy(f"compact:keep=12,counts={rule}")
        monkeypatch.setattr("mpcache.policy.compact.curve_of", lambda model: some_curve(2, 2))
        assert policy.leak == leak and not policy.plan_is_public
        found = set()
        for seed in range(4):
            known = prefilled(policy, s, tokens(40, seed))
            bound, told = bind_to_document(policy.bind(40, s), s, known, KERNELS)
            assert sum(told) == 12 * 4 and bound.plan_is_public and bound.leak == leak
            assert bound.policy.counts_given == tuple(told)
            found.add(tuple(told))
        assert (len(found) == 1) is same
    assert parse_policy("compact:counts=equal").leak == "none"
    assert parse_policy("compact:counts=joint|quest").leak == "count"


def test_a_price_is_of_heads_that_keep_the_same() -> None:
    s = shape()
    bound = parse_policy("compact").bind(200, s)
    assert [layer.kept for layer in bound.priced(s).plan.layers] == [40, 40]
    assert bound.priced(s).plan_is_public and bound.plan.attended == 200
    for context, kept in ((20, 20), (100, 32)):  # a short context is worth no eviction
        assert parse_policy("compact").priced(context, s).kept == kept
    split = parse_policy("compact:heads=10/30").plan(100, s)
    assert all(isinstance(layer, SplitPlan) for layer in split.layers)
    assert split.kept == 20 and split.attended == 30 and split.tokens_attended(2) == 20
    assert [line.partition(": ")[2] for line in split.lines()] == ["kept 10/30, attended 10/30"]


def test_biases_are_added_to_the_kept_context_alone() -> None:
    """One step by hand: scores and biases, over kept tokens and the question's."""
    s, ids, ask = shape(layers=1), tokens(24), chunks(1)
    got, session = plain("compact:heads=5/9,counts=equal", s, ids, ask)
    bare, other = plain("compact:heads=5/9,counts=equal,refit=none", s, ids, ask)
    parts: Any = session.cache.layers[0]
    untouched: Any = other.cache.layers[0]
    assert [p.bias.shape for p in parts.parts] == [(1, 1, 5), (1, 1, 9)]
    assert all(p.bias is None for p in untouched.parts)
    assert (got[0] - bare[0]).abs().max() > 1e-3
