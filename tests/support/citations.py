"""Citations in docstrings, comments and pages, and which of them lead nowhere.

A citation is a path (`mpcache/decode.py`), a test (a path, `::` and its name), a numbered section
(docs/protocols.md, section 6.1), a Markdown link, or a name in backticks: dotted (`linear.truncate`,
`Ops.prepare`) or single (`open_masked`). Each function yields what is missing, as it is cited.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("mpcache", "parties", "kernels", "protos", "tools", "tests")  # folders with Python of ours
ROOMS = (*PACKAGES, "docs", "configs", "requirements", r"\.ci")
IMPORTS = {"mpcache_parties": "parties", "mpcache_kernels": "kernels", "mpcache_protos": "protos"}
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "mpcache/demo/README.md"]
SOURCES = sorted(
    path
    for folder in PACKAGES
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.endswith("_pb2.py") and "__pycache__" not in path.parts
)
# Pages that tell history: a single word there need not be a name of today's code.
HISTORY = {"CHANGELOG.md", "log.md"}

PATH = re.compile(rf"(?<![\w/.:<-])((?:{'|'.join((*ROOMS, *IMPORTS))})/[\w./*-]*[\w*/])(?:::(\w+))?")
BARE_FILE = re.compile(r"(?<![\w/.*-])((?:[\w-]+/)*[\w-]+\.(?:py|md))\b(?!/)")
SECTION = re.compile(r"([\w./-]+\.md),?\s+sections?\s+(\d+(?:\.\d+)*)(?:(?: and | to |, )(\d+(?:\.\d+)*))?")
OWN_SECTION = re.compile(r"(?<![\w,] )\bsections? (\d+(?:\.\d+)*)(?:(?: and | to )(\d+(?:\.\d+)*))?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TICKED = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
DOTTED = re.compile(r"^_?[A-Za-z]\w*(?:\.\w+)+$")
MODULE = re.compile(r"(?<![\w./-])(mpcache(?:_\w+)?(?:\.[A-Za-z_]\w*)+)(?![\w/-])")
DATA = re.compile(
    r"\.(json|safetensors|html|yaml|crt|key|txt|csv|svg|proto|md|py|pyi|toml|gguf|jinja|css|js)$"
)
_METRIC = re.compile(r"^mpcache_|_total$")  # a metric is a counter's name with these around it
NAME = re.compile(r"^(?:_?[a-z]+(?:_[a-z0-9]+)+|(?:[A-Z][a-z0-9]+){2,}|[A-Z][a-z]+[A-Z]+\w*|[a-z]+)$")
# A title in capitals with a number or a heading is a document; ours are cited by their path.
ELSEWHERE = re.compile(r'\b[A-Z]{5,}(?: \d{1,2}\b|, ")|(?<![\w.])\.\./|(?<![\w.])/(?:home|root|mnt|Users)/')


@dataclass
class Names:
    """What Python of ours defines: modules with their names, classes with their members, and all words."""

    modules: dict[str, set[str]] = field(default_factory=dict)
    members: dict[str, set[str]] = field(default_factory=dict)
    bases: dict[str, set[str]] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)

    def of_class(self, name: str) -> set[str]:
        """Its members and those of its bases of ours."""
        found: set[str] = set()
        todo, seen = [name], set[str]()
        while todo:
            seen.add(one := todo.pop())
            found |= self.members.get(one, set())
            todo += self.bases.get(one, set()) - seen
        return found

    def has(self, parts: list[str]) -> bool:
        """Whether dotted parts lead somewhere, or start with nothing of ours."""
        heads = [name for name in self.modules if f".{name}".endswith("." + parts[0])]
        for end in range(len(parts), 0, -1):
            whole = ".".join(parts[:end])
            mine = [name for name in self.modules if f".{name}".endswith("." + whole)]
            if any(self._leads(self.modules[name], parts[end:]) for name in mine):
                return True
        classes = [name for name in self.members if name.lower() == parts[0].replace("_", "").lower()]
        heirs = {one for one, bases in self.bases.items() if bases & set(classes)}
        if any(self._leads(self.of_class(name), parts[1:]) for name in (*classes, *heirs)):
            return True
        return not heads and not classes and parts[0] != "mpcache"

    def _leads(self, there: set[str], rest: list[str]) -> bool:
        if not rest:
            return True
        first, *more = rest
        return first in there and (not more or first not in self.members or more[0] in self.of_class(first))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in IMPORTS.values():
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node, clean=True) or ""


@cache
def names() -> Names:
    found = Names()
    for path in SOURCES:
        if path.name.startswith("test_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = set(docstrings(tree))
        found.words |= set(module_name(path).split("."))
        found.modules[module_name(path)] = {
            *_bound(tree.body), *(child.stem for child in path.parent.iterdir() if path.name == "__init__.py")
        }  # fmt: skip
        for node in ast.walk(tree):
            found.words |= set(_words(node, told))
            match node:
                case ast.Assign(
                    targets=[ast.Name(id=name)], value=ast.Subscript(value=ast.Name(id=base))
                ) if base[0].isupper():  # a generic class of ours by a name of its own
                    found.members.setdefault(name, set())
                    found.bases.setdefault(name, set()).add(base)
                case _:
                    pass
            if isinstance(node, ast.ClassDef):
                selves = (n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and _on_self(n))
                found.members.setdefault(node.name, set()).update(_bound(node.body), selves)
                found.bases.setdefault(node.name, set()).update(
                    part for base in node.bases for part in re.findall(r"\w+", ast.unparse(base))
                )
    rest = (
        ROOT.glob("*.toml"),
        *((ROOT / room).rglob("*") for room in ("configs", "protos", "requirements")),
    )
    for path in (
        path for paths in rest for path in paths if path.suffix in (".toml", ".yaml", ".proto", ".txt")
    ):
        found.words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return found


def _on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that statements define, also under `if` and `try`."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
            case ast.Assign():
                yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If() | ast.Try():
                yield from _bound([*node.body, *node.orelse])
            case _:
                pass


def _words(node: ast.AST, told: set[str]) -> Iterator[str]:
    """Identifiers, and words of strings that are no docstrings."""
    for name in ("id", "attr", "name", "arg", "asname"):
        if isinstance(word := getattr(node, name, None), str):
            yield from word.split(".")
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip() not in told:
        yield from re.findall(r"\w+", node.value)


@cache
def headings(page: Path) -> set[str]:
    return set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", page.read_text(encoding="utf-8"), re.M))


@cache
def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def files() -> set[str]:
    """All files of ours, by path from the root."""
    every = [*ROOT.glob("*"), *(p for room in ROOMS for p in (ROOT / room.replace("\\", "")).rglob("*"))]
    return {p.relative_to(ROOT).as_posix() for p in every if "__pycache__" not in p.parts}


def paths_missing(text: str) -> Iterator[str]:
    for path, test in dict.fromkeys(PATH.findall(text)):
        path = re.sub(r"\b[A-Z]{4,}\b", "*", path)  # NAME stands for any one
        room, _, rest = path.partition("/")
        if room in IMPORTS and not (ROOT / room).exists():
            path = f"{IMPORTS[room]}/{room}/{rest}"
        if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()):
            yield path
        elif test and not re.search(rf"^ *def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.M):
            yield f"{path}::{test}"
    for name in dict.fromkeys(BARE_FILE.findall(PATH.sub("", text))):
        if not any(f"/{path}".endswith(f"/{name}") for path in files()):
            yield name


def sections_missing(text: str, page: Path | None) -> Iterator[str]:
    for name, *numbers in SECTION.findall(text):
        place = next((p for p in (ROOT / name, ROOT / "docs" / name) if p.is_file()), None)
        for number in filter(None, numbers):
            if place is None or number not in headings(place):
                yield f"{name}, section {number}"
    if page is not None and headings(page):
        for numbers in OWN_SECTION.findall(SECTION.sub("", text)):
            yield from (f"section {n}" for n in filter(None, numbers) if n not in headings(page))


def links_missing(text: str, page: Path) -> Iterator[str]:
    for target in LINK.findall(text):
        name, _, anchor = target.partition("#")
        if "://" in name or name.startswith("mailto:"):
            continue
        place = (page.parent / name).resolve() if name else page
        there = place.is_relative_to(ROOT) and place.exists()
        if not there or (anchor and anchor not in anchors(place)):
            yield target


def names_missing(text: str, single: bool = True) -> Iterator[str]:
    """Dotted names, and single ones in backticks unless they are left out."""
    for name in MODULE.findall(text):
        if not DATA.search(name) and not name.startswith("mpcache.v1") and not names().has(name.split(".")):
            yield name
    for ticked in TICKED.findall(text):
        word = re.sub(r"\(.*\)$", "", ticked)
        if DOTTED.match(word) and not DATA.search(word):
            if not word.startswith("mpcache.v1") and not names().has(word.split(".")):
                yield word
        elif single and NAME.match(word) and not {word, _METRIC.sub("", word)} & names().words:
            yield word


def of_page(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    outside_blocks = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found = [*paths_missing(text), *sections_missing(text, page), *links_missing(text, page)]
    found += names_missing(outside_blocks, single=page.name not in HISTORY)
    return found + ELSEWHERE.findall(LINK.sub("", text))


def of_source(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (token.string for token in tokens if token.type == tokenize.COMMENT)
    told = "\n\n".join([*docstrings(ast.parse(source)), *comments])
    found = [*paths_missing(told), *sections_missing(told, None), *names_missing(told)]
    return found + ELSEWHERE.findall(told)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
