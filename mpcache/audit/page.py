"""The audit as one HTML page that needs nothing else: its data inside, drawn by a small script."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpcache.errors import BadInput
from mpcache.report.units import BYTES, DURATIONS

TEMPLATE = Path(__file__).with_name("page.html")


def page(result: Mapping[str, Any], by: str | None) -> str:
    """Make the page of what `mpcache audit --json` prints.

    by: what its rows are broken down by, `layer` or `op`; None: they are not.
    """
    data = json.dumps({**result, "by": by}, allow_nan=False)
    # A script element ends at the first "</", whatever the JSON's own quotes say.
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    units = json.dumps({"bytes": BYTES, "durations": DURATIONS})
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{units}}", units)
    return text.replace("{{title}}", html.escape(str(result["shape"]))).replace("{{data}}", data)


def write_page(path: Path, result: Mapping[str, Any], by: str | None) -> None:
    """Write the page of a result. Raises BadInput where the file cannot be written."""
    try:
        path.write_text(page(result, by), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror or error}") from None
