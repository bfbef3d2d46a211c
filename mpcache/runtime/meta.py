"""Tensors without values: what the dealer and the cost reading compute on.

torch's meta tensors do the same, but each operation on them costs about as much as a small real one.
A `MetaTensor` infers an operation's result once per combination of shapes and remembers it: layers and
tokens repeat themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import torch

_memory: dict[Any, Any] = {}


def broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that two shapes broadcast to. Raises ValueError where they do not."""
    return _broadcast(tuple(a), tuple(b))


@lru_cache(maxsize=4096)
def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.broadcast_shapes(a, b))  # torch's own loads its compiler, for a second


class MetaTensor:
    """A shape and a dtype that behave as a tensor."""

    __slots__ = ("dtype", "shape")
    is_meta = True
    device = torch.device("meta")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype

    def __repr__(self) -> str:
        return f"MetaTensor({tuple(self.shape)}, {self.dtype})"

    def __bool__(self) -> NoReturn:
        raise TypeError("a tensor without values has no truth value")

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return infer(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        func = getattr(torch.Tensor, name)
        if not callable(func):
            raise AttributeError(name)
        return lambda *args, **kwargs: infer(func, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        return infer(torch.Tensor.__getitem__, (self, index), {})

    def to(self, *_: Any, dtype: torch.dtype | None = None) -> MetaTensor:
        wanted = next((a for a in _ if isinstance(a, torch.dtype)), dtype)
        return MetaTensor(self.shape, wanted or self.dtype)

    def clone(self) -> MetaTensor:
        return self

    contiguous = clone


_TENSORS = (MetaTensor, torch.Tensor)


def _operator(name: str) -> None:
    func = getattr(torch.Tensor, name)

    def method(self: MetaTensor, *args: Any) -> Any:
        return infer(func, (self, *args), {})

    def elementwise(self: MetaTensor, *args: Any) -> Any:
        # The common case, without torch: integers of one dtype, broadcast.
        other = args[0] if args else 0
        if type(other) is int and not self.dtype.is_floating_point:
            return self
        if isinstance(other, _TENSORS) and other.dtype == self.dtype:
            if other.shape == self.shape:
                return self
            return MetaTensor(broadcast(self.shape, other.shape), self.dtype)
        return method(self, *args)

    setattr(MetaTensor, name, method if name in ("__matmul__", "__truediv__") else elementwise)


_NAMES = (
    "truediv", "matmul", "add", "radd", "sub", "rsub", "mul", "rmul", "and",
    "rand", "or", "xor", "lshift", "rshift", "neg", "invert",
)  # fmt: skip
for _name in _NAMES:
    _operator(f"__{_name}__")


_SMALL = 1 << 18  # elements up to which a result is inferred on zeros


def infer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Infer the result of a torch function in which tensors have no values.

    Small ones are computed on zeros, which is quick; the others on meta tensors, whose first use
    makes torch load its compiler for some seconds.
    """
    if func is torch.mul and not kwargs:
        return args[0] * args[1]
    key: Any = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else ())
    try:
        return _memory[key]
    except KeyError:
        pass
    except TypeError:  # it has no hash
        key = None
    device = "cpu" if _elements((args, tuple(kwargs.values()))) <= _SMALL else "meta"
    result = _blanks(func(*_stand_in(args, device), **_stand_in(kwargs, device)))
    if key is not None:
        _memory[key] = result
    return result


def _elements(x: Any) -> int:
    if isinstance(x, MetaTensor | torch.Tensor):
        return math.prod(x.shape)
    return sum(map(_elements, x)) if isinstance(x, tuple | list) else 0


def _key(x: Any) -> Any:
    kind = type(x)
    if kind is int or kind is str:  # the most frequent ones first
        return x
    if kind is MetaTensor or isinstance(x, torch.Tensor):
        return ("tensor", x.shape, x.dtype)
    if isinstance(x, (tuple, list)):
        return tuple([_key(i) for i in x])
    if isinstance(x, slice):
        return ("slice", x.start, x.stop, x.step)
    return x


def _stand_in(x: Any, device: str) -> Any:
    if isinstance(x, MetaTensor | torch.Tensor):
        return torch.zeros((), dtype=x.dtype, device=device).expand(x.shape)
    if isinstance(x, dict):
        return {k: _stand_in(v, device) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(_stand_in(i, device) for i in x)
    return x


def _blanks(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return MetaTensor(tuple(x.shape), x.dtype)
    if isinstance(x, tuple | list) and not isinstance(x, torch.Size):
        return type(x)(_blanks(i) for i in x)
    return x


def materialise(x: Any, device: torch.device | str) -> Any:
    """Turn a MetaTensor into zeros (no values on the meta device); leave other things as they are."""
    return torch.zeros(x.shape, dtype=x.dtype, device=device) if isinstance(x, MetaTensor) else x
