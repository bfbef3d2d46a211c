"""`mpcache check` tries identity, port and links from one machine, and disturbs nobody."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from mpcache.certificates import Identity, make_identity
from mpcache.config import Settings
from mpcache.errors import BadInput
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.link_check import LinkFinding, check_links, rank_in
from mpcache_parties.network.connect import open_network
from mpcache_parties.network.listener import Listener
from tests.support.identities import pinned, trusts
from tests.support.links import free_settings
from tests.support.processes import Run, write_config

S, C, D = Rank


@pytest.fixture
def identities() -> list[Identity]:
    return [make_identity(rank) for rank in Rank]


def found(rows: list[LinkFinding]) -> dict[str, tuple[bool | None, str]]:
    return {row.what: (row.ok, row.found) for row in rows}


def test_links_to_parties_that_wait_and_serve(tmp_path: Path, identities: list[Identity]) -> None:
    settings = pinned(free_settings(), identities)
    server, _, dealer = trusts(settings, identities, tmp_path)
    said: list[str] = []
    with (
        open_network(S, settings, Ledger(), trust=server) as waiting,
        closing(Listener(D, settings, limit=1, trust=dealer, say=said.append)),
    ):
        for _ in range(3):
            rows = found(check_links(C, settings, tmp_path / "1", False))
            assert [ok for ok, _ in rows.values()] == [True] * 3, rows
            assert "answers in" in rows["link to server"][1] and "TLS, both" in rows["link to dealer"][1]
        rows = found(check_links(S, settings, tmp_path / "0", False))
        assert rows["link to dealer"][0] is True and rows["link from client"][0] is None
        assert rows["port"][0] is None and "is in use" in rows["port"][1]
        assert waiting.failure is None and waiting.session is None and said == []
        assert not waiting.trust.strangers() and not dealer.strangers()


def test_what_is_wrong_is_told_for_each_link(tmp_path: Path, identities: list[Identity]) -> None:
    settings = pinned(free_settings(), identities)
    *_, dealer = trusts(settings, identities, tmp_path)
    other = make_identity(C)
    other.write(tmp_path / "other")
    mine = pinned(settings, [identities[S], other, identities[D]])
    with closing(Listener(D, settings, trust=dealer)):
        rows = found(check_links(C, mine, tmp_path / "other", False))
        assert rows["link to server"] == (False, "refused: its host answers, and nobody listens there")
        assert (
            rows["link to dealer"][0] is False and "refuses client's certificate" in rows["link to dealer"][1]
        )
        rows = found(check_links(C, settings, None, False))
        assert rows["identity"][0] is False and "give --identity DIR" in rows["identity"][1]
        assert rows["link to server"][0] is False and rows["link to dealer"][0] is None
        plain = settings.model_copy(update={"certificates": Settings().certificates})
        rows = found(check_links(C, plain, None, False))
        assert "takes TLS alone" in rows["link to dealer"][1]


def test_whose_links_are_tried(tmp_path: Path, identities: list[Identity]) -> None:
    assert rank_in(None, None) is C and rank_in(None, 2) is D
    identities[S].write(tmp_path)
    assert rank_in(tmp_path, None) is S
    identities[D].write(tmp_path)
    with pytest.raises(BadInput, match="holds 2 identities; give --rank"):
        rank_in(tmp_path, None)


def test_the_command_prints_a_table_and_ends_with_a_code(tmp_path: Path, run_here: Run) -> None:
    settings = free_settings()
    config = write_config(settings, tmp_path / "session.yaml")
    with closing(Listener(S, settings)), closing(Listener(D, settings)):
        code, out, _ = run_here("check", "--config", config)
    assert code == 0
    assert "link to dealer" in out
    code, out, _ = run_here("check", "--config", config, "--rank", 0, "--json")
    assert code == 3
    checks = {row["what"]: row["ok"] for row in json.loads(out)["checks"]}
    assert checks == {"identity": True, "port": True, "link to dealer": False, "link from client": None}
