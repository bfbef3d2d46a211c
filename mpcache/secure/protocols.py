"""The protocols that `FastOps` is assembled from, by name.

`mpcache.secure.ideal` has the same names with the same signatures, on plain fixed-point integers.
"""

from mpcache.secure.activation import activate, truncate_to_multiply
from mpcache.secure.linear import product, product_resident, resident, truncate
from mpcache.secure.norm import reciprocal, rms_norm
from mpcache.secure.positive import positive
from mpcache.secure.softmax import narrow, softmax
from mpcache.secure.topk import top

__all__ = [
    "activate", "narrow", "positive", "product", "product_resident", "reciprocal", "resident",
    "rms_norm", "softmax", "top", "truncate", "truncate_to_multiply",
]  # fmt: skip
