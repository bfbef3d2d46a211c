"""Rules of this house that no tool checks: which modules tests may import from."""

from __future__ import annotations

import ast

from tests.support.paths import ROOT


def imported(source: str) -> set[str]:
    """Return the modules that a source imports and the names that it takes from them, dotted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def from_tests(source: str) -> list[str]:
    """Return what a source imports from a test file or a conftest."""
    parts = {name: name.split(".") for name in sorted(imported(source))}
    return [name for name, of in parts.items() if any(p == "conftest" or p.startswith("test_") for p in of)]


def test_nothing_imports_from_a_test_file() -> None:
    """Helpers that two test files share stand in tests/support."""
    found = {
        file.relative_to(ROOT).as_posix(): names
        for folder in ("tests", "tools")
        for file in (ROOT / folder).rglob("*.py")
        if (names := from_tests(file.read_text()))
    }
    assert found == {}


def test_an_import_from_a_test_file_is_seen() -> None:
    assert from_tests("from tests.leaks.test_leaks import check")
    assert from_tests("def inner():\n    from tests.mpcache.conftest import run_here")
    assert from_tests("import tests.mpcache.test_cli as other")
    assert from_tests("from tests.mpcache import test_cli")
    assert from_tests("from .test_cli import words")
    assert from_tests("from . import conftest")
    assert not from_tests("from tests.support.play import Played, play")
