"""Turn a session's state into plain data and back: what a checkpoint holds. Nothing is pickled.

The state is a tree of the classes below, numbers, texts and tensors. It becomes a JSON text that
names them and a row of raw tensors; only classes of this list are ever made from a file. A cache
grows at its end, so a step's tree is written as what it adds to an earlier one (`since`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch

from mpcache.cache import Cache, LayerCache, SplitLayer
from mpcache.decode import Layer, Operands
from mpcache.errors import StateError
from mpcache.model import ModelShape, RopeScaling
from mpcache.policy.cascade import Cascaded, Tiers
from mpcache.policy.choosing import Chosen
from mpcache.policy.clusters import Choice, Clusters
from mpcache.policy.evicting import ValidMask
from mpcache.protocols.selection import PreparedSelection
from mpcache.rank import Rank
from mpcache.report.account import TurnReport
from mpcache.runtime.guard import Guard
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.ring import Matrix
from mpcache.runtime.shares import Awaited, KnownOperand, MaskedOperand, Share
from mpcache.runtime.side import Side
from mpcache.sampling import Sampling
from mpcache.transport.link import DTYPES
from mpcache_parties.private_inputs import Question, TurnRecord
from mpcache_parties.state import sealed

CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        Cache, LayerCache, SplitLayer, Layer, Operands, ModelShape, RopeScaling, MaskedOperand, KnownOperand,
        Matrix, Share, Side, PreparedSelection, Choice, Chosen, Clusters, ValidMask, Cascaded, Tiers,
        Question, Sampling, TurnRecord, TurnReport,
    )
}  # fmt: skip
LATER = {"StockSelection": "mpcache.engines.stock"}  # looked up when one is met: it brings CrypTen
_ALIGNMENT = 8  # bytes
_LENGTH_BYTES = 8  # of the JSON text's length

Tensors = Mapping[str, torch.Tensor]  # by path in the tree: /layers/0/k/mask


def _class_of(name: str) -> Any:
    """Return the class of a name in this module's lists; None for any other name."""
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    return CLASSES.get(name)


