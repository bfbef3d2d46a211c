"""The threat model: its tests exist, its policies are the registry's. The map begins as the package."""

from __future__ import annotations

import re
from inspect import getdoc
from pathlib import Path

import pytest

import mpcache
from mpcache.policy import POLICIES
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


def missing(text: str) -> list[str]:
    """The tests that a text names and that are not there."""
    found = []
    for file, name in TEST.findall(text):
        path = ROOT / file
        if not path.is_file() or (name and not re.search(rf"^ *def {name}\(", path.read_text(), re.M)):
            found.append(f"{file}::{name}" if name else file)
    return found


def rows(section: str) -> list[list[str]]:
    """A table of the threat model, by cells, without its head."""
    page = (ROOT / "docs" / "threat-model.md").read_text()
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    assert missing(page.read_text()) == []


def test_a_test_that_is_not_there_is_missed() -> None:
    here = "tests/docs/test_docs.py"
    assert missing(f"`{here}::test_a_test_that_is_not_there_is_missed`") == []
    assert missing(f"`{here}::test_nothing` and `tests/test_no.py`") == [
        f"{here}::test_nothing",
        "tests/test_no.py",
    ]


def test_the_map_begins_as_the_package_introduces_itself() -> None:
    title, text = (ROOT / "docs" / "architecture.md").read_text().split("\n\n", 1)
    assert title == "# Architecture"
    assert text.startswith(f"{getdoc(mpcache)}\n\n## ")


def test_the_map_explains_thirty_words() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    words = page.split("## Words")[1].split("\n## ")[0]
    assert words.count("\n| ") - 1 == 30  # but for the head


def test_each_claim_names_its_test() -> None:
    claims = rows("Claims")
    assert len(claims) > 15
    for claim, rests_on, tests in claims:
        assert rests_on
        assert any(name for _, name in TEST.findall(tests)), claim


def test_the_table_of_policies_is_the_registry() -> None:
    told = {name.strip("`"): leak for name, leak, _ in rows("What a policy reveals")}
    assert told == {name: policy.leaks for name, policy in POLICIES.items()}
