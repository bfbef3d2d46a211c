"""What `mpcache eval` measured of a model, read back: how good its answers are in each setting."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcache.errors import BadInput
from mpcache.policy import parse_policy
from mpcache.policy.plan import FULL_PERCENT

FILE = "mpcache-quality.json"  # beside a model
NAME_CHARACTERS = 80  # of a model's name
FULL, TOGETHER = "full", "all"  # the policy that evicts nothing; a chat's tasks together

QualityRow = dict[str, Any]
Setting = tuple[str, float]  # a policy as text, and its budget in percent of the context


@dataclass(frozen=True)
class Quality:
    """Rows with `policy` and `accuracy` (0 to 1), and what they are of.

    model, digest: its name and its sha256; empty where the file has none.  by_question: whether only those
    questions count that the full cache answers.  context: tokens of a document, 0 where the file says none.
    """

    rows: Sequence[QualityRow]
    model: str = ""
    digest: str = ""
    by_question: bool = False
    context: int = 0

    def kept(self) -> dict[Setting, dict[str, float]]:
        """Return by setting and task what share of the full cache's answers is right.

        Tasks whose answers are right or wrong as a whole, asked of the plain engine after the document; tasks
        that the model cannot do are left out.
        """
        rows = [row for row in self.rows if _counts(row)]
        after = [row for row in rows if row.get("question", "after") == "after"]
        full = {row.get("task", ""): row["accuracy"] for row in after if row["policy"] == FULL}
        found: defaultdict[Setting, dict[str, float]] = defaultdict(dict)
        for row in after:
            task = row.get("task", "")
            whole = 1.0 if self.by_question else full.get(task, 0.0)
            if whole and row["policy"] != FULL:
                share = min(1.0, row["accuracy"] / whole)
                found[row["policy"], row.get("budget_percent", FULL_PERCENT)][task] = share
        return dict(found)

    def asked(self, setting: Setting) -> int:
        """Return how many answers a setting was measured by, after the document."""
        policy, percent = setting
        return sum(
            int(row.get("n", 0))
            for row in self.rows
            if row["policy"] == policy and row.get("budget_percent", FULL_PERCENT) == percent
            and _counts(row) and row.get("question", "after") == "after"
        )  # fmt: skip


def _counts(row: QualityRow) -> bool:
    plain = row.get("engine", "plain") == "plain" and row.get("judged", True)
    return bool(plain and row.get("task") != TOGETHER and "bits_per_byte" not in row)


def read_quality(path: Path) -> Quality:
    """Read a file that `mpcache eval --json` or `--out` wrote, or a list of its rows.

    Raises BadInput, or PolicyError where a row names a policy that is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON"
        raise BadInput(f"{path}: cannot be read: {why}") from None
    about: Mapping[str, Any] = data if isinstance(data, dict) else {}
    listed = about.get("rows") if isinstance(data, dict) else data
    rows = listed if isinstance(listed, list) else []
    if not rows or not all(map(_is_quality, rows)):
        raise BadInput(
            f"{path}: holds no rows with policy, accuracy (0 to 1) and budget_percent, as "
            "`mpcache eval --json` prints them"
        )
    for row in rows:
        parse_policy(row["policy"])
    model, digest, context = (about.get(name) for name in ("model", "model_digest", "context_tokens"))
    return Quality(
        rows,
        model[:NAME_CHARACTERS] if isinstance(model, str) else "",
        digest if isinstance(digest, str) else "",
        about.get("gate") == "question",
        context if type(context) is int and context > 0 else 0,
    )


def _is_quality(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("policy"), str):
        return False
    budget, ends = row.get("budget_percent", FULL_PERCENT), row.get("ci95", [0, 1])
    return (
        _between(row.get("accuracy"), 1)
        and _between(budget, FULL_PERCENT)
        and isinstance(ends, list)
        and len(ends) == 2
        and all(_between(end, 1) for end in ends)
        and isinstance(row.get("task", ""), str)
        and type(row.get("n", 0)) is int
    )


def _between(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def quality_of(path: Path, digest: str) -> Quality | None:
    """Find what was measured of the model at `path`: beside it, else in the user's folder.

    None: nothing was, of this very model.  Raises BadInput.
    """
    for file in quality_places(path, digest):
        if file.is_file():
            quality = read_quality(file)
            if quality.digest == digest:
                return quality
    return None


def quality_places(path: Path, digest: str) -> list[Path]:
    """List where a model's quality may be: in its folder or beside its file, and apart."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    beside = path.with_name(f"{path.name}.{FILE}") if path.is_file() else path / FILE
    return [beside, data / "mpcache" / "quality" / f"{digest}.json"]
