"""A model's curve: what is measured, where it goes, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mpcache.cli import app
from mpcache.errors import BadInput
from mpcache.evaluate.calibrate import layer_errors, texts
from mpcache.evaluate.calibrate_command import write_curve
from mpcache.model import demo_model_dir, load_model
from mpcache.model.prefill import prefill
from mpcache.model.reread import reread
from mpcache.policy.curve import LEVELS, HeadCurve, read_curve
from mpcache.policy.refit import fit, reference_queries, targets_of
from mpcache.policy.scores import score_tokens
from tests.support.tiny_policies import KERNELS, model, shape, tokens


def test_an_errors_is_what_the_whole_output_moves_by() -> None:
    """One head and level by hand: a softmax over kept tokens and the reading's own, against all of them."""
    s, ids, head, level = shape(layers=1), tokens(60), 1, LEVELS.index(0.3)
    known = prefill(model(s), ids)
    (part,) = reread(known)
    got = layer_errors(known, 0, KERNELS)
    assert got.shape == (2, len(LEVELS)) and (got[:, -1] == 0).all() and (got[:, 0] > got[:, -2]).all()
    k, v = known.k[0][head], known.v[0][head]
    order = score_tokens("kvzip+", known, 0, KERNELS, 0)[head].sort(descending=True, stable=True).indices
    kept = order[: int(0.3 * 60)].sort().values
    q = reference_queries([part], 0, head, 2)
    targets, own_k, own_v = targets_of(q, k, v), part.k[0][head], part.v[0][head]
    out = model(s).weights.layers[0].wo.reshape(2, 2, s.head_dim, -1)[head]
    own = q @ own_k.T
    own = own.masked_fill(torch.ones(60, 60).triu(1).bool().repeat(2, 1), -torch.inf)
    whole = torch.cat([q @ k.T, own], 1).softmax(-1) @ torch.cat([v, own_v])
    share = torch.cat([q @ k.T, own], 1).softmax(-1)[:, :60].sum(-1, keepdim=True)
    bias, values = fit(targets, kept, v, share)
    fitted = torch.cat([q @ k[kept].T + bias, own], 1).softmax(-1) @ torch.cat([values, own_v])
    moved = sum(((fitted - whole) @ out[g]).square().sum(-1).mean() / 2 for g in range(2))
    assert float(got[head, level]) == pytest.approx(float(moved / part.sizes[0].square().mean()), rel=2e-3)


def test_documents_hold_facts_and_prose_and_what_is_given() -> None:
    demo = load_model(demo_model_dir())
    facts, prose, given = texts(demo, 2, 200, ["In the beginning. " * 100])
    assert all(0 < len(ids) <= 200 for ids in (facts, prose, given))
    assert " is " in demo.tokenizer.decode(facts) and any(c.isdigit() for c in demo.tokenizer.decode(facts))
    assert not any(c.isdigit() for c in demo.tokenizer.decode(prose))
    assert texts(demo, 2, 200, [])[0] == facts  # the same again: a curve is made again alike
    with pytest.raises(BadInput, match="--context 32: too short for a document of facts"):
        texts(demo, 1, 32, [])


def test_a_curve_goes_beside_the_model_or_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    curve = HeadCurve("a" * 64, torch.zeros(1, 1, len(LEVELS), dtype=torch.float64), {})
    (tmp_path / "model").mkdir()
    assert write_curve(curve, tmp_path / "model", None) == tmp_path / "model" / "mpcache-curve.json"
    (tmp_path / "file").touch()
    apart = write_curve(curve, tmp_path / "file" / "model", None)  # no folder can be there
    assert apart == tmp_path / "data" / "mpcache" / "curves" / f"{'a' * 64}.json"
    assert read_curve(apart).digest == curve.digest
    with pytest.raises(BadInput, match="cannot be written"):
        write_curve(curve, tmp_path / "model", tmp_path / "file" / "x.json")


def test_the_command_makes_a_curve_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "curve.json"
    flags = ["--documents", "1", "--context", "140", "--answers", "0", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, ["calibrate", *flags])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row == {"curve": str(out), "model_digest": load_model(demo_model_dir()).digest, "check": {}}
    assert read_curve(out).errors.shape == (6, 2, len(LEVELS))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--documents", "0"], "a curve needs text"),
        (["--documents", "1001"], "--documents is 1001; give 0 to 1000"),
        (["--answers", "-1"], "--answers is -1; give 0 to 1000"),
        (["--context", "5000"], "--context is 5000; give 32 to"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["calibrate", *flags])
    assert isinstance(done.exception, BadInput) and words in str(done.exception)
    assert "\n" not in str(done.exception)
