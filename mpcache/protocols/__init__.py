"""The protocols that `FastOps` is assembled from, by name.

`mpcache.engines.ideal` has the same names with the same signatures, on plain fixed-point integers.
"""

from mpcache.protocols.activation import activate
from mpcache.protocols.linear import (
    announce,
    blur,
    deliver,
    product,
    product_resident,
    resident,
    shrink,
    truncate,
    truncate_times,
)
from mpcache.protocols.norm import norm_linear
from mpcache.protocols.reciprocal import reciprocal
from mpcache.protocols.relu import positive
from mpcache.protocols.softmax import narrow, softmax
from mpcache.protocols.topk import top

__all__ = [
    "activate", "announce", "blur", "deliver", "narrow", "norm_linear", "positive", "product",
    "product_resident", "reciprocal", "resident", "shrink", "softmax", "top", "truncate", "truncate_times",
]  # fmt: skip
