"""What the audit says of a document of the client's own."""

from __future__ import annotations

import json

import pytest

from mpcache.audit.audit_shapes import lengths_of
from mpcache.audit.explain_document import explain_document
from mpcache.audit.private_rows import price_document
from mpcache.cli import main
from mpcache.errors import BadInput
from mpcache.transport.network import NO_NETWORK, parse_network
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
    assert evicted["eviction"]["rounds"] == 7 + 2  # all layers at once, and the client's bit


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
