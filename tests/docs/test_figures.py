"""tools/figures.py finds a figure that is not what the tools say, and a block or line that is gone."""

from __future__ import annotations

import pytest

from tools.figures import Line, cells, updated

PAGE = """Text.

<!-- figures: layer -->
| full | 22 | 0.226 MB |
| another system | 474 | 6.6 MB |
<!-- figures end -->
"""


def layer() -> list[Line]:
    return [cells("full", 22, "0.226 MB")]


def test_a_page_with_todays_figures_stays_as_it_is() -> None:
    assert updated(PAGE, {"layer": lambda: iter(layer())}) == PAGE


def test_a_stale_figure_is_put_right_and_what_is_not_computed_stays() -> None:
    stale = PAGE.replace("22", "23").replace("0.226", "0.3")
    assert updated(stale, {"layer": lambda: iter(layer())}) == PAGE


def test_a_line_or_a_block_that_is_gone_is_missed() -> None:
    with pytest.raises(ValueError, match="0 lines"):
        updated(PAGE.replace("full", "all"), {"layer": lambda: iter(layer())})
    with pytest.raises(ValueError, match="blocks"):
        updated("Text.", {"layer": lambda: iter(layer())})
