"""`mpcache check --model` says before a run what is in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mpcache.check.model_findings import _findings
from mpcache.config import Settings
from mpcache.model import Model
from mpcache_parties.say import quiet
from tests.support.chat_templates import KINDS
from tests.support.processes import Run
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import make

SETTINGS = ("--question", "of the gate", "--policy", "full", "--max-new-tokens", 3)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "document.txt"
    file.write_text("the gate of the city, and the number of the gate")
    return file


def rows(run: Run, *arguments: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out, _ = run("check", *arguments, "--json")
    return code, {row["what"]: row for row in json.loads(out)["checks"]}


def test_a_model_that_can_run_is_described_whole(document: Path, tmp_path: Path, run_here: Run) -> None:
    template = KINDS["chatml"].source
    file = write_gguf(make("llama-gqa"), tmp_path / "tiny.gguf", tokenizer__chat_template=template)
    code, found = rows(run_here, "--model", file, "--context", document, *SETTINGS)
    assert code == 0 and all(row["ok"] for row in found.values())
    assert list(found) == [
        "architecture", "tokenizer", "end tokens", "chat template", "memory", "time", "weights", "ranges"
    ]  # fmt: skip
    said = {what: row["found"] for what, row in found.items()}
    assert said["architecture"].startswith("llama, GGUF of F32: 3 layers of width 64, 4 heads on 2 KV heads")
    assert said["tokenizer"].startswith("a text begins with <s>")
    assert (said["end tokens"], said["chat template"]) == ("</s> (2)", "yes")
    assert "at each party" in said["memory"] and "a token" in said["time"]
    assert said["ranges"].startswith("every value of 3 tokens is within; the nearest: ")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses: Range too big"),
        ("{{ raise_exception('not today') }}", "refuses: not today"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no prompt for an answer"),
        ("{% for %}", "cannot be used: line 1"),
    ],
)
def test_a_template_that_cannot_be_used_is_in_the_way_unless_it_is_left_out(
    source: str, says: str, tmp_path: Path, run_here: Run
) -> None:
    file = write_gguf(make("llama-gqa"), tmp_path / "tiny.gguf", tokenizer__chat_template=source)
    code, found = rows(run_here, "--model", file, *SETTINGS)
    last = found["chat template"]
    assert code == 2 and list(found)[-1] == "chat template" and last["ok"] is False
    assert says in last["found"] and last["found"].endswith("; use --raw, which uses no template")
    if says.startswith("cannot"):
        code, found = rows(run_here, "--model", file, *SETTINGS, "--raw")
        assert code == 0 and found["chat template"]["found"] == "yes, and left out (--raw)"


def test_a_folder_without_a_document_is_described_too(model: Model, run_here: Run) -> None:
    code, found = rows(run_here, "--model", model.path, *SETTINGS)
    assert code == 0
    assert found["architecture"]["found"].startswith("llama, a Hugging Face folder: ")
    assert found["chat template"]["found"] == "no"
    assert found["ranges"]["ok"] is None and found["ranges"]["found"] == "not checked: give --context FILE"


def test_the_policy_is_the_one_that_a_run_would_take() -> None:
    """`compact` for the demo model, which has a curve."""
    found = _findings("demo", None, "of the gate", Settings(), quiet)
    memory = next(row for row in found if row.what == "memory")
    assert memory.where.startswith("compact, fast, ")


def test_what_is_in_the_way_is_the_last_row_and_the_exit_code(tmp_path: Path, run_here: Run) -> None:
    code, found = rows(run_here, "--model", tmp_path / "none.gguf", *SETTINGS)
    assert (
        code == 2 and list(found) == ["model"] and "no such model folder or file" in found["model"]["found"]
    )
    whole = write_gguf(make("llama-gqa"), tmp_path / "whole.gguf")
    (tmp_path / "nan.gguf").write_bytes(whole.read_bytes()[:-32] + b"\xff" * 32)
    code, found = rows(run_here, "--model", tmp_path / "nan.gguf", *SETTINGS)
    assert code == 2 and list(found)[-1] == "model" and found["time"]["ok"]
    assert "holds NaN or infinity" in found["model"]["found"]


def test_a_value_that_leaves_its_range_is_told(document: Path, tmp_path: Path, run_here: Run) -> None:
    """Weights that are far too large: the document's values, or one on the way, leave what `fast` holds."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000 if parameter.dim() > 1 else 1)
    file = write_gguf(model, tmp_path / "loud.gguf")
    code, found = rows(run_here, "--model", file, "--context", document, *SETTINGS)
    assert code == 2 and found["ranges"]["ok"] is False and "wrong" in found["ranges"]["found"]


def test_a_document_without_a_model_is_refused(document: Path, run_here: Run) -> None:
    code, _, error = run_here("check", "--context", document)
    assert code == 2 and "--context, --question and --question-file need --model" in error


def test_the_table_says_ok(model: Model, run_here: Run) -> None:
    code, out, _ = run_here("check", "--model", model.path, *SETTINGS)
    assert code == 0 and "architecture" in out and "not known here" in out
