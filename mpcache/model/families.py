"""List the model families: what each reads from its config.json, and how it names its tensors.

What differs between families is FAMILIES, the table at the end of this file; nothing downstream knows
a family's name. A new family is a row there: a reader of its config.json into a ModelShape, and the
names of its tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mpcache.errors import ModelError
from mpcache.model.checks import check_flag, check_positive, check_whole, first_words, shorten
from mpcache.model.shape import ROPE_SCALINGS, ActivationKind, ModelShape, RopeScaling

T = TypeVar("T")


# ---------------------------------------------------------------------------------- config.json


class ConfigValues:
    """A config.json's values by key; None counts as absent, as it does where these files come from.

    source: names the file in a ModelError, which every method but `get` raises on a value that it
    cannot return.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value as it is, or the default."""
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """Return the value as it is; it must be there."""
        if self.values.get(key) is None:
            raise ModelError(f"{self.source}: {key} is missing; use the file that came with the model")
        return self.values[key]

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number above zero; it must be there unless there is a default."""
        return self._checked(check_whole, key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above zero; it must be there unless there is a default."""
        return self._checked(check_positive, key, default)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        return self._checked(check_flag, key, default)

    def _checked(self, check: Callable[[str, object], T], key: str, default: T | None) -> T:
        value = self.need(key) if default is None else self.get(key, default)
        try:
            return check(key, value)
        except ValueError as error:
            raise ModelError(f"{self.source}: {error}") from error

    def table(self, key: str) -> ConfigValues:
        """Return the object under the key, empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise ModelError(f"{self.source}: {key} must be an object, not {shorten(value)}")
        return ConfigValues(value, f"{self.source}: {key}")

    def activation(self, key: str) -> ActivationKind:
        """Return the activation function that the key names; it must be there."""
        name = self.need(key)
        if not isinstance(name, str) or name not in _ACTIVATION_NAMES:
            known = ", ".join(_ACTIVATION_NAMES)
            raise ModelError(f"{self.source}: {key} {shorten(name)} is not supported; supported: {known}")
        return _ACTIVATION_NAMES[name]

    def tokens(self, key: str, vocab: int) -> tuple[int, ...]:
        """Return one id, a list of them, or none.

        An id outside the vocabulary can never come up: it is left out.
        """
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(one) is int for one in ids):
            raise ModelError(f"{self.source}: {key} must be one token id or a list, not {shorten(value)}")
        return tuple(one for one in ids if 0 <= one < vocab)


_ACTIVATION_NAMES: Mapping[str, ActivationKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# ------------------------------------------------------------------------------- what a family is


@dataclass(frozen=True)
class StoredLinear:
    """A linear's place: the stored tensor `name`, or one of `of` equal blocks of its outputs."""

    name: str
    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class Family:
    """What one architecture does its own way. In tensor names, {} is the layer's number."""

    model_type: str  # what `transformers` goes by
    read: Callable[[ConfigValues], ModelShape]  # raises ModelError or ValueError
    prefix: str  # stands before all names but the head's; some checkpoints leave it out
    inputs_first: bool  # linears are stored (inputs, outputs)
    tied: bool  # when config.json does not say
    embed: str
    norms: tuple[str, str, str]  # before attention, before the MLP, last
    linears: Mapping[str, StoredLinear]  # q k v o gate up down
    positions: str = ""
    head: str = "lm_head"
    pairs: bool = False  # q and k are stored with the two dimensions that turn together side by side


def family_of(values: ConfigValues) -> Family:
    """Find the family of a config.json: by `architectures`, or where it has none by `model_type`.

    Raises ModelError when it is not in FAMILIES.
    """
    known = ", ".join(FAMILIES)
    names = values.get("architectures") or [
        name for name, each in FAMILIES.items() if each.model_type == values.get("model_type")
    ]
    if not names:
        kind = values.get("model_type")
        what = "is missing" if kind is None else f"is missing, and model_type {shorten(kind)} not supported"
        raise ModelError(f"{values.source}: architectures {what}; supported: {known}")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"{values.source}: architectures must be one name in a list; supported: {known}")
    if names[0] not in FAMILIES:
        raise ModelError(f"{values.source}: {shorten(names[0])} is not supported; supported: {known}")
    family = FAMILIES[names[0]]
    kind = values.get("model_type", family.model_type)
    if kind != family.model_type:
        raise ModelError(
            f"{values.source}: model_type {shorten(kind)} is not that of {names[0]}, {family.model_type}; "
            "use the config.json that came with the model"
        )
    if values.get("quantization_config") is not None:
        raise ModelError(f"{values.source}: quantized checkpoints are not supported; use the float one")
    for key, usual in _FIXED.items():
        if values.get(key, usual) != usual:
            raise ModelError(
                f"{values.source}: {key} {shorten(values.get(key))} is not supported; leave it out"
            )
    return family