def tensors_of(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Return every tensor of a tree, by its path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found: dict[str, torch.Tensor] = {}
    for name, value in _children(tree):
        found |= tensors_of(value, f"{path}/{name}")
    return found


def copied(tree: Any) -> Any:
    """Return a tree that goes its own way; its tensors, which nobody changes in place, are shared."""
    return copy.deepcopy(tree, {id(tensor): tensor for tensor in tensors_of(tree).values()})


def join_guard(tree: Any, guard: Guard) -> None:
    """Let a tree that was read back note values out of their ranges where the party's session does."""
    if isinstance(tree, Side):
        object.__setattr__(tree, "guard", guard)
    for _, value in _children(tree):
        join_guard(value, guard)


def serialize(tree: Any, since: Tensors | None = None) -> Iterator[bytes | memoryview]:
    """Yield a tree as bytes, in pieces. since: the tensors of an earlier tree, which the reader will have.

    Raises TypeError on what is not in the list of this module.
    """
    table: list[torch.Tensor] = []
    text = json.dumps(_pack(tree, "", since or {}, table), separators=(",", ":")).encode()
    yield len(text).to_bytes(_LENGTH_BYTES, "little")
    yield text + bytes(-len(text) % _ALIGNMENT)
    for tensor in table:
        if tensor.numel():
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            yield bytes(-tensor.nbytes % _ALIGNMENT)


def deserialize(data: bytearray, since: Tensors | None = None) -> Any:
    """Return the tree that `serialize` wrote; its tensors lie in `data`.

    Raises StateError on anything else.
    """
    try:
        start = _LENGTH_BYTES
        length = int.from_bytes(data[:start], "little")
        node = json.loads(data[start : start + length])
        reader = _Reader(data, start + length + -length % _ALIGNMENT, since or {})
        tree = reader.unpack(node, "")
        if reader.at != len(data):
            raise ValueError("bytes are left over")
        return tree
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise StateError(f"its content is not what this release writes ({type(error).__name__})") from None


def read_snapshot(file: Path, key: bytes, header: Mapping[str, Any], since: Tensors | None = None) -> Any:
    """Read the tree in a sealed file with this header. Raises StateError, which names the file."""
    body = sealed.unseal(file, key, header)
    try:
        return deserialize(body, since)
    except StateError as error:
        raise StateError(f"{file}: {error}") from None


def _children(tree: Any) -> Sequence[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return [(str(i), value) for i, value in enumerate(tree)]
    if is_dataclass(tree) and not isinstance(tree, type):
        # Not what two of them may differ in: `Side.guard` goes on with the party (`join_guard`).
        return [(f.name, _there(getattr(tree, f.name))) for f in fields(tree) if f.compare]
    return []


def _there(value: Any) -> Any:
    """Return a value, made now if it is one that is made when it is first needed."""
    return value.value if isinstance(value, Awaited) else value


def _pack(x: Any, path: str, since: Tensors, table: list[torch.Tensor]) -> Any:
    if x is None or isinstance(x, bool | str | float) or type(x) is int:
        return x
    if isinstance(x, torch.Tensor) and x.is_meta:
        return {"meta": _name(x.dtype), "shape": list(x.shape)}
    if isinstance(x, torch.Tensor):
        return _pack_tensor(x, since.get(path), table)
    if isinstance(x, MetaTensor):
        return {"blank": _name(x.dtype), "shape": list(x.shape)}
    if isinstance(x, Rank):
        return {"rank": int(x)}
    below = [(name, _pack(value, f"{path}/{name}", since, table)) for name, value in _children(x)]
    if isinstance(x, Mapping) and all(isinstance(key, str) for key in x):
        return {"dict": dict(below)}
    if isinstance(x, list | tuple):
        return {"list" if isinstance(x, list) else "tuple": [value for _, value in below]}
    if _class_of(type(x).__name__) is type(x):
        return {"class": type(x).__name__, "fields": dict(below)}
    raise TypeError(f"{type(x).__name__} at {path} is not part of a checkpoint")


def _pack_tensor(x: torch.Tensor, before: torch.Tensor | None, table: list[torch.Tensor]) -> dict[str, Any]:
    node: dict[str, Any] = {"dtype": _name(x.dtype), "shape": list(x.shape)}
    dim = None if before is None else _grown(before, x)
    if before is not None and dim is not None:
        x = x.narrow(dim, before.shape[dim], x.shape[dim] - before.shape[dim])
        node["dim"] = dim
    elif not x.any():  # what a party does not hold a share of
        return {**node, "zero": True}
    table.append(x)
    return node


def _grown(before: torch.Tensor, x: torch.Tensor) -> int | None:
    """Find the dimension in which x goes on where `before` ends: any, if it is the same; None: none."""
    if before.dim() != x.dim() or before.dtype != x.dtype or not x.dim():
        return None
    changed = [d for d in range(x.dim()) if before.shape[d] != x.shape[d]] or [0]
    dim = changed[0]
    if len(changed) > 1 or before.shape[dim] > x.shape[dim]:
        return None
    return dim if torch.equal(x.narrow(dim, 0, before.shape[dim]), before) else None


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"{dtype} is not part of a checkpoint")
    return name


class _Reader:
    """Takes tensors from data in the order in which the tree names them."""

    def __init__(self, data: bytearray, at: int, since: Tensors) -> None:
        self.data, self.at, self.since = data, at, since

    def unpack(self, node: Any, path: str) -> Any:
        if not isinstance(node, dict):
            return node
        if "blank" in node:
            return MetaTensor(tuple(node["shape"]), DTYPES[node["blank"]])
        if "meta" in node:
            return torch.empty(node["shape"], dtype=DTYPES[node["meta"]], device="meta")
        if "dtype" in node:
            return self._tensor(node, path)
        if "rank" in node:
            return Rank(node["rank"])
        if "dict" in node:
            return self._named(node["dict"], path)
        if "class" in node:
            return _class_of(node["class"])(**self._named(node["fields"], path))
        (kind, items), *rest = node.items()
        if kind not in ("list", "tuple") or rest:
            raise ValueError(kind)
        below = [self.unpack(item, f"{path}/{i}") for i, item in enumerate(items)]
        return below if kind == "list" else tuple(below)

    def _named(self, nodes: Mapping[str, Any], path: str) -> dict[str, Any]:
        return {name: self.unpack(node, f"{path}/{name}") for name, node in nodes.items()}

    def _tensor(self, node: Mapping[str, Any], path: str) -> torch.Tensor:
        dtype, shape = DTYPES[node["dtype"]], list(node["shape"])
        if "zero" in node:
            return torch.zeros(shape, dtype=dtype)
        dim, before = node.get("dim"), self.since.get(path)
        if dim is None:
            return self._take(dtype, shape)
        if before is None:
            raise ValueError(path)
        shape[dim] -= before.shape[dim]
        return torch.cat([before, self._take(dtype, shape)], dim) if shape[dim] else before

    def _take(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        count = prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        start, size = self.at, count * dtype.itemsize
        if count < 0 or start + size > len(self.data):
            raise ValueError("a tensor goes beyond the end")
        self.at += size + -size % _ALIGNMENT
        return torch.frombuffer(self.data, dtype=dtype, count=count, offset=start).reshape(tuple(shape))
