"""Every policy, with options that make it evict and select on tiny contexts."""

from __future__ import annotations

import pytest

from mpcache.policy import POLICIES

CONTEXT = 24
SMALL = {  # every policy, small enough that it evicts and selects on tiny contexts
    "full": "full",
    "streaming": "streaming:sink=2,recent=5",
    "snapkv": "snapkv:cap=8,queries=3,pool=3",
    "h2o": "h2o:heavy=4,recent=3",
    "tova": "tova:cap=6",
    "quest": "quest:page=4,pages=2,full=1",
    "mpcache": "mpcache:n_keep=20,coarse=4,fine=2,sink=1,recent=2,coarse_keep=2,fine_keep=3,share=none",
    "compact": "compact:heads=5/9,counts=equal",
    "random": "random:n_keep=7",
    "oracle": "oracle:k=5",
}
PRIVATE = {name: spec for name, spec in SMALL.items() if not POLICIES[name].plain_only}
MORE = {  # options that change the protocol
    "mpcache, shared, summed, refreshed": SMALL["mpcache"].replace("none", "0-1") + ",gqa=sum,refresh=2",
    "mpcache, bound": SMALL["mpcache"] + ",score=bound",
    "mpcache, extremes": SMALL["mpcache"] + ",blocks=extremes",
    "mpcache, coarse only": SMALL["mpcache"].replace("fine_keep=3", "fine_keep=1.0"),
    "mpcache, static": SMALL["mpcache"] + ",dynamic=false",
    "quest, shared": "quest:page=4,pages=2,full=0,share=0-1",
    "streaming, not renumbered": SMALL["streaming"] + ",renumber=false",
    "snapkv, then quest": "snapkv:cap=18,queries=3,pool=3|quest:page=4,pages=2,full=1",
    "random, then mpcache, shared, refreshed": "random:n_keep=20|"
    "mpcache:coarse=4,fine=2,sink=1,recent=2,coarse_keep=2,fine_keep=3,share=0-1,refresh=2",
    "compact, equal": "compact:keep=7,counts=equal,score=rms,refit=bias",
    "compact, split, then quest": "compact:heads=12/18,counts=equal|quest:page=4,pages=2,full=0",
    "compact, then mpcache": "compact:keep=20,counts=equal,refit=none|"
    "mpcache:coarse=4,fine=2,sink=1,recent=2,coarse_keep=2,fine_keep=3,share=none",
    "mpcache, then quest": SMALL["mpcache"] + "|quest:page=4,pages=2,full=0",
}
EVERY = [pytest.param(spec, id=name) for name, spec in SMALL.items()]
SELDOM = ("compact, equal", "compact, then mpcache")  # what others show of them is enough, most of the time
ALL_PRIVATE = [
    pytest.param(spec, id=name, marks=[pytest.mark.slow] * (name in SELDOM))
    for name, spec in (PRIVATE | MORE).items()
]
