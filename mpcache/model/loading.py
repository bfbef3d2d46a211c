"""Model shapes and weights, read from Hugging Face folders.

What differs between model families is a table at the end of this file; nothing downstream knows a
family's name. Weights come out as the decode program uses them, with all that can be folded into a
matrix folded in, here, in plaintext, by the party that owns them:

* a norm's gain g and bias b go into the matrices that read the norm, (x*g + b) @ W =
  x @ (g*W) + b @ W, so a norm has no weights of its own;
* 1/sqrt(head_dim) goes into the query projection, so attention scores come out scaled;
* where the norm is LayerNorm, everything that writes to the residual stream is centred. Only norms
  read that stream and they ignore its mean, so it can be zero from the start; then LayerNorm *is*
  RMSNorm, and every family runs one norm: x / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpcache.demo import DEMO
from mpcache.errors import ModelError
from mpcache.model.tokenizer import Tokenizer

NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
POSITIONS = ("rope", "learned")
ROPE_SCALINGS = ("linear", "llama3")
# Larger sizes than any model has. A shape also comes from files and peers: it must not make its reader
# count to a trillion layers.
LARGEST = {
    "layers": 1 << 12, "width": 1 << 20, "heads": 1 << 12, "kv_heads": 1 << 12, "head_dim": 1 << 14,
    "ffn": 1 << 22, "vocab": 1 << 24, "max_positions": 1 << 26,
}  # fmt: skip


# ---------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `linear` divides all by `factor`; `llama3` divides those slower than `low` turns per `original`
    positions, keeps those faster than `high`, and blends between. `linear` uses `factor` alone.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192  # positions of the context the frequencies were trained for

    def __post_init__(self) -> None:
        _one_of("rope scaling", self.kind, ROPE_SCALINGS)
        for name in ("factor", "low", "high"):
            _positive(f"rope {name}", getattr(self, name))
        _whole("rope original", self.original)
        if self.kind == "llama3" and self.high <= self.low:
            raise ValueError(f"rope scaling needs high > low, got {self.high} and {self.low}")


@dataclass(frozen=True)
class ModelShape:
    """All that is public about a model: enough to plan, price and run the decode program.

    Attention: `heads` query heads of `head_dim` share `kv_heads` key-value heads, in consecutive
    groups of `group`. MLP: down(act(gate(x)) * up(x)) when `gated`, else down(act(up(x))).
    `max_positions` is what the model can attend to, in tokens: where a model has a sliding window
    it is the window, because up to there attention is full. The bias flags tell what the program
    adds after folding, so the two-matrix families that fold a LayerNorm have all of them.
    `norm` names the norm that the checkpoint was trained with; see this module's text on why the
    program needs only one.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm: str
    norm_eps: float
    activation: str
    gated: bool
    positions: str
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_bias: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError on a value out of its range."""
        for name, largest in LARGEST.items():
            if _whole(name, getattr(self, name)) > largest:
                raise ValueError(f"{name} is {_short(getattr(self, name))}; at most {largest} is possible")
        for name in ("gated", "qkv_bias", "o_bias", "mlp_bias", "lm_bias"):
            _flag(name, getattr(self, name))
        for name in ("norm_eps", "rope_theta"):
            _positive(name, getattr(self, name))
        _one_of("norm", self.norm, NORMS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("positions", self.positions, POSITIONS)
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
        """Plain JSON values, in the order of the fields."""
        return {**dataclasses.asdict(self), "eos_ids": list(self.eos_ids)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelShape:
        """The inverse of `to_dict`, for JSON from elsewhere. Raises ModelError."""
        try:
            values = dict(data)
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            values["eos_ids"] = tuple(values.get("eos_ids", ()))
            return ModelShape(**values)
        except (TypeError, ValueError) as error:
            raise ModelError(f"model shape: {_line(error)}") from error

    @staticmethod
    def from_config(config: Mapping[str, Any], source: str = "config.json") -> ModelShape:
        """Reads the content of a Hugging Face config.json; `source` names it in a ModelError."""
        keys = _Config(config, source)
        family = _family(keys)
        try:
            return family.read(keys)
        except ValueError as error:
            raise ModelError(f"{source}: {_line(error)}") from error


def _whole(name: str, value: object) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"{name} must be a whole number above zero, not {_short(value)}")
    return value


def _positive(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above zero, not {_short(value)}")
    return float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {_short(value)}")
    return value


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {_short(value)} is not supported; supported: {', '.join(known)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: BaseException | str) -> str:
    """An error's text as one line of bounded length: files that we did not write may shape it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# --------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's matrices (inputs, outputs) and biases (outputs,): y = x @ W + b. None: no such term.

    wq: (width, heads * head_dim), scaled by 1/sqrt(head_dim); wk, wv: (width, kv_heads * head_dim);
    wo: (heads * head_dim, width); w_gate (only when gated), w_up: (width, ffn); w_down: (ffn, width).
    """

    wq: Tensor
    bq: Tensor | None
    wk: Tensor
    bk: Tensor | None
    wv: Tensor
    bv: Tensor | None
    wo: Tensor
    bo: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None

    def to(self, device: torch.device | str) -> LayerWeights:
        """The same weights on `device`."""
        fields = dataclasses.fields(self)
        return LayerWeights(*(_to(getattr(self, field.name), device) for field in fields))


@dataclass(frozen=True, eq=False)
class Weights:
    """Float32 weights with norms, scales and means folded in (see this module's text).

    embed: (vocab, width); positions: (max_positions, width), or None with rotary positions;
    lm_head: (width, vocab), its own matrix even where the checkpoint ties it to embed;
    lm_bias: (vocab,) or None.
    """

    embed: Tensor
    positions: Tensor | None
    layers: tuple[LayerWeights, ...]
    lm_head: Tensor
    lm_bias: Tensor | None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is there with its name ("embed", "layer3/wq", ...), in program order."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value
            elif isinstance(value, tuple):
                for number, layer in enumerate(value):
                    for part in dataclasses.fields(layer):
                        tensor = getattr(layer, part.name)
                        if tensor is not None:
                            yield f"layer{number}/{part.name}", tensor

    @staticmethod
    def meta(shape: ModelShape) -> Weights:
        """Tensors that have sizes and no values, for readings of the program that need no weights."""
        s = shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim

        def empty(*size: int, there: bool = True) -> Any:
            return torch.empty(size, device="meta") if there else None

        def layer() -> LayerWeights:  # tensors of its own for each: who keeps masks tells them apart
            return LayerWeights(
                wq=empty(s.width, q), bq=empty(q, there=s.qkv_bias),
                wk=empty(s.width, kv), bk=empty(kv, there=s.qkv_bias),
                wv=empty(s.width, kv), bv=empty(kv, there=s.qkv_bias),
                wo=empty(q, s.width), bo=empty(s.width, there=s.o_bias),
                w_gate=empty(s.width, s.ffn, there=s.gated),
                b_gate=empty(s.ffn, there=s.gated and s.mlp_bias),
                w_up=empty(s.width, s.ffn), b_up=empty(s.ffn, there=s.mlp_bias),
                w_down=empty(s.ffn, s.width), b_down=empty(s.width, there=s.mlp_bias),
            )  # fmt: skip

        return Weights(
            embed=empty(s.vocab, s.width),
            positions=empty(s.max_positions, s.width, there=s.positions == "learned"),
            layers=tuple(layer() for _ in range(s.layers)),
            lm_head=empty(s.width, s.vocab),
            lm_bias=empty(s.vocab, there=s.lm_bias),
        )


def _to(tensor: Tensor | None, device: torch.device | str) -> Any:
    return None if tensor is None else tensor.to(device)


@dataclass(frozen=True, eq=False)
class Model:
    """A model as its owner holds it.

    `digest`: sha256, in hex, of the config and of every tensor read, as stored; how a checkpoint is
    cut into files does not change it.
    """

    shape: ModelShape
    weights: Weights
    tokenizer: Tokenizer
    digest: str
    folder: Path


# --------------------------------------------------------------------------------------- loading


def demo_model_dir() -> Path:
    """The folder of the model that ships with mpcache. Raises ModelError when it is not there."""
    folder = DEMO / "model"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: the demo model is not there; reinstall mpcache or name a --model DIR")
    return folder


def load_shape(path: Path | str) -> ModelShape:
    """The shape from a model folder or a config.json; needs no weights. Raises ModelError."""
    config, source = _read_config(Path(path))
    return ModelShape.from_config(config, source)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model folder; needs no weights. Raises ModelError."""
    return _tokenizer(Path(folder), load_shape(folder))


def load_model(folder: Path | str) -> Model:
    """Reads a Hugging Face folder: config.json, *.safetensors (whole or sharded), tokenizer.json.

    float16 and bfloat16 become float32. Every problem is a ModelError of one line.
    """
    folder = Path(folder)
    config, source = _read_config(folder)
    shape = ModelShape.from_config(config, source)
    tokenizer = _tokenizer(folder, shape)
    keys = _Config(config, source)
    family = _family(keys)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors = _Checkpoint(folder, family.prefix, digest.update)
    weights = _read_weights(tensors, family, shape, tied=keys.flag("tie_word_embeddings", family.tied))
    return Model(shape, weights, tokenizer, digest.hexdigest(), folder)


def _tokenizer(folder: Path, shape: ModelShape) -> Tokenizer:
    return Tokenizer.load(folder, shape.vocab, shape.bos_id)


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a config.json and its name, given the file or its folder."""
    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ModelError(f"{path}: no such model folder; give a Hugging Face model folder")
    if not file.is_file():
        raise ModelError(f"{path}: no config.json in it; give a Hugging Face model folder")
    return _read_json(file), str(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {_line(error)}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file}: holds a JSON {type(data).__name__}, not an object")
    return data


class _Checkpoint:
    """The tensors of a folder by name, each checked and digested as it is read."""

    DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}

    def __init__(self, folder: Path, prefix: str, digest: Callable[[Any], None]) -> None:
        self.folder, self.digest = folder, digest
        self.file_of: dict[str, tuple[Any, str]] = {}  # name without the prefix -> open file, stored name
        for file in self._files():
            try:
                opened = safe_open(file, framework="pt")
                names = list(opened.keys())
            except (OSError, SafetensorError, ValueError) as error:
                raise ModelError(f"{file}: cannot be read as safetensors: {_line(error)}") from error
            self.file_of |= {name.removeprefix(prefix): (opened, name) for name in names}

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        whole = self.folder / "model.safetensors"
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ModelError(f"{index}: has no weight_map; copy it again from where the model came from")
            names = sorted({str(name) for name in shards.values()})
            there = {file.name for file in self.folder.iterdir() if file.is_file()}
            for name in names:
                # The name comes from a file that somebody else wrote: it must not lead out of the folder.
                if name not in there:
                    raise ModelError(
                        f"{self.folder}: {_short(name)}, named by the index, is not there; copy it here"
                    )
            return [self.folder / name for name in names]
        files = [whole] if whole.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{self.folder}: no *.safetensors in it; other weight formats are not supported")
        return files

    def read(self, name: str, *size: int) -> Tensor:
        """The stored tensor `name` of exactly this size, as float32 (still as the file lays it out)."""
        if name not in self.file_of:
            raise ModelError(f"{self.folder}: tensor {name} is missing; the files do not match config.json")
        file, stored = self.file_of[name]
        try:
            found = tuple(file.get_slice(stored).get_shape())
            if found != size:
                raise ModelError(f"{self.folder}: tensor {stored} is {found}, config.json makes it {size}")
            tensor: Tensor = file.get_tensor(stored)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise ModelError(f"{self.folder}: tensor {stored} cannot be read: {_line(error)}") from error
        if tensor.dtype not in self.DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{self.folder}: tensor {stored} is {kind}; supported: float32, float16, bfloat16"
            )
        self.digest(f"{name} {found} {tensor.dtype}\n".encode())
        self.digest(tensor.contiguous().view(torch.uint8).numpy())
        result = tensor.to(torch.float32)
        if not torch.isfinite(result).all():
            raise ModelError(f"{self.folder}: tensor {stored} holds NaN or infinity; the file is damaged")
        return result


# -------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class _Part:
    """A linear's place: the stored tensor `name`, or one of `of` equal blocks of its outputs."""

    name: str
    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class _Family:
    """What one architecture does its own way. In tensor names, {} is the layer's number."""

    read: Callable[[_Config], ModelShape]
    prefix: str  # stands before all names but the head's; some checkpoints leave it out
    inputs_first: bool  # linears are stored (inputs, outputs)
    tied: bool  # when config.json does not say
    embed: str
    norms: tuple[str, str, str]  # before attention, before the MLP, last
    linears: Mapping[str, _Part]  # q k v o gate up down
    positions: str = ""


def _family(keys: _Config) -> _Family:
    names = keys.need("architectures")
    known = ", ".join(_FAMILIES)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"{keys.source}: architectures must be one name in a list; supported: {known}")
    if names[0] not in _FAMILIES:
        raise ModelError(f"{keys.source}: {_short(names[0])} is not supported; supported: {known}")
    if keys.get("quantization_config") is not None:
        raise ModelError(f"{keys.source}: quantized checkpoints are not supported; use the float one")
    return _FAMILIES[names[0]]


