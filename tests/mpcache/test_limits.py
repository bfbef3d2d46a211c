"""What the document's owner sees of its values, it checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcache.config import PublicConfig
from mpcache.errors import OutOfRange, PeerFailed
from mpcache.limits import check_document, largest_score_held
from mpcache.model import Model, load_model
from mpcache.model.prefill import largest_score, prefill
from mpcache.policy import parse_policy
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
