"""Describe what is public about a model: the sizes and choices that its decode program depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mpcache.errors import ModelError
from mpcache.model.checks import check_flag, check_one_of, check_positive, check_whole, first_words, shorten

# Literals and not enums: a shape's values are written to JSON and compared with what a peer sends.
NormKind = Literal["rms", "layer"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh"]
PositionKind = Literal["rope", "learned"]
ScalingKind = Literal["linear", "llama3"]

NORMS: tuple[NormKind, ...] = get_args(NormKind)
ACTIVATIONS: tuple[ActivationKind, ...] = get_args(ActivationKind)
POSITIONS: tuple[PositionKind, ...] = get_args(PositionKind)
ROPE_SCALINGS: tuple[ScalingKind, ...] = get_args(ScalingKind)

# Larger sizes than any model has. A shape also comes from files and peers: it must not make its reader
# count to a trillion layers.
LARGEST = {
    "layers": 1 << 12, "width": 1 << 20, "heads": 1 << 12, "kv_heads": 1 << 12, "head_dim": 1 << 14,
    "ffn": 1 << 22, "vocab": 1 << 24, "max_positions": 1 << 26,
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `linear` divides all by `factor`; `llama3` divides those slower than `low` turns per `original`
    positions, keeps those faster than `high`, and blends between. `linear` uses `factor` alone.
    """

    kind: ScalingKind
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192  # positions of the context the frequencies were trained for

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range."""
        check_one_of("rope scaling", self.kind, ROPE_SCALINGS)
        for name in ("factor", "low", "high"):
            check_positive(f"rope {name}", getattr(self, name))
        check_whole("rope original", self.original)
        if self.kind == "llama3" and self.high <= self.low:
            raise ValueError(f"rope scaling needs high > low, got {self.high} and {self.low}")


@dataclass(frozen=True)
class ModelShape:
    """All that is public about a model: enough to plan, price and run the decode program.

    Attention: `heads` query heads of `head_dim` share `kv_heads` key-value heads, in consecutive
    groups of `group`. MLP: down(act(gate(x)) * up(x)) when `gated`, else down(act(up(x))).
    `max_positions` is what the model can attend to, in tokens: where a model has a sliding window
    it is the window, because up to there attention is full. The bias flags tell what the program
    adds after folding (`mpcache.model.folding`), so the two-matrix families that fold a LayerNorm
    have all of them. `norm` names the norm that the checkpoint was trained with; folding makes one
    norm of both, the only one that the program has.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm: NormKind
    norm_eps: float
    activation: ActivationKind
    gated: bool
    positions: PositionKind
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_bias: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range."""
        for name, largest in LARGEST.items():
            if check_whole(name, getattr(self, name)) > largest:
                raise ValueError(f"{name} is {shorten(getattr(self, name))}; at most {largest} is possible")
        for name in ("gated", "qkv_bias", "o_bias", "mlp_bias", "lm_bias"):
            check_flag(name, getattr(self, name))
        check_positive("norm_eps", self.norm_eps, below=1.0)
        check_positive("rope_theta", self.rope_theta)
        check_one_of("norm", self.norm, NORMS)
        check_one_of("activation", self.activation, ACTIVATIONS)
        check_one_of("positions", self.positions, POSITIONS)
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if type(token) is not int or not 0 <= token < self.vocab:
                raise ValueError(f"token id {token!r} is outside the vocabulary of {self.vocab}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, in the order of the fields."""
        return {**dataclasses.asdict(self), "eos_ids": list(self.eos_ids)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelShape:
        """Invert `to_dict`, for JSON from elsewhere. Raises ModelError."""
        try:
            values = dict(data)
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            values["eos_ids"] = tuple(values.get("eos_ids", ()))
            return ModelShape(**values)
        except (TypeError, ValueError) as error:
            raise ModelError(f"model shape: {first_words(error)}") from error
