"""`--policy auto` and `mpcache audit --tune`: the cheapest setting whose measured quality holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpcache.config import PublicConfig
from mpcache.cost.planner import Situation, choose_policy, tune
from mpcache.cost.pricing import price
from mpcache.cost.quality_file import FILE, Quality, quality_of, read_quality
from mpcache.cost.rates import pace_ms
from mpcache.errors import PolicyError
from mpcache.model import demo_model_dir, load_model, load_shape
from mpcache.policy import POLICIES, parse_policy
from mpcache.policy.curve import FILE as CURVE
from mpcache.transport.network import PROFILES
from tests.support.audit_command import failure, result_of
from tests.support.paths import ROOT

LAN = PROFILES["lan"]
SHAPE = replace(load_shape(demo_model_dir()), layers=3, max_positions=1 << 16)


def row(policy: str, percent: float, accuracy: float, task: str = "facts", **more: Any) -> dict[str, Any]:
    return {"policy": policy, "budget_percent": percent, "accuracy": accuracy, "task": task, "n": 50} | more


def where(context: int = 400, tokens: int = 20) -> Situation:
    return Situation(SHAPE, context, 16, tokens, LAN)


MEASURED = [
    row("full", 100, 1.0), row("compact", 10, 0.9), row("compact", 20, 0.97), row("compact", 40, 1.0),
    row("quest", 10, 0.96), row("snapkv", 5, 0.4), row("compact:counts=joint", 5, 1.0), row("oracle", 5, 1.0),
]  # fmt: skip


def test_the_cheapest_that_holds_is_picked() -> None:
    choice = tune(Quality(MEASURED), where())
    assert choice.spec == "compact:keep=80"
    assert [each.spec for each in choice.weighed if each.ms is not None][0] == "compact:keep=80"
    times = [each.ms for each in choice.weighed if each.ms is not None]
    assert len(times) == 3 and times == sorted(times)  # full, compact and quest
    assert "picked policy compact:keep=80" in choice.why and "with full" in choice.why


@pytest.mark.parametrize(
    ("at_least", "spec"), [(0.3, "snapkv:cap=20"), (0.9, "compact:keep=40"), (0.98, "compact:keep=160")]
)
def test_a_lower_demand_is_cheaper(at_least: float, spec: str) -> None:
    assert tune(Quality(MEASURED), where(), at_least).spec == spec


def test_every_task_has_to_hold() -> None:
    quality = Quality([*MEASURED, row("full", 100, 1.0, "quotes"), row("compact", 20, 0.5, "quotes")])
    choice = tune(quality, where())
    assert choice.spec == "compact:keep=160"
    (failing,) = (each for each in choice.weighed if each.spec == "compact:keep=80")
    assert (failing.least, failing.task, failing.ms) == (0.5, "quotes", None)


def test_where_nothing_holds_the_full_cache_does() -> None:
    assert tune(Quality([row("full", 100, 1.0), row("snapkv", 20, 0.2)]), where()).spec == "full"


@pytest.mark.parametrize("unfit", [{"engine": "secure"}, {"judged": False}, {"question": "inside"}])
def test_rows_that_say_nothing_of_later_questions_are_not_weighed(unfit: dict[str, Any]) -> None:
    quality = Quality([row("full", 100, 1.0), row("snapkv", 5, 1.0, **unfit)])
    assert tune(quality, where()).spec == "full"


def test_quality_is_a_share_of_the_full_caches() -> None:
    quality = Quality([row("full", 100, 0.8), row("compact", 20, 0.8)])
    assert quality.kept() == {("compact", 20): {"facts": 1.0}}
    assert replace(quality, by_question=True).kept() == {("compact", 20): {"facts": 0.8}}


def test_documents_far_longer_than_those_measured_are_said() -> None:
    assert "measured on documents of 100 tokens" in tune(Quality(MEASURED, context=100), where()).why
    assert "measured on" not in tune(Quality(MEASURED, context=300), where()).why


# ------------------------------------------------------------------------------------- of a model


def test_what_ships_with_the_demo_model_is_what_was_measured() -> None:
    model = load_model(demo_model_dir())
    shipped = quality_of(model.path, model.digest)
    assert shipped is not None
    assert shipped.kept() == read_quality(ROOT / "docs" / "quality.json").kept()
    choice = choose_policy(model, PublicConfig(network="lan"), 400, 16)
    assert choice.spec.startswith("compact:keep=")


def test_a_model_that_nobody_measured_gets_the_default(monkeypatch: Any, tmp_path: Path) -> None:
    model = load_model(demo_model_dir())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    other = replace(model, path=tmp_path)
    assert choose_policy(other, PublicConfig(), 400, 16).spec == PublicConfig().policy
    shutil.copy(model.path / CURVE, tmp_path)
    choice = choose_policy(other, PublicConfig(), 400, 16)
    assert choice.spec == "compact" and "\n" not in choice.why
    assert "the default: no quality was measured of this model" in choice.why
    file = tmp_path / FILE  # another model's
    file.write_text(json.dumps({"model_digest": "0" * 64, "rows": MEASURED}))
    assert choose_policy(other, PublicConfig(), 400, 16) == choice
    file.write_text(json.dumps({"model_digest": model.digest, "rows": [row("snapkv", 20, 1.0)] + MEASURED}))
    assert choose_policy(other, PublicConfig(), 400, 16).spec == "snapkv:cap=80"


def test_auto_is_no_policy_by_itself() -> None:
    with pytest.raises(PolicyError, match="picked for a model, a document and a network"):
        parse_policy("auto")


def test_the_audit_tunes(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text(json.dumps({"rows": MEASURED, "context_tokens": 300}))
    flags = ["--context", "200", "--network", "lan", "--tune", "--quality", str(file)]
    (choice,) = result_of(*flags)["tuned"]
    assert choice["policy"] == "compact:keep=40"
    (other,) = result_of(*flags, "--at-least", "0.3")["tuned"]
    assert other["policy"] == "snapkv:cap=10"
    assert "--tune needs --quality" in failure("--context", "200", "--tune")
    assert "--at-least is 2" in failure(*flags, "--at-least", "2")


# ---------------------------------------------------------------------------------- no default is dear


@pytest.mark.parametrize("spec", ["quest", "mpcache"])
def test_clusters_grow_with_the_context(spec: str) -> None:
    """So that their number, which is compared in pairs, grows as its square root does."""
    counts = {n: parse_policy(spec).plan(n, SHAPE).layers[-1].counts[0] for n in (512, 1024, 4096, 32768)}  # type: ignore[attr-defined]
    assert all(n >> 6 <= count**2 <= 2 * n for n, count in counts.items())


# They rank single tokens, as their papers have it: the audit shows what that costs.
DEAR = {"tidal", "tokenselect", "recycled"}
DEEP = replace(SHAPE, layers=5)  # in some policies the first three layers attend to everything
OFFERED = [name for name, policy in POLICIES.items() if not policy.plain_only and name not in DEAR]


@pytest.mark.slow
@pytest.mark.parametrize("context", [512, 1024, 2048, 4096, 8192, 16384, 32768])
@pytest.mark.parametrize("spec", [*OFFERED, "compact|quest"])
def test_no_default_is_ten_times_dearer_than_all(spec: str, context: int) -> None:
    one, full = price(DEEP, spec, context), price(DEEP, "full", context)
    for network in PROFILES.values():
        assert pace_ms(one, network) < 10 * pace_ms(full, network)
    assert one.total("decode").offline < 10 * full.total("decode").offline
