"""What a docstring, a comment or a page cites exists: a rename that leaves a citation behind fails here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.citations import (
    ELSEWHERE,
    PAGES,
    SOURCES,
    links_missing,
    names_missing,
    of_page,
    of_source,
    paths_missing,
    sections_missing,
    shown,
)
from tests.support.paths import ROOT


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_what_a_page_cites_exists(page: Path) -> None:
    assert of_page(page) == []


def test_what_docstrings_and_comments_cite_exists() -> None:
    assert [f"{shown(path)}: {missing}" for path in SOURCES for missing in of_source(path)] == []


@pytest.mark.parametrize(
    "text, missing",
    [
        ("see mpcache/decode.py, `mpcache/policy/NAME.py` and decode.py.", []),
        ("see mpcache/decoding.py", ["mpcache/decoding.py"]),
        ("mpcache_parties/main.py", []),
        ("`policy/nothing.py` and nowhere.md", ["policy/nothing.py", "nowhere.md"]),
        ("tests/docs/test_citations.py::test_a_path_that_is_not_there_is_missed", []),
        ("tests/docs/test_citations.py::test_no", ["tests/docs/test_citations.py::test_no"]),
    ],
)
def test_a_path_that_is_not_there_is_missed(text: str, missing: list[str]) -> None:
    assert list(paths_missing(text)) == missing


def test_a_section_that_is_not_there_is_missed() -> None:
    assert list(sections_missing("docs/protocols.md, section 6.1", None)) == []
    assert list(sections_missing("(docs/protocols.md, sections 4 and 99)", None)) == [
        "docs/protocols.md, section 99"
    ]
    assert list(sections_missing("section 99", ROOT / "docs/protocols.md")) == ["section 99"]
    assert list(sections_missing("Boyle et al., section 4", None)) == []


@pytest.mark.parametrize(
    "text, missing",
    [
        ("`linear.truncate`, `Ops.prepare`, `topk.HotSelection.scatter`, mpcache.audit.formula", []),
        ("`torch.matmul(a, b)`, `config.json`, `timeouts.reconnect_s`", []),
        ("`linear.shorten` of `Ops.shorten`", ["linear.shorten", "Ops.shorten"]),
        ("in mpcache.nowhere", ["mpcache.nowhere"]),
        ("`open_everything`, `LeakyParty`", ["open_everything", "LeakyParty"]),
    ],
)
def test_a_name_that_is_not_there_is_missed(text: str, missing: list[str]) -> None:
    assert list(names_missing(text)) == missing


def test_a_link_that_leads_nowhere_or_outside_is_missed() -> None:
    page = ROOT / "docs" / "protocols.md"
    text = "[a](../README.md) [b](benchmarks.md#the-link) [c](no.md) [d](benchmarks.md#no) [e](../../x/y.md)"
    assert list(links_missing(text, page)) == ["no.md", "benchmarks.md#no", "../../x/y.md"]


def test_a_document_that_is_not_in_the_repository_is_seen() -> None:
    assert ELSEWHERE.search("as said in " + "HANDBOOK 7")
    assert not ELSEWHERE.search("Boyle et al., EUROCRYPT 2021")
