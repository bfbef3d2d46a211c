"""Choose the server's kernels for prefill and eviction, and time them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from mpcache.errors import ConfigError
from mpcache_kernels import REFERENCE, Backend, backend


def choose_kernels(choice: str, device: str) -> Backend:
    """Return the kernels that `public.kernels` asks for on this device.

    Raises ConfigError: triton is asked for, and there is no GPU or no Triton.
    """
    found = REFERENCE if choice == "reference" else backend(device)
    if choice == "triton" and found.name != choice:
        raise ConfigError("public.kernels is triton: the server has no GPU, or Triton is not installed")
    return found


def timed_kernels(kernels: Backend) -> tuple[Backend, list[float]]:
    """Return kernels that also append how long each call took, in ms, to the list beside them."""
    took: list[float] = []

    def timed(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = fn(*arguments)
            took.append(1000 * (time.perf_counter() - start))
            return result

        return call

    names = [f.name for f in fields(kernels) if f.name != "name"]
    kernels = replace(kernels, **{name: timed(getattr(kernels, name)) for name in names})  # type: ignore[arg-type]
    return kernels, took
