"""What the document's owner sees of its values, it checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.config import PublicConfig, load_settings
from mpcache.errors import OutOfRange, PeerFailed, PolicyError
from mpcache.limits import bind_policy, check_document, largest_score_held, with_default_policy
from mpcache.model import Model, demo_model_dir, load_model
from mpcache.model.prefill import largest_score, prefill
from mpcache.policy import parse_policy
from mpcache.policy.curve import LEVELS, HeadCurve, places
from mpcache.protocols.ranges import LARGEST_SCORE, largest_value
from mpcache.rank import Rank
from mpcache_parties.private_inputs import Question
from tests.support.session import run_session
from tests.support.tiny_models import make, save

IDS = [1, *range(5, 64)]


@pytest.fixture
def biased(tmp_path: Path) -> Model:
    """A model whose keys have a large constant part, as those of a Qwen2 have."""
    hf: Any = make("qwen2")
    with torch.no_grad():
        for name, sizes in (("k_proj", (120.0, -120.0)), ("q_proj", (60.0, -50.0))):
            bias = getattr(hf.model.layers[0].self_attn, name).bias
            bias[7], bias[15] = sizes
    return load_model(save(hf, tmp_path))


def test_the_largest_score_is_exact_where_it_matters() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(4, 600, 8), torch.randn(2, 600, 8)
    scores = torch.matmul(q, k.repeat_interleave(2, 0).transpose(1, 2)).tril().abs().max()
    assert largest_score(q, k, 0.0) == pytest.approx(float(scores))
    assert float(scores) <= largest_score(q, k, 1e9) < 1e3


def test_scores_of_the_document_out_of_range_are_refused(biased: Model) -> None:
    bound = parse_policy("full").bind(len(IDS), biased.shape)
    held = largest_score_held(bound, biased.shape)
    assert held == pytest.approx(LARGEST_SCORE * 8 / 7)
    read = prefill(biased, IDS, exact_from=held)
    with pytest.raises(
        OutOfRange, match="layer 0: attention scores of the document reach .* less than 290.3"
    ):
        check_document(read, bound, biased.shape, 10)
    near = replace(read, largest_scores=(held - 1, *read.largest_scores[1:]))
    check_document(near, bound, biased.shape, 10)


def test_compact_is_the_default_of_a_model_with_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody named a policy; also where the curve lies apart from the model.

    Without one nothing is dropped of a document of the client's.
    """
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = save(make("qwen2"), tmp_path / "model")
    model, settings = load_model(folder), load_settings(None)
    assert with_default_policy(settings, demo_model_dir()).public.policy == "compact"
    named = load_settings(None, {"public.policy": "full"})
    assert with_default_policy(named, demo_model_dir()) is named
    assert with_default_policy(settings, folder).public.policy == "mpcache:score=bound,share=none"
    assert with_default_policy(settings, folder, private=True).public.policy == "full"
    assert with_default_policy(settings, demo_model_dir(), private=True).public.policy == "compact"
    evicted = load_settings(None, {"public.private_policy": "snapkv"})
    assert with_default_policy(evicted, demo_model_dir(), private=True).public.policy == "full"
    assert with_default_policy(evicted, demo_model_dir()).public.policy == "compact"
    errors = torch.zeros(model.shape.layers, model.shape.kv_heads, len(LEVELS), dtype=torch.float64)
    for digest, policy in (("b" * 64, settings.public.policy), (model.digest, "compact")):
        _, apart = places(folder, digest)
        apart.parent.mkdir(parents=True, exist_ok=True)
        apart.write_text(HeadCurve(digest, errors, {}).to_json())
        assert with_default_policy(settings, folder).public.policy == policy


def test_a_missing_curve_is_told_where_it_would_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder, document = save(make("qwen2"), tmp_path / "model"), tmp_path / "document.txt"
    said: list[str] = []
    for model, private, text in (
        (demo_model_dir(), False, document),  # it has one
        (folder, True, document),  # all of it stays
        (folder, False, None),
    ):
        with_default_policy(load_settings(None), model, private, text, said.append)
    with_default_policy(load_settings(None, {"public.policy": "quest"}), folder, False, document, said.append)
    assert said == []
    with_default_policy(load_settings(None), folder, False, document, said.append)
    assert len(said) == 1 and "has no curve" in said[0] and "`mpcache calibrate` makes one" in said[0]


def test_counts_that_are_decided_later_are_not_given() -> None:
    s = load_model(demo_model_dir()).shape
    for spec in ("compact:heads=9/12", "mpcache:threshold=0.1,n_keep=9"):
        with pytest.raises(PolicyError, match="gives counts that are decided later"):
            bind_policy(s, PublicConfig(policy=spec), 50, 5)
    bind_policy(s, PublicConfig(policy="compact:heads=9/12,counts=equal"), 50, 5)


def test_a_private_run_is_refused_before_it_is_wrong(biased: Model) -> None:
    public = PublicConfig(policy="full", max_new_tokens=2)
    ended = run_session(public, biased, IDS, Question("the gate", stop_at_eos=False))
    assert isinstance(ended[Rank.SERVER], OutOfRange)
    assert "attention scores of the document" in str(ended[Rank.SERVER])
    assert isinstance(ended[Rank.CLIENT], PeerFailed) and isinstance(ended[Rank.DEALER], PeerFailed)


def test_summed_heads_hold_less(tmp_path: Path) -> None:
    shape = load_model(save(make("llama-one-kv-head"), tmp_path)).shape
    assert shape.group == 4
    for spec, most in (("quest:gqa=sum", 126), ("snapkv:cap=40|quest:gqa=sum", 126), ("quest", 254)):
        bound = parse_policy(spec).bind(60, shape)
        assert largest_score_held(bound, shape) == pytest.approx(most * 8 / 7)


@pytest.mark.parametrize(("n", "most"), [(512, 128.0), (2048, 32.0), (2049, 32.0), (8192, 32.0)])
def test_values_are_held_against_the_attended_tokens(n: int, most: float, tmp_path: Path) -> None:
    assert largest_value(n) == most
    model = load_model(save(make("llama-gqa"), tmp_path))
    bound = parse_policy("full").bind(len(IDS), model.shape)
    read = prefill(model, IDS)
    for size, fits in ((0.99 * most, True), (most, False)):
        v = read.v[1].clone()
        v[0, 3, 2] = -size
        changed = replace(read, v=(read.v[0], v, *read.v[2:]))
        if fits:
            check_document(changed, bound, model.shape, n - len(IDS))
            continue
        with pytest.raises(OutOfRange, match=f"layer 1: values of the document reach .* {n} attended tokens"):
            check_document(changed, bound, model.shape, n - len(IDS))
