"""Which heads choose together: rows of scores (KV, m g, n) as the rows that choose, and back.

head: each by itself.  group: the g heads of a KV head.  layer: all of a layer's.
"""

from __future__ import annotations

from mpcache.ops import Value
from mpcache.policy.layer_view import LayerView

SCOPES = ("head", "group", "layer")


def fold(view: LayerView, x: Value, items: int, scope: str) -> Value:
    """Put what concerns one item in one place: (KV, m g, items s) -> (*rows, items, s heads). No cost.

    rows: (KV, m g) for heads, (KV, m) for groups, (m,) for a layer.
    """
    kv, rows, n = x.shape
    m = view.m
    if scope == "head":
        return x.reshape(kv, rows, items, n // items)
    x = x.reshape(kv, m, rows // m, n)
    if scope == "group":
        return x.transpose(2, 3).reshape(kv, m, items, -1)
    return x.transpose(0, 1).reshape(m, kv * (rows // m), n).transpose(1, 2).reshape(m, items, -1)


def unfold(view: LayerView, x: Value, scope: str) -> Value:
    """Undo `fold`, whatever the number of items is now. No cost."""
    kv, g, m = view.shape.kv_heads, view.shape.group, view.m
    if scope == "head":
        return x.reshape(kv, m * g, -1)
    if scope == "group":
        return x.reshape(kv, m, -1, g).transpose(2, 3).reshape(kv, m * g, -1)
    return (
        x.reshape(m, -1, kv * g).transpose(1, 2).reshape(m, kv, g, -1).transpose(0, 1).reshape(kv, m * g, -1)
    )
