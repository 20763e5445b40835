"""Panels of lines, in the look of the book's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradinv_helpers.plots import FLOOR_COLOUR, PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]

_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
}
_DASHES = ("-", "--", ":")


def _fitting(names: Sequence[str], width: float) -> int:
    """How many entries of a legend stand side by side in a width in inches."""
    return max(1, int(width / (0.075 * max(map(len, names)) + 0.6)))


def panels(
    charts: Mapping[str, Lines],
    *,
    xlabel: str,
    ylabels: Sequence[str],
    columns: int,
    logarithmic: str = "x",
    base: int = 2,
    floor: str = "",
) -> Figure:
    """Draw charts side by side; lines of one name look the same in all of them.

    Args:
        charts: Title -> name of a line -> its x and y.
        xlabel: What is on the horizontal axis of all charts.
        ylabels: What is on the vertical axis: one text per chart, or one for all.
        columns: Charts in one row.
        logarithmic: ``x``, or ``xy`` for both axes.
        base: Whose powers are marked on a logarithmic axis.
        floor: Name of the line that shows what a guess reaches.

    Returns:
        The figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for lines in charts.values() for name in lines))
    others = [name for name in names if name != floor]
    looks: dict[str, Any] = {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": _DASHES[i // len(PALETTE) % len(_DASHES)],
            "marker": "o",
        }
        for i, name in enumerate(others)
    }
    looks[floor] = {"color": FLOOR_COLOUR, "linestyle": "--"}
    rows = math.ceil(len(charts) / columns)
    shared = len(ylabels) == 1
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        size = (3.0 * columns + 0.6, 2.3 * rows + 0.9)
        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        grid = figure.subplots(
            rows, columns, squeeze=False, sharex=True, sharey=shared
        ).flatten()
        for axes in grid[len(charts) :]:
            axes.set_visible(False)
        for i, (axes, (title, lines)) in enumerate(
            zip(grid, charts.items(), strict=False)
        ):
            axes.set_xscale("log", base=base)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if "y" in logarithmic:
                axes.set_yscale("log", base=base)
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            for name, (x, y) in lines.items():
                axes.plot(x, y, label=name, **looks[name])
            axes.set_title(title)
            if not shared or i % columns == 0:
                axes.set_ylabel(ylabels[0 if shared else i])
            if i >= len(charts) - columns:
                axes.set_xlabel(xlabel)
                axes.tick_params(labelbottom=True)
        found = {
            label: handle
            for axes in grid[: len(charts)]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            [found[name] for name in names],
            names,
            loc="outside upper center",
            ncols=min(len(names), 2 * columns, _fitting(names, size[0])),
        )
    return figure