# Keys of any family that would change what is computed, and the one value that each may have.
_FIXED: Mapping[str, Any] = {
    "is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False,
    "per_layer_config": {}, "transformers_weights": None,
}  # fmt: skip


def shape_from_config(config: Mapping[str, Any], source: str = "config.json") -> ModelShape:
    """Read the content of a Hugging Face config.json; `source` names it in a ModelError."""
    values = ConfigValues(config, source)
    family = family_of(values)
    try:
        return family.read(values)
    except ValueError as error:
        raise ModelError(f"{source}: {first_words(error)}") from error


# ------------------------------------------------------------------------------------- readers


def _read_rope(values: ConfigValues) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters` with both."""
    old, new = values.table("rope_scaling"), values.table("rope_parameters")
    given = old if old.values else new
    if any(isinstance(value, dict) for value in given.values.values()):
        raise ModelError(f"{given.source} that differ from layer to layer are not supported")
    for place in (given, values):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{place.source}: partial_rotary_factor other than 1 is not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", given.number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            given.number("factor"),
            given.number("low_freq_factor"),
            given.number("high_freq_factor"),
            # A value beside the table goes before the table's own.
            values.whole(
                "original_max_position_embeddings",
                given.whole("original_max_position_embeddings", values.whole("max_position_embeddings")),
            ),
        )
    elif kind != "default":
        known = ", ".join(("default", *ROPE_SCALINGS))
        raise ModelError(f"{given.source}: rope type {shorten(kind)} is not supported; supported: {known}")
    return given.number("rope_theta", values.number("rope_theta", 10000.0)), scaling


def _read_special_tokens(values: ConfigValues, vocab: int) -> tuple[int | None, tuple[int, ...]]:
    """Read the id of the beginning-of-sequence token, if there is one, and the ids that end an answer."""
    bos = values.tokens("bos_token_id", vocab)
    return bos[0] if bos else None, values.tokens("eos_token_id", vocab)


def _no_window(values: ConfigValues) -> int | None:
    return None


def _always_window(values: ConfigValues) -> int | None:
    """Read the window of every layer: null says that there is none, a missing key 4096."""
    if "sliding_window" in values.values and values.get("sliding_window") is None:
        return None
    return values.whole("sliding_window", 4096)


def _switched_window(values: ConfigValues) -> int | None:
    """Read the window of the layers that have one: those from `max_window_layers` on, or by `layer_types`."""
    layers = values.whole("num_hidden_layers")
    window = _always_window(values) if values.flag("use_sliding_window", False) else None
    kinds = values.get("layer_types")
    if kinds is None:
        return window if _first_window(values) < layers else None
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ModelError(f"{values.source}: layer_types must list one of {', '.join(known)} for each layer")
    if "sliding_attention" not in kinds:
        return None
    if window is None:
        raise ModelError(f"{values.source}: layer_types has sliding_attention, and no window is switched on")
    return window


def _first_window(values: ConfigValues) -> int:
    """Read the first layer that has a window; 0 is one."""
    return 0 if values.get("max_window_layers") == 0 else values.whole("max_window_layers", 28)


def _llama_like(
    window: Callable[[ConfigValues], int | None],
    qkv_bias: bool | str = False,
    o_bias: bool | str = False,
    mlp_bias: bool | str = False,
    kv_heads: int | None = None,
) -> Callable[[ConfigValues], ModelShape]:
    """Make the reader of a Llama relative.

    window: reads the sliding window in tokens; None: there is none. Each bias is a constant or the key
    of the flag that decides it.  kv_heads: how many there are where config.json has no such key; None, and
    where it says null: as many as heads.
    """

    def read(values: ConfigValues) -> ModelShape:
        width, heads = values.whole("hidden_size"), values.whole("num_attention_heads")
        vocab, context = values.whole("vocab_size"), values.whole("max_position_embeddings")
        has_qkv_bias, has_o_bias, has_mlp_bias = (
            values.flag(bias, False) if isinstance(bias, str) else bias
            for bias in (qkv_bias, o_bias, mlp_bias)
        )
        if values.get("head_dim") is None and width % heads:
            raise ModelError(
                f"{values.source}: without head_dim, {heads} heads must divide hidden_size {width}"
            )
        grouped = heads if "num_key_value_heads" in values.values or kv_heads is None else kv_heads
        rope_theta, rope_scaling = _read_rope(values)
        bos_id, eos_ids = _read_special_tokens(values, vocab)
        return ModelShape(
            layers=values.whole("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=values.whole("num_key_value_heads", grouped),
            head_dim=values.whole("head_dim", width // heads),
            ffn=values.whole("intermediate_size"),
            vocab=vocab,
            max_positions=min(context, window(values) or context),
            norm="rms",
            norm_eps=values.number("rms_norm_eps", 1e-6),
            activation=values.activation("hidden_act"),
            gated=True,
            positions="rope",
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=has_qkv_bias,
            o_bias=has_o_bias,
            mlp_bias=has_mlp_bias,
            bos_id=bos_id,
            eos_ids=eos_ids,
        )

    return read


# Names that other families use, which GPT-2's config.json may have in place of its own.
_GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


def _with_gpt2_names(values: ConfigValues) -> ConfigValues:
    """Give each value its own name. Raises ModelError where a value stands under both, and differs."""
    renamed = dict(values.values)
    for other, own in _GPT2_NAMES.items():
        found = values.get(other)
        if found is not None and values.get(own, found) != found:
            raise ModelError(f"{values.source}: {other} and {own} differ, and mean the same; leave one out")
        if found is not None:
            renamed[own] = found
    return ConfigValues(renamed, values.source)


def _read_gpt2(values: ConfigValues) -> ModelShape:
    values = _with_gpt2_names(values)
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if values.flag(key, usual) != usual:
            raise ModelError(f"{values.source}: {key} {str(not usual).lower()} is not supported")
    width, heads, vocab = values.whole("n_embd"), values.whole("n_head"), values.whole("vocab_size")
    if width % heads:
        raise ModelError(f"{values.source}: {heads} heads do not divide n_embd {width}")
    bos_id, eos_ids = _read_special_tokens(values, vocab)
    return ModelShape(
        layers=values.whole("n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn=values.whole("n_inner", 4 * width),
        vocab=vocab,
        max_positions=values.whole("n_positions"),
        norm="layer",
        norm_eps=values.number("layer_norm_epsilon", 1e-5),
        activation=values.activation("activation_function"),
        gated=False,
        positions="learned",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        lm_bias=True,
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


# ----------------------------------------------------------------------------------- the table


_LLAMA = Family(
    model_type="llama",
    read=_llama_like(_no_window, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    prefix="model.",
    inputs_first=False,
    tied=False,
    embed="embed_tokens",
    norms=("layers.{}.input_layernorm", "layers.{}.post_attention_layernorm", "norm"),
    linears={
        "q": StoredLinear("layers.{}.self_attn.q_proj"),
        "k": StoredLinear("layers.{}.self_attn.k_proj"),
        "v": StoredLinear("layers.{}.self_attn.v_proj"),
        "o": StoredLinear("layers.{}.self_attn.o_proj"),
        "gate": StoredLinear("layers.{}.mlp.gate_proj"),
        "up": StoredLinear("layers.{}.mlp.up_proj"),
        "down": StoredLinear("layers.{}.mlp.down_proj"),
    },
)
_GPT2 = Family(
    model_type="gpt2",
    read=_read_gpt2,
    prefix="transformer.",
    inputs_first=True,
    tied=True,
    embed="wte",
    norms=("h.{}.ln_1", "h.{}.ln_2", "ln_f"),
    linears={
        "q": StoredLinear("h.{}.attn.c_attn", 0, 3),
        "k": StoredLinear("h.{}.attn.c_attn", 1, 3),
        "v": StoredLinear("h.{}.attn.c_attn", 2, 3),
        "o": StoredLinear("h.{}.attn.c_proj"),
        "up": StoredLinear("h.{}.mlp.c_fc"),
        "down": StoredLinear("h.{}.mlp.c_proj"),
    },
    positions="wpe",
)
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": dataclasses.replace(
        _LLAMA, model_type="mistral", read=_llama_like(_always_window, kv_heads=8)
    ),
    "Qwen2ForCausalLM": dataclasses.replace(
        _LLAMA, model_type="qwen2", read=_llama_like(_switched_window, qkv_bias=True, kv_heads=32)
    ),
    "GPT2LMHeadModel": _GPT2,
}
