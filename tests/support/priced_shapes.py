"""Two shapes, one of each family, small and with no two sizes alike."""

from __future__ import annotations

from dataclasses import replace

from mpcache.model.shape import ModelShape

LLAMA = ModelShape(
    layers=4, width=24, heads=4, kv_heads=2, head_dim=6, ffn=40, vocab=30, max_positions=256, norm="rms",
    norm_eps=1e-5, activation="silu", gated=True, positions="rope",
)  # fmt: skip
GPT = replace(
    LLAMA, layers=4, kv_heads=4, activation="gelu_tanh", gated=False, positions="learned", norm="layer",
    qkv_bias=True, o_bias=True, mlp_bias=True, lm_bias=True,
)  # fmt: skip
