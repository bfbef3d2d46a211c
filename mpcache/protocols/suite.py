"""The protocols that `FastOps` is assembled from, by name.

`mpcache.engines.ideal` has the same names with the same signatures, on plain fixed-point integers.
"""

from mpcache.protocols.activation import activate
from mpcache.protocols.linear import (
    blur,
    finish_mask_operand,
    mask_operand,
    matmul_masked_operand,
    product,
    start_mask_operand,
    truncate,
    truncate_local,
    truncate_times,
)
from mpcache.protocols.norm import norm_linear
from mpcache.protocols.reciprocal import reciprocal
from mpcache.protocols.relu import relu
from mpcache.protocols.softmax import quantize_scores, softmax
from mpcache.protocols.topk import topk

__all__ = [
    "activate", "start_mask_operand", "blur", "finish_mask_operand", "quantize_scores", "norm_linear", "relu", "product",
    "matmul_masked_operand", "reciprocal", "mask_operand", "truncate_local", "softmax", "topk", "truncate", "truncate_times",
]  # fmt: skip
