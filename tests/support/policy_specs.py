"""Every policy, with options that make it evict and select on tiny contexts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

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
    "tidal": "tidal:k=6,full=0,choose=0",
    "delta": "delta:page=4,pages=2,recent=1,full=0,choose=0",
    "recycled": "recycled:k=6,refresh=3",
    "tokenselect": "tokenselect:k=5,sink=1,recent=2",
    "hip": "hip:k=4,block=1,sink=1,recent=2,full=1",
    "windowkv": "windowkv:cap=10,suffix=3,size=2,group=1",
    "sepllm": "sepllm:initial=1,separators=4,recent=3,ids=2/5/7/11",
    "promptdistill": "promptdistill:k=8,layer=0,pool=3",
    "topv": "topv:cap=12,recover=0.3",
    "pod": "pod:sink=2,recent=4,share=0-1",
    "shadowkv": "shadowkv:page=2,pages=3,outliers=2,recent=1,rank=3",
    "nosa": "nosa:page=4,pages=2,always=1",
    "keyformer": "keyformer:cap=7,recent=0.4,length=4",
    "pact": "pact:keep=14,centres=11,cutoff=0.5",
    "cascade": "cascade:places=8,tiers=3,sink=1",
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
    "tidal, at a budget": "tidal:k=6,dense=false,choose=1,full=1",
    "delta, at a budget, summed": "delta:page=4,pages=2,recent=1,choose=1,full=1,dense=false,vote=sum",
    "recycled, at a budget": "recycled:k=6,refresh=3,dense=false",
    "tokenselect, linear, refreshed": "tokenselect:k=5,sink=1,recent=2,vote=linear,refresh=3",
    "hip, blocks, refreshed": "hip:k=4,block=2,sink=1,recent=2,full=0,refresh=2",
    "windowkv, max": "windowkv:cap=10,suffix=3,size=5,score=max",
    "promptdistill, whole before": "promptdistill:k=8,layer=0,truncate=false",
    "pod, keys": "pod:sink=2,recent=4,share=0-1,lend=keys",
    "pod, weights": "pod:sink=2,recent=4,share=0-1,lend=weights",
    "pod, behind random": "random:n_keep=20|pod:sink=2,recent=4,share=0-1,lend=weights",
    "cascade, by position": "cascade:places=8,tiers=3,sink=1,duel=false",
    "recycled, behind snapkv": "snapkv:cap=18,queries=3,pool=3|recycled:k=6,refresh=3",
}
FIELD = (
    "cascade",
    "pact",
    "keyformer",
    "nosa",
    "shadowkv",
    "pod",
    "topv",
    "promptdistill",
    "sepllm",
    "windowkv",
    "tidal",
    "delta",
    "recycled",
    "tokenselect",
    "hip",
)  # in full in the slow tests
IN_SHORT = ("delta",)  # what stands for them in the others
NEED_A_MODEL = ("pact", "sepllm", "promptdistill", "topv")  # or a tokenizer, to evict
SLOW_ONLY = tuple(name for name in FIELD if name not in IN_SHORT)


def marked(name: str) -> list[pytest.MarkDecorator]:
    """Mark what the slow tests alone run. name: of a policy, with words behind a comma or a colon."""
    return [pytest.mark.slow] * (re.split("[,:]", name)[0] in SLOW_ONLY)


def by_name(names: Iterable[str]) -> list[Any]:
    """Parametrize by policies' names."""
    return [pytest.param(name, marks=marked(name)) for name in names]


EVERY = [pytest.param(spec, id=name, marks=marked(name)) for name, spec in SMALL.items()]
EVERY_MORE = [*EVERY, *[pytest.param(spec, id=name, marks=marked(name)) for name, spec in MORE.items()]]
SELDOM = ("compact, equal", "compact, then mpcache")  # what others show of them is enough, most of the time
ALL_PRIVATE = [
    pytest.param(spec, id=name, marks=[pytest.mark.slow] * (name in SELDOM) or marked(name))
    for name, spec in (PRIVATE | MORE).items()
]
