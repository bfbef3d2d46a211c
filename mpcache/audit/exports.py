"""The audit for papers and programs: CSV whose rows explain themselves, tables in Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpcache.audit.cost_tables import PARTS, CostTable
from mpcache.audit.priced_rows import AuditRow
from mpcache.console import terminal
from mpcache.errors import BadInput

FORMATS = ("table", "markdown", "latex", "csv")


def csv_lines(result: Mapping[str, Any], by: str | None) -> list[AuditRow]:
    """Flatten an audit's rows, each with its model, lengths, version and date: what it was priced for."""
    about = {
        "model": result["shape"],
        "question_tokens": result["question_tokens"],
        "new_tokens": result["new_tokens"],
        "version": result["version"],
        "date": result["date"],
    }
    lines = []
    for row in result["rows"]:
        flat = about | {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        lines += [flat | part for part in row[PARTS[by]]] if by else [flat]
    return lines


def print_tables(
    tables: Sequence[CostTable], rows: Sequence[Mapping[str, Any]], form: str, explained: str
) -> None:
    """Print tables on stdout in one of FORMATS; CSV is of the rows. explained: said below, to people."""
    if form == "csv":
        print(as_csv([flattened(row) for row in rows]), end="")
    elif form in ("markdown", "latex"):
        print(in_form(tables, form))
    else:
        out = terminal.stdout()
        for table in tables:
            terminal.print_table(out, table.for_people())
        if explained:
            out.print(explained, style="dim")


def flattened(row: Mapping[str, Any], before: str = "") -> AuditRow:
    """Name what is within a row's parts by part and name, joined. Lists are left out."""
    found: AuditRow = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{before}{name}_")
        elif not isinstance(value, list):
            found[before + name] = value
    return found


def as_csv(lines: Sequence[AuditRow]) -> str:
    """Write lines as CSV, with a line of names."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_csv(path: Path, lines: Sequence[AuditRow]) -> None:
    """Write lines as a file. Raises BadInput where it cannot be written."""
    try:
        path.write_text(as_csv(lines), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror or error}") from None


def in_form(tables: Sequence[CostTable], form: str) -> str:
    """Write tables as `markdown` or `latex`."""
    return "\n".join((markdown if form == "markdown" else latex)(tables))


def markdown(tables: Sequence[CostTable]) -> Iterator[str]:
    """Write tables as Markdown: the first column is text, what follows numbers, and `leaks` text again."""
    for table in tables:
        yield f"**{_with(_MARKDOWN, table.title)}**"
        yield ""
        yield _row("|", map(_in(_MARKDOWN), table.names))
        yield "|" + "|".join("---:" if right else "---" for right in table.numeric) + "|"
        for cells in table.lines:
            yield _row("|", map(_in(_MARKDOWN), cells))
        yield ""


def latex(tables: Sequence[CostTable]) -> Iterator[str]:
    """Write tables as LaTeX, for the package booktabs."""
    for table in tables:
        columns = "".join("r" if right else "l" for right in table.numeric)
        yield f"% {table.title}"
        yield rf"\begin{{tabular}}{{{columns}}}"
        yield r"\toprule"
        yield " & ".join(map(_in(_LATEX), table.names)) + r" \\"
        yield r"\midrule"
        for cells in table.lines:
            yield " & ".join(map(_in(_LATEX), cells)) + r" \\"
        yield r"\bottomrule"
        yield r"\end{tabular}"
        yield ""


_MARKDOWN = {"|": r"\|", "*": r"\*", "_": r"\_", "<": "&lt;"}
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}",
}  # fmt: skip


def _in(signs: Mapping[str, str]) -> Callable[[str], str]:
    return lambda text: _with(signs, text)


def _with(signs: Mapping[str, str], text: str) -> str:
    """Put what a language reads as a command in its own words."""
    return re.sub("|".join(map(re.escape, signs)), lambda found: signs[found[0]], text)


def _row(bar: str, cells: Iterator[str]) -> str:
    return f"{bar} " + f" {bar} ".join(cells) + f" {bar}"
