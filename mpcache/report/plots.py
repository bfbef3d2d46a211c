"""What all plots have in common: a file of SVG, PDF or PNG, by matplotlib, the same for the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpcache.errors import BadInput

SUFFIXES = (".svg", ".pdf", ".png")
DOTS_PER_INCH = 200  # of a PNG file


def check_plot(file: Path) -> None:
    """Check before anything is computed that a plot can be drawn. Raises BadInput."""
    if find_spec("matplotlib") is None:
        raise BadInput("--plot needs matplotlib, which is not installed: pip install 'mpcache[plot]'")
    if file.suffix not in SUFFIXES:
        raise BadInput(f"--plot {file}: give a name that ends in {', '.join(SUFFIXES)}")
    if file.is_dir() or not file.parent.is_dir():
        raise BadInput(f"--plot {file}: there is no folder {file.parent} to put a file of this name in")


@contextmanager
def figure_of(file: Path, lines: int, columns: int) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its panels (lines, columns), and write it in the end. Raises BadInput."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "mpcache"  # the same rows give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    size = (4.2 * columns, 3.3 * lines + 0.8)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
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
    wide = policy.startswith(("mpcache", "compact"))
    return {
        "linewidth": 2.0 if wide else 1.1, "color": f"C{i % 10}", "marker": "os^vD<>Ph*"[(i + i // 10) % 10],
        "markersize": 4, "linestyle": "-" if i < 10 else "--",
    }  # fmt: skip


def legend_below(figure: Any, handles: dict[str, Any], columns: int = 4) -> None:
    """Put one legend under all panels."""
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8,
            frameon=False,
        )  # fmt: skip
