from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mpcache.model import ModelShape, RopeScaling
from mpcache.model.rope import rope_tables, rotate

SHAPE = ModelShape(
    layers=1, width=64, heads=4, kv_heads=2, head_dim=24, ffn=8, vocab=9, max_positions=4096, norm="rms",
    norm_eps=1e-5, activation="silu", gated=True, positions="rope", rope_theta=10000.0,
)  # fmt: skip
SCALINGS = [None, RopeScaling("linear", 3.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 512)]


def _transformers(shape: ModelShape) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if (s := shape.rope_scaling) is not None:
        parameters |= {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            parameters |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
            parameters |= {"original_max_position_embeddings": s.original}
    config = LlamaConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["none", "linear", "llama3"])
@pytest.mark.parametrize("theta", [10000.0, 5e5])
def test_tables_and_rotation_equal_transformers(scaling: RopeScaling | None, theta: float) -> None:
    shape = dataclasses.replace(SHAPE, rope_theta=theta, rope_scaling=scaling)
    positions = torch.tensor([0, 1, 2, 17, 400, 1000])
    x = torch.randn(6, 4, 24, generator=torch.Generator().manual_seed(1))
    cos, sin = rope_tables(shape, positions)
    assert cos.shape == sin.shape == (6, 24) and cos.dtype == torch.float64
    theirs = _transformers(shape)(x, positions[None])
    # Theirs multiplies in float32: an angle near 1000 is off by up to 6e-5.
    torch.testing.assert_close(cos.float(), theirs[0][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(sin.float(), theirs[1][0], atol=1e-4, rtol=0)
    want, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), *theirs)
    got = rotate(x, cos, sin)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, want[0].transpose(0, 1), atol=5e-4, rtol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 3, 24, dtype=torch.float64, generator=generator)

    def score(at: int, to: int) -> torch.Tensor:
        turned_q, turned_k = (
            rotate(x, *rope_tables(SHAPE, torch.tensor([p]))) for x, p in ((q, at), (k, to))
        )
        return (turned_q * turned_k).sum(-1)

    torch.testing.assert_close(score(9, 4), score(1009, 1004))
    torch.testing.assert_close(score(0, 0), (q * k).sum(-1))


def test_one_pair_by_hand() -> None:
    shape = dataclasses.replace(SHAPE, head_dim=2)
    turned = rotate(torch.tensor([[[1.0, 0.0]]]), *rope_tables(shape, torch.tensor([2])))
    torch.testing.assert_close(turned, torch.tensor([[[math.cos(2), math.sin(2)]]]))
