"""Kernels of the plaintext path, behind one seam.

`backend(device)` is asked once per run, where the device is chosen; its name is shown to the user.
`kernels.reference` says what every function means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class Backend:
    """One implementation of every kernel; the signatures are those in `kernels.reference`."""

    name: str
    window_importance: Callable[[Tensor, Tensor, int], Tensor]
    cluster_extremes: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    cluster_means: Callable[[Tensor, int], Tensor]
    representatives: Callable[[Tensor, Tensor, float], Tensor]


REFERENCE = Backend(
    name="reference",
    window_importance=reference.window_importance,
    cluster_extremes=reference.cluster_extremes,
    cluster_means=reference.cluster_means,
    representatives=reference.representatives,
)


def backend(device: torch.device | str) -> Backend:
    """The kernels for tensors on `device`.

    Other implementations are imported here, and only for a device that can run them: an
    installation without a GPU never loads Triton.
    """
    torch.device(device)  # a name that torch does not know fails here, not at the first kernel
    return REFERENCE
