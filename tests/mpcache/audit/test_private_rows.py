"""What the audit says of a document of the client's own."""

from __future__ import annotations

import csv
import io
import json

import pytest

from mpcache.audit.audit_shapes import lengths_of
from mpcache.audit.explain_document import explain_document, explained_document
from mpcache.audit.exports import flattened
from mpcache.audit.private_rows import price_document
from mpcache.cli import main
from mpcache.errors import BadInput
from mpcache.protocols.compaction import compared_rows
from mpcache.transport.network import NO_NETWORK, parse_network
from tests.support.audit_command import run
from tests.support.tiny_policies import shape

LAN = parse_network("lan") or NO_NETWORK


def test_an_eviction_pays_where_later_tokens_save_more_than_it_costs() -> None:
    full, evicted = price_document(
        shape(), [60], ["full", "mpcache:n_keep=0.25,sink=2,recent=4"], ["fast"], [LAN], 4
    )
    assert full["eviction"] is None and full["token"] == full["token_with_all"]
    assert (full["kept_tokens"], evicted["kept_tokens"]) == (60, 15)
    assert evicted["token_with_all"] == full["token"]
    cost, saving = (
        2 * (a["online_bytes"] - b["online_bytes"]) + a["offline_bytes"] - b["offline_bytes"]
        for a, b in (
            (evicted["eviction"], {"online_bytes": 0, "offline_bytes": 0}),
            (full["token"], evicted["token"]),
        )
    )
    pays = evicted["pays_from_tokens_by_bytes"]
    assert saving > 0 and (pays - 1) * saving < cost <= pays * saving
    assert evicted["eviction"]["rounds"] == 8 + 2  # all layers at once, and the client's bit


def test_its_plan_in_words_names_what_is_opened() -> None:
    lines = list(explain_document(shape(), "snapkv:cap=0.5,queries=4", 20, 4, "fast"))
    text = "\n".join(lines)
    for said in (
        "judges: 4",
        "kept: 10 in layers 0 to 1",
        "ranks of shuffled rows",
        "rows to shuffle, masked",
    ):
        assert said in text
    whole = list(explain_document(shape(), "full", 20, 4, "fast"))
    assert "all of it stays" in whole[-1]
    data = explained_document(shape(), "snapkv:cap=0.5,queries=4", 20, 4, "fast")
    names = [step["step"] for step in data["steps"]]
    assert data["plan"]["judges"] == 4 and all(f"  {name}" in text for name in names)
    assert {o["why"] for step in data["steps"] for o in step["opened"]} >= {"rows to shuffle, masked"}


def test_rows_that_are_sorted_are_told_at_once() -> None:
    rule = "mpcache:n_keep=0.5,sink=1,recent=2"
    lines = list(explain_document(shape(max_positions=2048), rule, 1100, 4, "fast"))
    ordered = next(line for line in lines if "order of shuffled rows" in line)
    assert f"({compared_rows(1100 - 3)}) of 1 B" in ordered and len(lines) < 60


def test_every_table_goes_through_one_writer() -> None:
    """Of a document, of machines, of prices and of choices: CSV and Markdown alike."""
    private = ["--private-context", "24", "--private-policy", "h2o", "--network", "none"]
    for flags, column in (
        (private, "reading_online_bytes"),
        (["--sizing", "--context", "64"], "memory_bytes_dealer"),
        (["--context", "64", "--policy", "full", "--network", "lan", "--by", "op"], "offline_bytes"),
    ):
        rows = list(csv.DictReader(io.StringIO(run(*flags, "--format", "csv").stdout)))
        assert rows and sum(float(row[column]) for row in rows) > 0
        lines = run(*flags, "--format", "markdown").stdout.splitlines()
        assert lines[0].startswith("**") and any(line.startswith("|---") for line in lines)
    parts = [line for line in run(*private, "--format", "markdown").stdout.splitlines() if "| h2o" in line]
    assert [line.split(" | ")[4] for line in parts] == ["reading", "eviction", "token, all", "token, kept"]
    assert flattened({"a": {"b": {"c": 1}}, "d": [2], "e": 3}) == {"a_b_c": 1, "e": 3}


def test_the_command_prints_rows_and_refuses_what_is_no_length(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["audit", "--private-context", "24", "--private-policy", "h2o", "--network", "none", "--json"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0
    (row,) = json.loads(capsys.readouterr().out)["private_rows"]
    assert (row["private_tokens"], row["network"]) == (24, NO_NETWORK.name)
    for text in ("x", "0", "1.5"):
        with pytest.raises(BadInput, match="is not a number of tokens"):
            lengths_of("--private-context", text)
