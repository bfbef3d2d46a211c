"""What all plots have in common: a file of SVG, PDF or PNG, by matplotlib, the same for the same rows.

A panel is as wide as a column of a paper, in type of that size. Marker and dashes tell lines apart in grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpcache.errors import BadInput
from mpcache.report.units import Unit

SUFFIXES = (".svg", ".pdf", ".png")
DOTS_PER_INCH = 200  # of a PNG file
COLUMN, LINE = 3.4, 2.1  # inches: a panel's width, which is a paper's column, and its height
ENTRY, HANDLE, LETTER = 0.16, 0.5, 0.055  # inches: a line of the legend, its sign with blanks, a letter
TYPE = 7  # points
MARKERS, DASHES = "os^vD<>Ph*", ("-", "--", ":")
COUNTS = (Unit(""),)
# Multiples of a power of ten that stand on a log axis: finer ones where these are few.
FINER = ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))


def check_plot(file: Path) -> None:
    """Check before anything is computed that a plot can be drawn. Raises BadInput."""
    if find_spec("matplotlib") is None:
        raise BadInput("--plot needs matplotlib, which is not installed: pip install 'mpcache[plot]'")
    if file.suffix not in SUFFIXES:
        raise BadInput(f"--plot {file}: give a name that ends in {', '.join(SUFFIXES)}")
    if file.is_dir() or not file.parent.is_dir():
        raise BadInput(f"--plot {file}: there is no folder {file.parent} to put a file of this name in")


@contextmanager
def figure_of(file: Path, lines: int, columns: int, **shared: Any) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its panels (lines, columns), and write it in the end. Raises BadInput.

    shared: axes, as `pyplot.subplots` takes them.
    """
    import matplotlib

    matplotlib.use("agg")
    own: dict[Any, Any] = {
        "svg.hashsalt": "mpcache",  # the same rows give the same file
        "svg.fonttype": "none", "font.size": TYPE, "axes.titlesize": TYPE + 1, "figure.titlesize": TYPE + 1,
    }  # fmt: skip
    with matplotlib.rc_context(own):
        from matplotlib import pyplot

        size = (COLUMN * columns, LINE * lines + 0.4)
        figure, panels = pyplot.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained", **shared
        )
        try:
            yield figure, panels
            dated = {".svg": "Date", ".pdf": "CreationDate"}.get(file.suffix)
            figure.savefig(file, dpi=DOTS_PER_INCH, metadata={dated: None} if dated else None)
        except OSError as error:
            raise BadInput(f"{file}: cannot be written: {error.strerror or error}") from None
        finally:
            pyplot.close(figure)


def style_of(i: int, policy: str) -> dict[str, Any]:
    """Return how the i-th policy's line looks; ours are thicker."""
    wide, (again, marker) = policy.startswith(("mpcache", "compact")), divmod(i, len(MARKERS))
    return {
        "linewidth": 1.8 if wide else 0.9, "color": f"C{i % 10}",
        "marker": MARKERS[(marker + again) % len(MARKERS)], "markersize": 3.5,
        "linestyle": DASHES[again % len(DASHES)],
    }  # fmt: skip


def log_ticks(low: float, high: float, units: Sequence[Unit]) -> list[float]:
    """Return the round numbers of a log axis from low to high, round in the unit that each is written in."""
    found: list[float] = []
    for multiples in FINER:
        found, scale, first = [], 1.0, low
        for unit in units:
            end = (unit.most or math.inf) * scale
            power = scale
            while power <= high:
                found += [m * power for m in multiples if first <= m * power < end and m * power <= high]
                power *= 10
            first, scale = max(low, end), scale * unit.step
        if len(found) > 2:
            break
    return found


def log_axis(axis: Any, limits: tuple[float, float], units: Sequence[Unit], said: Any, most: int) -> None:
    """Put round ticks on a log axis, a `most`-th of it apart at least. said: writes a number."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    found = log_ticks(*limits, units)
    if len(found) < 3:  # a short axis
        every = MaxNLocator(4, steps=(1, 2, 5, 10)).tick_values(*limits)
        found = [tick for tick in every if limits[0] <= tick <= limits[1]]
    apart, ticks = (limits[1] / limits[0]) ** (1 / most), list[float]()
    for tick in found:
        if not ticks or tick >= apart * ticks[-1]:
            ticks.append(tick)
    axis.set_ticks(ticks)
    axis.set_major_formatter(lambda amount, _: said(amount))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Any, handles: dict[str, Any]) -> None:
    """Put one legend under all panels, which keep their size."""
    if not handles:
        return
    width, height = figure.get_size_inches()
    columns = legend_columns(list(handles), width)
    figure.set_figheight(height + ENTRY * -(-len(handles) // columns))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False
    )


def legend_columns(names: Sequence[str], width: float) -> int:
    """Return how many columns of names fit into so many inches; a column is as wide as its longest name."""
    for columns in range(len(names), 1, -1):
        lines = -(-len(names) // columns)
        longest = (max(map(len, names[i : i + lines])) for i in range(0, len(names), lines))
        if sum(HANDLE + LETTER * n for n in longest) <= width:
            return columns
    return 1
