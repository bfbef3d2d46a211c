"""A second model family on shares: GPT-2, with LayerNorm, learned positions, GELU, biases and fused qkv."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpcache.answer import plain_answer
from mpcache.config import PublicConfig
from mpcache.limits import bind_policy
from mpcache.model import Model, load_model
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.sampling import Sampling
from mpcache_parties.private_inputs import Question
from tests.support.paths import ROOT
from tests.support.processes import CLI, start
from tests.support.session import QUESTION, run_session
from tests.support.tiny_models import make, save

KINDS = ["gpt2", "gpt2-gelu"]  # GELU by its tanh approximation, and exact
TEXT = "and the number of the gate of the city is in the book " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("gpt2"), tmp_path_factory.mktemp("gpt2"))


def check(folder: Path, policy: str, protocol: str = "fast", tokens: int = 4) -> None:
    """The three parties answer what the plain engine answers."""
    model: Model = load_model(folder)
    assert (model.shape.positions, model.shape.norm, model.shape.gated) == ("learned", "layer", False)
    public = PublicConfig(policy=policy, protocol=protocol, max_new_tokens=tokens)  # type: ignore[arg-type]
    context = model.tokenizer.encode(TEXT, bos=True)[:48]
    asked = model.tokenizer.encode(QUESTION, bos=False)
    bound = bind_policy(model.shape, public, len(context), len(asked))
    plain = plain_answer(model, bound, context, asked, tokens, Sampling(), ())
    reports = run_session(public, model, context, Question(QUESTION, stop_at_eos=False))
    client = reports[Rank.CLIENT]
    assert isinstance(client, Report), client
    assert client.token_ids == plain.ids
    assert len(client.token_ids) == tokens


FAMILIES = ("families", "gguf_model", "gguf_tokenizer", "rope", "shape")  # modules that read a model


def test_the_program_knows_no_family() -> None:
    """A family's name stands where its files are read, and nowhere else; "llama3" is a kind of rope, too."""
    named = {
        file.relative_to(ROOT).as_posix()
        for package in ("mpcache", "parties", "kernels")
        for file in (ROOT / package).rglob("*.py")
        if re.search(r"gpt.?2|llama|qwen|mistral", file.read_text(), re.IGNORECASE)
    }
    assert named == {f"mpcache/model/{name}.py" for name in FAMILIES}


@pytest.mark.parametrize(
    "policy",
    [
        "mpcache:score=bound,coarse=8,fine=4",
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("streaming:recent=0.3", marks=pytest.mark.slow),
    ],
)
def test_gpt2_on_shares_equals_plain(policy: str, folder: Path) -> None:
    check(folder, policy)


def test_the_exact_gelu(tmp_path: Path) -> None:
    check(save(make("gpt2-gelu"), tmp_path), "snapkv:cap=20")


@pytest.mark.slow
def test_gpt2_with_stock_protocols(folder: Path) -> None:
    check(folder, "full", "stock", tokens=2)


@pytest.mark.processes
@pytest.mark.slow
def test_gpt2_between_processes(folder: Path, tmp_path: Path) -> None:
    """As a user runs it, with the threshold rule: the counts are announced between processes, too."""
    document = tmp_path / "document.txt"
    document.write_text(TEXT)
    policy = "mpcache:threshold=0.1,coarse=8,fine=4"
    flags = ["--model", folder, "--context", document, "--question", QUESTION, "--policy", policy]
    process = start(CLI, "generate", *flags, "--max-new-tokens", 4, "--no-stop-at-eos", "--json")
    out, noise = process.communicate(timeout=200)
    assert process.returncode == 0, noise
    run = json.loads(out)
    assert run["token_ids"] == run["plaintext_token_ids"] and len(run["token_ids"]) == 4
    assert run["leakage"] == "count"
    assert 0 < min(run["kept_tokens"]) < run["context_tokens"]
