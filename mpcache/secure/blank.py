"""Tensors without values: what the dealer and the cost reading compute on.

torch's meta tensors do the same, but each operation on them costs about as much as a small real one.
A `Blank` infers an operation's result once per combination of shapes, on meta tensors, and remembers
it: layers and tokens repeat themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch

_memory: dict[Any, Any] = {}


class Blank:
    """A shape and a dtype that behave as a tensor."""

    __slots__ = ("dtype", "shape")
    is_meta = True
    device = torch.device("meta")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype

    def __repr__(self) -> str:
        return f"Blank({tuple(self.shape)}, {self.dtype})"

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

    def to(self, *_: Any, dtype: torch.dtype | None = None) -> Blank:
        wanted = next((a for a in _ if isinstance(a, torch.dtype)), dtype)
        return Blank(self.shape, wanted or self.dtype)

    def clone(self) -> Blank:
        return self

    contiguous = clone


def _operator(name: str) -> None:
    func = getattr(torch.Tensor, name)

    def method(self: Blank, *args: Any) -> Any:
        return infer(func, (self, *args), {})

    setattr(Blank, name, method)


for _name in "truediv add radd sub rsub mul rmul matmul and rand or xor lshift rshift neg invert".split():
    _operator(f"__{_name}__")


def infer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a torch function in which tensors have no values."""
    try:
        key = (func, _key(args), _key(tuple(kwargs.items())))
        hash(key)
    except TypeError:
        return _blanks(func(*_metas(args), **_metas(kwargs)))
    if key not in _memory:
        _memory[key] = _blanks(func(*_metas(args), **_metas(kwargs)))
    return _memory[key]


def _key(x: Any) -> Any:
    if isinstance(x, Blank | torch.Tensor):
        return ("tensor", tuple(x.shape), x.dtype)
    if isinstance(x, tuple | list):
        return tuple(_key(i) for i in x)
    if isinstance(x, slice):
        return ("slice", x.start, x.stop, x.step)
    return x


def _metas(x: Any) -> Any:
    if isinstance(x, Blank):
        return _meta(tuple(x.shape), x.dtype)
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if isinstance(x, dict):
        return {k: _metas(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(_metas(i) for i in x)
    return x


@cache
def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _blanks(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Blank(tuple(x.shape), x.dtype)
    if isinstance(x, tuple | list) and not isinstance(x, torch.Size):
        return type(x)(_blanks(i) for i in x)
    return x


def materialise(x: Any, device: torch.device | str) -> Any:
    """A Blank as a tensor of zeros (no values on the meta device); other things as they are."""
    return torch.zeros(x.shape, dtype=x.dtype, device=device) if isinstance(x, Blank) else x