_Linear = tuple[Tensor, Tensor | None]  # a matrix and its bias, or a norm's gain and its bias


def _read_weights(tensors: _Checkpoint, family: _Family, shape: ModelShape, tied: bool) -> Weights:
    s = shape
    layer_norm = s.norm == "layer"
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim

    def norm(name: str) -> _Linear:
        gain = tensors.read(f"{name}.weight", s.width)
        return gain, tensors.read(f"{name}.bias", s.width) if layer_norm else None

    def fold(read: _Linear, gains: _Linear) -> _Linear:
        (w, b), (gain, shift) = read, gains
        if shift is not None:
            b = shift @ w if b is None else b + shift @ w
        return (gain[:, None] * w).contiguous(), b

    def linear(place: _Part, number: int, inputs: int, outputs: int, bias: bool) -> _Linear:
        name, total = place.name.format(number), outputs * place.of
        if family.inputs_first:
            w = tensors.read(f"{name}.weight", inputs, total)
        else:
            w = tensors.read(f"{name}.weight", total, inputs).T
        b = tensors.read(f"{name}.bias", total) if bias else None
        mine = slice(place.index * outputs, (place.index + 1) * outputs)
        return w[:, mine].contiguous(), None if b is None else b[mine].contiguous()

    def centre(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if layer_norm else x

    def layer(number: int) -> LayerWeights:
        def get(key: str, inputs: int, outputs: int, bias: bool) -> _Linear:
            return linear(family.linears[key], number, inputs, outputs, bias)

        before_attention, before_mlp = (norm(name.format(number)) for name in family.norms[:2])
        wq, bq = fold(get("q", s.width, q_width, s.qkv_bias), before_attention)
        wk, bk = fold(get("k", s.width, kv_width, s.qkv_bias), before_attention)
        wv, bv = fold(get("v", s.width, kv_width, s.qkv_bias), before_attention)
        wo, bo = get("o", q_width, s.width, s.o_bias)
        w_gate, b_gate = None, None
        if s.gated:
            w_gate, b_gate = fold(get("gate", s.width, s.ffn, s.mlp_bias), before_mlp)
        w_up, b_up = fold(get("up", s.width, s.ffn, s.mlp_bias), before_mlp)
        w_down, b_down = get("down", s.ffn, s.width, s.mlp_bias)
        scale = s.head_dim**-0.5
        return LayerWeights(
            wq=wq * scale, bq=None if bq is None else bq * scale,
            wk=wk, bk=bk, wv=wv, bv=bv,
            wo=centre(wo), bo=None if bo is None else centre(bo),
            w_gate=w_gate, b_gate=b_gate, w_up=w_up, b_up=b_up,
            w_down=centre(w_down), b_down=None if b_down is None else centre(b_down),
        )  # fmt: skip

    embed = tensors.read(f"{family.embed}.weight", s.vocab, s.width)
    positions = None
    if family.positions:
        positions = tensors.read(f"{family.positions}.weight", s.max_positions, s.width)
    layers = tuple(layer(number) for number in range(s.layers))
    head = embed if tied else tensors.read("lm_head.weight", s.vocab, s.width)
    lm_head, lm_bias = fold((head.T, None), norm(family.norms[2]))
    return Weights(centre(embed), None if positions is None else centre(positions), layers, lm_head, lm_bias)


class _Config:
    """A config.json's values by key; None counts as absent, as it does where these files come from."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ModelError(f"{self.source}: {key} is missing; use the config.json that came with the model")
        return self.values[key]

    def whole(self, key: str, default: int | None = None) -> int:
        return self._checked(_whole, key, default)

    def number(self, key: str, default: float | None = None) -> float:
        return self._checked(_positive, key, default)

    def flag(self, key: str, default: bool) -> bool:
        return self._checked(_flag, key, default)

    def _checked(self, check: Callable[[str, object], Any], key: str, default: Any) -> Any:
        value = self.need(key) if default is None else self.get(key, default)
        try:
            return check(key, value)
        except ValueError as error:
            raise ModelError(f"{self.source}: {error}") from error

    def table(self, key: str) -> _Config:
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise ModelError(f"{self.source}: {key} must be an object, not {_short(value)}")
        return _Config(value, f"{self.source}: {key}")

    def activation(self, key: str) -> str:
        name = self.need(key)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ModelError(f"{self.source}: {key} {_short(name)} is not supported; supported: {known}")
        return _ACTIVATIONS[name]

    def tokens(self, key: str, vocab: int) -> tuple[int, ...]:
        """One id, a list of them, or none. An id outside the vocabulary can never come up: left out."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(one) is int for one in ids):
            raise ModelError(f"{self.source}: {key} must be one token id or a list, not {_short(value)}")
        return tuple(one for one in ids if 0 <= one < vocab)


def _special_tokens(keys: _Config, vocab: int) -> dict[str, Any]:
    bos = keys.tokens("bos_token_id", vocab)
    return {"bos_id": bos[0] if bos else None, "eos_ids": keys.tokens("eos_token_id", vocab)}


def _rope(keys: _Config) -> dict[str, Any]:
    """Rotary settings, from `rope_scaling` and `rope_theta` or from `rope_parameters` that holds both."""
    old, new = keys.table("rope_scaling"), keys.table("rope_parameters")
    given = old if old.values else new
    if any(isinstance(value, dict) for value in given.values.values()):
        raise ModelError(f"{given.source} that differ from layer to layer are not supported")
    for place in (given, keys):
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
            given.whole("original_max_position_embeddings", keys.whole("max_position_embeddings")),
        )
    elif kind != "default":
        known = ", ".join(("default", *ROPE_SCALINGS))
        raise ModelError(f"{given.source}: rope type {_short(kind)} is not supported; supported: {known}")
    theta = given.number("rope_theta", keys.number("rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_scaling": scaling}


_Window = Callable[["_Config"], int | None]  # reads the sliding window in tokens; None: there is none


def _llama_like(window: _Window, **biases: str | bool) -> Callable[[_Config], ModelShape]:
    """The reader of a Llama relative. Each bias is a constant or the key of the flag that decides it."""

    def read(keys: _Config) -> ModelShape:
        width, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
        vocab, context = keys.whole("vocab_size"), keys.whole("max_position_embeddings")
        given: dict[str, Any] = {
            name: keys.flag(by, False) if isinstance(by, str) else by for name, by in biases.items()
        }
        if keys.get("head_dim") is None and width % heads:
            raise ModelError(
                f"{keys.source}: without head_dim, {heads} heads must divide hidden_size {width}"
            )
        return ModelShape(
            layers=keys.whole("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=keys.whole("num_key_value_heads", heads),
            head_dim=keys.whole("head_dim", width // heads),
            ffn=keys.whole("intermediate_size"),
            vocab=vocab,
            max_positions=min(context, window(keys) or context),
            norm="rms",
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            activation=keys.activation("hidden_act"),
            gated=True,
            positions="rope",
            **_rope(keys),
            **given,
            **_special_tokens(keys, vocab),
        )

    return read


def _no_window(keys: _Config) -> int | None:
    return None


def _always_window(keys: _Config) -> int | None:
    return keys.whole("sliding_window") if keys.get("sliding_window") is not None else None


def _switched_window(keys: _Config) -> int | None:
    return _always_window(keys) if keys.flag("use_sliding_window", False) else None


def _gpt2(keys: _Config) -> ModelShape:
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                       ("add_cross_attention", False)):  # fmt: skip
        if keys.flag(key, usual) != usual:
            raise ModelError(f"{keys.source}: {key} {str(not usual).lower()} is not supported")
    width, heads, vocab = keys.whole("n_embd"), keys.whole("n_head"), keys.whole("vocab_size")
    if width % heads:
        raise ModelError(f"{keys.source}: {heads} heads do not divide n_embd {width}")
    return ModelShape(
        layers=keys.whole("n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn=keys.whole("n_inner", 4 * width),
        vocab=vocab,
        max_positions=keys.whole("n_positions"),
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.activation("activation_function"),
        gated=False,
        positions="learned",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        lm_bias=True,
        **_special_tokens(keys, vocab),
    )


_LLAMA = _Family(
    read=_llama_like(_no_window, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    prefix="model.",
    inputs_first=False,
    tied=False,
    embed="embed_tokens",
    norms=("layers.{}.input_layernorm", "layers.{}.post_attention_layernorm", "norm"),
    linears={
        "q": _Part("layers.{}.self_attn.q_proj"),
        "k": _Part("layers.{}.self_attn.k_proj"),
        "v": _Part("layers.{}.self_attn.v_proj"),
        "o": _Part("layers.{}.self_attn.o_proj"),
        "gate": _Part("layers.{}.mlp.gate_proj"),
        "up": _Part("layers.{}.mlp.up_proj"),
        "down": _Part("layers.{}.mlp.down_proj"),
    },
)
_GPT2 = _Family(
    read=_gpt2,
    prefix="transformer.",
    inputs_first=True,
    tied=True,
    embed="wte",
    norms=("h.{}.ln_1", "h.{}.ln_2", "ln_f"),
    linears={
        "q": _Part("h.{}.attn.c_attn", 0, 3),
        "k": _Part("h.{}.attn.c_attn", 1, 3),
        "v": _Part("h.{}.attn.c_attn", 2, 3),
        "o": _Part("h.{}.attn.c_proj"),
        "up": _Part("h.{}.mlp.c_fc"),
        "down": _Part("h.{}.mlp.c_proj"),
    },
    positions="wpe",
)
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": dataclasses.replace(_LLAMA, read=_llama_like(_always_window)),
    "Qwen2ForCausalLM": dataclasses.replace(_LLAMA, read=_llama_like(_switched_window, qkv_bias=True)),
    "GPT2LMHeadModel": _GPT2,
}
