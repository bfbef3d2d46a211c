"""Rules of this house that no tool checks: names that are used once, sizes, and what tests import."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcache.audit.catalog import CATALOG
from mpcache.runtime.program import NO_WORK, Request, RequestKind
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


SOURCES = [  # the packages; tools are scripts, each for itself
    file for folder in ("mpcache", "parties", "kernels") for file in sorted((ROOT / folder).rglob("*.py"))
]
LONGEST_FILE, LONGEST_FUNCTION = 430, 70  # lines
# One meaning, several readings: the same names on purpose.
TWINS = (
    {"mpcache/engines/ideal.py", "mpcache/protocols"},
    {"kernels/mpcache_kernels/reference.py", "kernels/mpcache_kernels/triton_kernels"},
)
# A file's name stands with its folder's where both are the field's word for it.
FILE_TWINS = {"registry.py", "__init__.py", "__main__.py"}


def definitions(file: Path) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node


def shown(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def are_twins(places: list[str]) -> bool:
    """Whether all of these places read one meaning."""
    return any(all(any(place.startswith(part) for part in parts) for place in places) for parts in TWINS)


def test_a_public_name_means_one_thing() -> None:
    """Classes and functions of modules; `main` is every script's."""
    places: dict[str, list[str]] = defaultdict(list)
    for file in SOURCES:
        for node in definitions(file):
            if not node.name.startswith("_") and node.name != "main":
                places[node.name].append(shown(file))
    assert {name: where for name, where in places.items() if len(where) > 1 and not are_twins(where)} == {}


def test_a_file_name_is_used_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for file in SOURCES:
        if file.name not in FILE_TWINS:
            places[file.name].append(shown(file))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_files_and_functions_are_read_in_one_sitting() -> None:
    """A command line has a parameter for each flag: there the body counts."""
    long = {shown(file): n for file in SOURCES if (n := len(file.read_text().splitlines())) > LONGEST_FILE}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                flags = any(
                    "typer.Option" in ast.unparse(a) for a in node.args.defaults + node.args.kw_defaults if a
                )
                flags |= any("Annotated" in ast.unparse(a.annotation) for a in node.args.args if a.annotation)
                first = node.body[0].lineno if flags else node.lineno
                if node.end_lineno - first >= LONGEST_FUNCTION:
                    long[f"{shown(file)}:{node.name}"] = node.end_lineno - first + 1
    assert long == {}


def test_every_kind_of_request_is_in_the_catalog() -> None:
    assert set(CATALOG) == set(RequestKind)


def test_a_request_without_a_known_kind_or_its_work_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="no known kind"):
        Request("shuffle", (), (), lambda: (), NO_WORK)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="work"):
        Request(RequestKind.MASK, (), (), lambda: ())  # type: ignore[call-arg]


def test_files_that_start_parties_share_a_worker() -> None:
    pytest.importorskip("xdist")
    from tests.support.schedule import STARTING

    assert {"tests/parties/test_faults.py", "tests/mpcache/test_cli.py"} <= STARTING
    assert "tests/kernels/test_triton.py" not in STARTING
