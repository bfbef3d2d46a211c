"""A model's curve: what each of its KV heads loses where it keeps less, and so who gets how many tokens.

`mpcache calibrate` makes the curve, from text that is never served. It belongs to one model, by digest. It
lies beside the model or, where that folder cannot be written, in the user's data folder.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcache.errors import ModelError
from mpcache.model import Model, load_model
from mpcache.policy.counts import from_shares, shares

FILE = "mpcache-curve.json"  # beside a model
# Shares of a head's tokens at which its error is measured.
LEVELS = [0.0, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0]
VERSION = 1
LARGEST_FILE = 64 << 20  # bytes


@dataclass(frozen=True, eq=False)
class HeadCurve:
    """digest: of the model.  errors: (layers, kv_heads, levels), in parts of the residual stream's power.

    check: how often fresh facts were answered right with the curve, by budget in percent, and what was asked.
    """

    digest: str
    errors: Tensor
    check: dict[str, Any]

    def counts(self, budget: int, context: int) -> Tensor:
        """Deal out a mean budget of tokens: (layers, kv_heads) whole numbers."""
        return from_shares(shares(LEVELS, self.errors, budget / context), budget, context)

    def to_json(self) -> str:
        """Write the curve as text."""
        errors = [[[float(f"{e:.4g}") for e in head] for head in layer] for layer in self.errors.tolist()]
        return json.dumps(
            {
                "version": VERSION,
                "model_digest": self.digest,
                "levels": LEVELS,
                "errors": errors,
                "check": self.check,
            }
        )


_tried: dict[str, HeadCurve] = {}  # by the model's digest


def try_curve(curve: HeadCurve) -> None:
    """Use a curve in this process, whatever is stored."""
    _tried[curve.digest] = curve


def curve_of(model: Model) -> HeadCurve | None:
    """Find a model's curve: beside it, else in the user's folder. None: it has none. Raises ModelError."""
    if model.digest in _tried:
        return _tried[model.digest]
    for file in places(model.path, model.digest):
        if file.is_file():
            curve = read_curve(file)
            if curve.digest == model.digest:
                _check_size(curve, model, file)
                return curve
    return None


def has_curve(path: Path) -> bool:
    """Tell whether a model has a curve; its weights are read only where that takes a digest."""
    beside, apart = places(path, "")
    if beside.is_file():
        return True
    return any(apart.parent.glob("*.json")) and curve_of(load_model(path, keep=False)) is not None


def places(path: Path, digest: str) -> list[Path]:
    """List where a model's curve may be: in its folder or beside its file, and apart."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    beside = path.with_name(f"{path.name}.{FILE}") if path.is_file() else path / FILE
    return [beside, data / "mpcache" / "curves" / f"{digest}.json"]


@lru_cache(maxsize=4)
def _read(file: Path, changed: int, size: int) -> HeadCurve:
    try:
        if size > LARGEST_FILE:
            raise ValueError
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] != VERSION or data["levels"] != LEVELS:
            raise ValueError
        if not re.fullmatch(r"[0-9a-f]{64}", data["model_digest"]) or not isinstance(data["check"], dict):
            raise ValueError
        errors = torch.tensor(data["errors"], dtype=torch.float64)
        if errors.dim() != 3 or errors.shape[2] != len(LEVELS):
            raise ValueError
        if not bool(((errors >= 0) & (errors < math.inf)).all()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(
            f"{file}: is no curve of this release; make it anew with `mpcache calibrate`"
        ) from None
    return HeadCurve(data["model_digest"], errors, data["check"])


def read_curve(file: Path) -> HeadCurve:
    """Read a curve. Raises ModelError, which names the file."""
    try:
        found = file.stat()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    return _read(file, found.st_mtime_ns, found.st_size)


def _check_size(curve: HeadCurve, model: Model, file: Path) -> None:
    wanted = (model.shape.layers, model.shape.kv_heads)
    if curve.errors.shape[:2] != wanted:
        raise ModelError(
            f"{file}: is not the curve of a model of {wanted[0]} layers and {wanted[1]} KV heads"
        )
