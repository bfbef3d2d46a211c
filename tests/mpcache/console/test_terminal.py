"""Tables on narrow terminals."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from mpcache.audit.cost_tables import cost_tables
from mpcache.audit.priced_rows import AuditGrid, price_rows
from mpcache.console.terminal import print_table
from mpcache.model import demo_model_dir, load_shape
from mpcache.transport.network import NO_NETWORK, parse_network


@pytest.mark.parametrize("width", [40, 80, 300])
def test_a_narrow_terminal_hides_no_column(width: int) -> None:
    """The last column of the audit, what a policy leaks, was the first to go at 80."""
    networks = [parse_network(text) or NO_NETWORK for text in ("lan", "wan")]
    grid = AuditGrid(load_shape(demo_model_dir()), [64], ["full"], networks, ["fast"], 4, 2)
    (table,) = cost_tables(price_rows(grid, None))
    out = StringIO()
    console = Console(file=out, width=width)
    print_table(console, table.for_people())
    shown = out.getvalue()
    for word in ("policy", "kept/used", "rounds", "online", "offline", "lan", "wan", "leaks", "none"):
        assert word in shown, shown
    assert "\u2026" not in shown
    assert console.width == width


def test_a_table_that_fits_keeps_its_width() -> None:
    table, out = Table("a", "b", expand=True), StringIO()
    table.add_row("words that can be folded", "x")
    print_table(Console(file=out, width=30), table)
    assert {len(line) for line in out.getvalue().splitlines()} == {30}
