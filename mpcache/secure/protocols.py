"""The protocols that `FastOps` is assembled from, by name.

`mpcache.secure.ideal` has the same names with the same signatures, on plain fixed-point integers.
"""

from mpcache.secure.activation import activate
from mpcache.secure.linear import (
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
from mpcache.secure.norm import norm_linear
from mpcache.secure.positive import positive
from mpcache.secure.power import reciprocal
from mpcache.secure.softmax import narrow, softmax
from mpcache.secure.topk import top

__all__ = [
    "activate", "announce", "blur", "deliver", "narrow", "norm_linear", "positive", "product",
    "product_resident", "reciprocal", "resident", "shrink", "softmax", "top", "truncate", "truncate_times",
]  # fmt: skip
