"""Figures of the book: images, losses and results over seeds.

Every function returns a matplotlib ``Figure`` with a white background, colours that
colour-blind readers can tell apart (Okabe and Ito), and letters of 9 points or more.
The figures do not depend on, and do not change, matplotlib's global settings; pyplot
does not know them, so a notebook shows each of them once.
"""

from __future__ import annotations

import functools
import io
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradinv_helpers import metrics
from gradinv_helpers.errors import InputError, check_count, check_number
from gradinv_helpers.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradinv_helpers.attacks.invert import Reconstruction
    from gradinv_helpers.data import Images
    from gradinv_helpers.metrics import LeakageScore

Curve = tuple[Sequence[float], Sequence[float]]

# Okabe and Ito (2008), in an order where neighbours differ most; the first is blue.
PALETTE: tuple[str, ...] = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
FLOOR_COLOUR = "#666666"
PNG_BUDGET = 30_000  # bytes that one frame of an explorer should not pass
MAX_COLUMNS = 10  # images side by side before pairs() starts a new band

_FONT = 10.0  # points
_SMALL = 9.0  # points, the smallest letters anywhere
_GRID_WIDTH = 6.4  # inches for the images of a row: a book page without scaling
_STYLE: Any = {
    "font.size": _FONT,
    "axes.titlesize": _FONT,
    "axes.labelsize": _FONT,
    "xtick.labelsize": _SMALL,
    "ytick.labelsize": _SMALL,
    "legend.fontsize": _SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


# --- images -------------------------------------------------------------------------


def image_grid(
    rows: Mapping[str, Tensor | Images | Reconstruction],
    *,
    column_titles: Sequence[str] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Show named rows of images.

    Pixels are drawn as squares (nearest neighbour), so nothing looks smoother than it
    is. Values outside [0, 1] are clipped for the display.

    Args:
        rows: Row name -> images (N, C, H, W) with one or three channels; a row may be
            shorter than the others.
        column_titles: One title per column.
        captions: Row name -> one short text under each image.

    Returns:
        The figure.

    Raises:
        InputError: No rows, a wrong shape, an unknown row in ``captions``, or a count
            of titles or captions that does not fit.

    Taught in: notebooks/02_dlg_four_steps
    """
    if not rows:
        raise InputError("rows", "at least one row of images", "none")
    for name in captions or {}:
        if name not in rows:
            raise InputError("captions", f"row names out of {list(rows)}", repr(name))
    bands = [
        (name, _pixels(value, f"rows[{name!r}]"), list((captions or {}).get(name, ())))
        for name, value in rows.items()
    ]
    return _grid(bands, column_titles)


def pairs(
    truth: Images | Tensor,
    reconstruction: Reconstruction | Images | Tensor,
    score: LeakageScore | None = None,
) -> Figure:
    """Show every true image with its reconstruction and the PSNR in dB.

    One image stands beside its reconstruction; several stand above theirs.

    Args:
        truth: True images (N, C, H, W).
        reconstruction: What an attack returned, in any order.
        score: The score of this reconstruction; its assignment and its PSNR are used.
            Without it they are computed here in the same way.

    Returns:
        The figure.

    Raises:
        InputError: The counts or shapes differ.

    Taught in: notebooks/02_dlg_four_steps
    """
    target = _pixels(truth, "truth")
    found = _pixels(reconstruction, "reconstruction")
    if score is None:
        order = metrics.assign(found, target)
        decibels = metrics.peak_signal_noise_ratio(found[order], target).tolist()
    else:
        if len(score.assignment) != len(found):
            expected = f"the score of {len(found)} images"
            raise InputError("score", expected, f"one of {len(score.assignment)}")
        order = torch.tensor(score.assignment)
        decibels = list(score.psnr)
    found = found[order]
    notes = [decibel_text(value) for value in decibels]
    if len(target) == 1:
        both = torch.cat([target, found])
        return _grid([("", both, ["", notes[0]])], ["truth", "reconstruction"])
    bands: list[tuple[str, Tensor, list[str]]] = []
    for start in range(0, len(target), MAX_COLUMNS):
        part = slice(start, start + MAX_COLUMNS)
        bands.append(("truth", target[part], []))
        bands.append(("reconstruction", found[part], notes[part]))
    return _grid(bands, None)


def snapshots(
    reconstruction: Reconstruction,
    truth: Images | Tensor | None = None,
    *,
    max_columns: int = 8,
    max_images: int = 4,
) -> Figure:
    """Show how the reconstruction changes over the iterations.

    Args:
        reconstruction: What an attack returned, with its snapshots.
        truth: True images, shown in the last column.
        max_columns: Most snapshots to show; the first and the last always are.
        max_images: Most images (rows) to show.

    Returns:
        The figure: one row per image, one column per snapshot.

    Raises:
        InputError: There are no snapshots, a count is too small, or ``truth`` has
            another shape.

    Taught in: notebooks/02_dlg_four_steps
    """
    check_count("max_columns", max_columns, minimum=2)
    check_count("max_images", max_images)
    frames = reconstruction.snapshots
    if frames is None or frames.ndim != 5 or not len(frames):
        got = None if frames is None else tuple(frames.shape)
        raise InputError("reconstruction", "snapshots of shape (S, N, C, H, W)", got)
    picked = _spread(len(frames), max_columns)
    titles = [str(reconstruction.snapshot_iterations[i]) for i in picked]
    order = torch.arange(frames.shape[1])
    target = None if truth is None else _pixels(truth, "truth")
    if target is not None:
        order = metrics.assign(reconstruction.images, target)
        titles.append("truth")
    bands: list[tuple[str, Tensor, list[str]]] = []
    for row, index in enumerate(order[:max_images].tolist()):
        images = frames[picked, index].cpu()
        if target is not None:
            images = torch.cat([images, target[row : row + 1].to(images)])
        name = f"image {row + 1}" if frames.shape[1] > 1 else ""
        bands.append((name, images, []))
    return _grid(bands, titles, corner="iteration")


def decibel_text(value: float) -> str:
    """Write a PSNR for a caption: ``31.4 dB``, or ``exact`` at the cap of 200 dB."""
    return "exact" if value >= 199.95 else f"{value:.1f} dB"


def _grid(
    bands: Sequence[tuple[str, Tensor, list[str]]],
    titles: Sequence[str] | None,
    corner: str = "",
) -> Figure:
    """Draw rows of images at places given in inches."""
    columns = max(len(images) for _, images, _ in bands)
    for name, images, notes in bands:
        if notes and len(notes) != len(images):
            raise InputError(
                "captions",
                f"{len(images)} texts for row {name!r}",
                len(notes),
            )
    if titles is not None and len(titles) != columns:
        raise InputError("column_titles", f"{columns} titles", len(titles))
    texts = [*(titles or []), *(note for _, _, notes in bands for note in notes)]
    longest = max((_text_width(text, _SMALL) for text in texts), default=0.0)
    gap, note_height, title_height = 0.07, 0.19, 0.24
    cell = max(min(1.2, _GRID_WIDTH / columns - gap), longest - gap, 0.3)  # inches
    left = 0.06 + _longest_line([corner, *(name for name, _, _ in bands)])
    heights = []  # of each row, image and caption together
    for _, images, notes in bands:
        ratio = min(images.shape[-2] / images.shape[-1], 3.0)
        lines = 1 + max((note.count("\n") for note in notes), default=-1)
        heights.append((cell * ratio, lines * note_height))
    top = 0.07 + (title_height if titles else 0.0)
    width = left + columns * (cell + gap) + 0.04
    height = top + sum(h + n + gap for h, n in heights)
    with _style():
        figure = _new_figure(width, height)
        y = height - top
        edge = (left - 0.08) / width
        line = (y + 4 / 72) / height  # of the column titles
        figure.text(edge, line, corner, ha="right", fontsize=_SMALL)
        for column, title in enumerate(titles or ()):
            center = (left + column * (cell + gap) + cell / 2) / width
            figure.text(center, line, title, ha="center", fontsize=_SMALL)
        for (name, images, notes), (tall, below) in zip(bands, heights, strict=True):
            y -= tall
            middle = (y + tall / 2) / height
            figure.text(edge, middle, name, ha="right", va="center")
            for column, image in enumerate(images):
                x = left + column * (cell + gap)
                box = (x / width, y / height, cell / width, tall / height)
                axes = _image_axes(figure, box, image)
                if notes:
                    axes.set_xlabel(notes[column], fontsize=_SMALL, labelpad=2)
            y -= below + gap
    return figure


def _image_axes(
    figure: Figure, box: tuple[float, float, float, float], image: Tensor
) -> Axes:
    axes = figure.add_axes(box)
    axes.imshow(_to_array(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set(color="#BBBBBB", linewidth=0.6)
    return axes


# --- curves and results -------------------------------------------------------------


def loss_curve(
    curves: Reconstruction | Mapping[str, Reconstruction | Curve],
    *,
    ylabel: str = "matching loss",
    xlabel: str = "iteration",
) -> Figure:
    """Draw losses over iterations on a logarithmic scale.

    Each curve is named at its right end. Values that are not positive and finite
    cannot stand on this scale and are left out.

    Args:
        curves: One reconstruction, or name -> reconstruction or ``(x, y)``.
        ylabel: What is on the vertical axis, with its unit if it has one.
        xlabel: What is on the horizontal axis.

    Returns:
        The figure.

    Raises:
        InputError: No curves, lengths of x and y that differ, or a curve without a
            positive finite value.

    Taught in: notebooks/02_dlg_four_steps
    """
    from matplotlib.ticker import LogFormatter

    named = curves if isinstance(curves, Mapping) else {"": curves}
    if not named:
        raise InputError("curves", "at least one curve", "none")
    lines = {name: _curve(name, value) for name, value in named.items()}
    room = max(_text_width(name) for name in lines)
    with _style():
        figure = _new_figure(5.6 + room, 3.2, constrained=True)
        axes = figure.add_subplot()
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: _power_text(value))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))
        ends: dict[str, tuple[float, float, str]] = {}
        colours = _colours(len(lines))
        for colour, (name, (x, y)) in zip(colours, lines.items(), strict=True):
            axes.plot(x, y, color=colour, marker="o" if len(x) < 2 else None)
            ends[name] = (x[-1], y[-1], colour)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(x=0.02)
        _name_ends(axes, {n: end for n, end in ends.items() if n})
    return figure


def strip(
    values_by_group: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    floor: float | Mapping[str, float] | None = None,
    floor_label: str = "floor",
    target: float | None = None,
    target_label: str = "target",
) -> Figure:
    """Draw one dot per seed for each group, with the median and the floor.

    Args:
        values_by_group: Group name -> one value per seed or image.
        ylabel: What the values are, with the unit.
        floor: What a guess reaches: one value for all, or one per group.
        floor_label: Name of the floor.
        target: A value to compare with, drawn as a dotted line.
        target_label: Name of the target.

    Returns:
        The figure.

    Raises:
        InputError: No groups, an empty group, a value that is not finite, or a floor
            that misses a group.

    Taught in: notebooks/02_dlg_four_steps
    """
    groups = _checked_groups(values_by_group)
    floors = _floor_per_group(floor, groups)
    with _style():
        width = max(4.0, 1.6 + len(groups) * max(0.9, _longest_line(groups) + 0.2))
        figure = _new_figure(width, 3.2, constrained=True)
        axes = figure.add_subplot()
        colour = PALETTE[0]
        for place, (name, values) in enumerate(groups.items()):
            x = place + _jitter(values)
            axes.scatter(x, values, s=26, color=colour, alpha=0.75, linewidths=0)
            middle = statistics.median(values)
            axes.plot([place - 0.3, place + 0.3], [middle] * 2, color="black", lw=2.2)
            if name in floors:
                axes.plot(
                    [place - 0.42, place + 0.42],
                    [floors[name]] * 2,
                    color=FLOOR_COLOUR,
                    linestyle="--",
                    lw=1.6,
                )
        if target is not None:
            axes.axhline(target, color=PALETTE[1], linestyle=":", lw=1.8)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_ylabel(ylabel)
        _strip_legend(axes, bool(floors), floor_label, target, target_label)
    return figure


def bars(
    values: Mapping[str, float],
    *,
    xlabel: str,
    floor: float | None = None,
    floor_label: str = "floor",
    spread: Mapping[str, float] | None = None,
    digits: int = 1,
) -> Figure:
    """Draw horizontal bars with their values written beside them.

    Args:
        values: Name -> value, drawn from top to bottom.
        xlabel: What the values are, with the unit.
        floor: What a guess reaches, drawn as a dashed line.
        floor_label: Name of the floor.
        spread: Name -> half width of an error bar, for example a standard deviation.
        digits: Digits after the point.

    Returns:
        The figure.

    Raises:
        InputError: No values, or a value that is not finite.

    Taught in: notebooks/02_dlg_four_steps
    """
    groups = _checked_groups({name: [value] for name, value in values.items()})
    names = list(groups)
    lengths = [group[0] for group in groups.values()]
    errors = [float((spread or {}).get(name, 0.0)) for name in names]
    with _style():
        height = 0.9 + 0.38 * len(names)
        figure = _new_figure(3.8 + _longest_line(names), height, constrained=True)
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.barh(names, lengths, color=PALETTE[0], height=0.62)
        if spread:
            axes.errorbar(
                lengths, names, xerr=errors, fmt="none", ecolor="black", capsize=3
            )
        for name, length, error in zip(names, lengths, errors, strict=True):
            side = 1 if length >= 0 else -1
            axes.annotate(
                f"{length:.{digits}f}",
                (length + side * error, name),
                xytext=(side * 4, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=_SMALL,
            )
        if floor is not None:
            axes.axvline(floor, color=FLOOR_COLOUR, linestyle="--", lw=1.6)
            axes.annotate(
                f"{floor_label} {floor:.{digits}f}",
                (floor, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=_SMALL,
                color=FLOOR_COLOUR,
            )
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.tick_params(axis="y", length=0, labelsize=_FONT)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(xlabel)
    return figure


# --- files --------------------------------------------------------------------------


def to_png(figure: Figure, *, dpi: float = 110.0, max_width: int = 760) -> bytes:
    """Render a figure as a small PNG and close it.

    The resolution falls until the picture is at most ``max_width`` wide. A picture of
    more than 30 kB is stored with a palette of 256 colours, then with fewer, without
    dithering, so that flat areas stay flat.

    Args:
        figure: The figure; frames of one size come from figures of one size.
        dpi: Dots per inch, at most.
        max_width: Largest width in pixels.

    Returns:
        The bytes of the PNG file.

    Raises:
        InputError: ``dpi`` or ``max_width`` is not positive.

    Taught in: notebooks/02_dlg_four_steps
    """
    from PIL import Image

    check_number("dpi", dpi, exclusive=True)
    check_count("max_width", max_width)
    fitting = min(dpi, max_width / figure.get_size_inches()[0])
    rendered = _rendered(figure, fitting)
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)  # else a notebook shows the figure once more
    picture = Image.open(io.BytesIO(rendered)).convert("RGB")
    result = _encoded(picture)
    for colours in (256, 128, 64):
        if len(result) <= PNG_BUDGET:
            break
        result = _encoded(
            picture.quantize(
                colours,
                method=Image.Quantize.MEDIANCUT,
                dither=Image.Dither.NONE,
            )
        )
    return result


def snapshot_gif(
    snapshots: Tensor,
    path: str | Path | None = None,
    *,
    truth: Images | Tensor | None = None,
    scale: int = 4,
    duration: int = 200,
) -> bytes:
    """Write the snapshots of a reconstruction as an animated GIF.

    Pixels are enlarged to squares. All frames share one palette, so colours do not
    flicker. The last frame stays five times as long.

    Args:
        snapshots: (S, N, C, H, W), values in [0, 1]; the N images stand side by side.
        path: Where to write the file; None writes nothing.
        truth: True images (N, C, H, W) in the same order, shown above the snapshots.
        scale: Screen pixels per image pixel.
        duration: Time per frame in milliseconds.

    Returns:
        The bytes of the GIF file.

    Raises:
        InputError: A wrong shape, or a count that is too small.

    Taught in: notebooks/02_dlg_four_steps
    """
    check_count("scale", scale)
    check_count("duration", duration)
    if snapshots.ndim != 5 or 0 in snapshots.shape:
        expected = "shape (S, N, C, H, W) with at least one frame"
        raise InputError("snapshots", expected, tuple(snapshots.shape))
    target = None if truth is None else _pixels(truth, "truth")
    if target is not None and target.shape != snapshots.shape[1:]:
        expected = f"shape {tuple(snapshots.shape[1:])}"
        raise InputError("truth", expected, tuple(target.shape))
    frames = [_contact_sheet(frame, target, scale) for frame in snapshots.cpu()]
    indexed = _indexed(frames)
    times = [duration] * (len(indexed) - 1) + [5 * duration]
    buffer = io.BytesIO()
    indexed[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=times if len(times) > 1 else times[0],
        loop=0,
    )
    if path is not None:
        write_bytes(path, buffer.getvalue())
    return buffer.getvalue()


def _indexed(frames: Sequence[np.ndarray]) -> list[Any]:
    """Give all frames (H, W, 3) one palette: the greys, or the 256 best colours."""
    from PIL import Image

    if all((frame == frame[..., :1]).all() for frame in frames):
        return [Image.fromarray(frame[..., 0]) for frame in frames]
    sample = Image.fromarray(np.concatenate(frames[:: _step(len(frames), 16)]))
    palette = sample.quantize(256, method=Image.Quantize.MEDIANCUT)
    return [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]


def _contact_sheet(images: Tensor, truth: Tensor | None, scale: int) -> np.ndarray:
    """Lay the images out in one line, the truth above: (H, W, 3) uint8."""
    lines = [images] if truth is None else [truth, images]
    gap = max(2, scale // 2)
    rows = []
    for line in lines:
        tiles = []
        for image in line:
            pixels = np.atleast_3d(_to_array(image))
            tile = np.round(pixels * 255).astype(np.uint8)
            tile = np.repeat(tile, 3 // tile.shape[2], axis=2)
            tile = tile.repeat(scale, axis=0).repeat(scale, axis=1)
            tiles.append(np.pad(tile, ((0, 0), (0, gap), (0, 0)), constant_values=255))
        row = np.concatenate(tiles, axis=1)[:, :-gap]
        rows.append(np.pad(row, ((0, gap), (0, 0), (0, 0)), constant_values=255))
    return np.concatenate(rows)[:-gap]


def _rendered(figure: Figure, dpi: float) -> bytes:
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def _encoded(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# --- helpers ------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    """Use our settings inside the block, whatever the reader's settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@functools.cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that shows itself in a notebook without pyplot."""

        def _repr_png_(self) -> bytes:
            return _rendered(self, 110.0)

    return NotebookFigure


def _new_figure(width: float, height: float, *, constrained: bool = False) -> Figure:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08) if constrained else None
    return _figure_class()(
        figsize=(width, height), dpi=100, facecolor="white", layout=engine
    )


def _pixels(value: object, argument: str) -> Tensor:
    """Return the images of a tensor, of ``Images`` or of a reconstruction."""
    found = value
    for name in ("pixels", "images"):
        if not isinstance(found, Tensor):
            found = getattr(value, name, None)
    if not isinstance(found, Tensor):
        raise InputError(argument, "images (N, C, H, W)", type(value).__name__)
    if found.ndim != 4 or 0 in found.shape:
        hint = "add a batch axis with images[None]" if found.ndim == 3 else ""
        raise InputError(argument, "shape (N, C, H, W)", tuple(found.shape), hint)
    if found.shape[1] not in (1, 3):
        raise InputError(argument, "one or three channels", found.shape[1])
    return found.detach().cpu().float()


def _to_array(image: Tensor) -> np.ndarray:
    """Turn (C, H, W) into (H, W) or (H, W, 3) for the screen, clipped to [0, 1]."""
    clipped = image.detach().cpu().float().clamp(0, 1)
    return (clipped[0] if len(clipped) == 1 else clipped.permute(1, 2, 0)).numpy()


@functools.cache
def _text_width(text: str, size: float = _FONT) -> float:
    """Measure the widest line of a text in inches, with a small margin."""
    from matplotlib.textpath import TextPath

    with _style():
        lines = [line for line in text.split("\n") if line.strip()]
        widths = [TextPath((0, 0), line, size=size).get_extents().x1 for line in lines]
    # 8 percent more: letters are moved to whole pixels when they are drawn.
    return 1.08 * max(widths) / 72 + 0.1 if widths else 0.0


def _longest_line(names: Sequence[str] | Mapping[str, object]) -> float:
    return max(_text_width(name) for name in names)


def _colours(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _step(count: int, most: int) -> int:
    return max(1, math.ceil(count / most))


def _spread(count: int, most: int) -> list[int]:
    """Pick at most ``most`` indices out of ``count``, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _curve(name: str, value: Reconstruction | Curve) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the points that can stand on a logarithmic scale."""
    if isinstance(value, tuple):
        x, y = (np.asarray(list(part), dtype=float) for part in value)
    else:
        x = np.asarray(value.iterations, dtype=float)
        y = np.asarray(value.losses, dtype=float)
    if x.shape != y.shape:
        raise InputError(f"curves[{name!r}]", f"{len(x)} y values", len(y))
    good = np.isfinite(x) & np.isfinite(y) & (y > 0)
    if not good.any():
        expected = "at least one positive finite value"
        raise InputError(f"curves[{name!r}]", expected, y.tolist()[:3])
    return x[good], y[good]


def _power_text(value: float) -> str:
    """Write a power of ten without small raised digits: ``0.01``, ``1e-5``."""
    if 0.001 < value < 10_000:
        return f"{value:g}"
    return f"1e{round(math.log10(value))}"


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write each name at the right edge, moved apart where ends come close."""
    if not ends:
        return
    low, high = axes.get_ylim()
    scale = math.log(high / low)
    places = {n: math.log(y / low) / scale for n, (_, y, _) in ends.items()}
    minimum = 0.075  # of the height of the axes: one line of text
    names = sorted(places, key=lambda name: places[name])
    heights: list[float] = []
    for name in names:
        lowest = heights[-1] + minimum if heights else 0.0
        heights.append(max(places[name], lowest))
    overflow = max(0.0, heights[-1] - 1.0)
    for i in reversed(range(len(heights))):  # push down what left at the top
        ceiling = heights[i + 1] - minimum if i + 1 < len(heights) else 1.0
        heights[i] = min(heights[i], ceiling) if overflow else heights[i]
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            name,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=ends[name][2],
        )


def _jitter(values: Sequence[float]) -> np.ndarray:
    """Spread equal-looking dots sideways, the same way in every run."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    golden = (ranks * 0.618034) % 1.0
    width = 0.36 if len(values) > 3 else 0.2
    return np.asarray((golden - golden.mean()) * width)


def _checked_groups(groups: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    if not groups:
        raise InputError("values", "at least one group", "none")
    checked = {name: [float(v) for v in values] for name, values in groups.items()}
    for name, values in checked.items():
        if not values:
            raise InputError(f"values[{name!r}]", "at least one value", "none")
        if not all(map(math.isfinite, values)):
            raise InputError(f"values[{name!r}]", "finite values", values)
    return checked


def _floor_per_group(
    floor: float | Mapping[str, float] | None, groups: Mapping[str, object]
) -> dict[str, float]:
    if floor is None:
        return {}
    if isinstance(floor, Mapping):
        missing = [name for name in groups if name not in floor]
        if missing:
            raise InputError("floor", f"a value for {missing[0]!r}", "none")
        return {name: float(floor[name]) for name in groups}
    return dict.fromkeys(groups, float(floor))


def _strip_legend(
    axes: Axes,
    has_floor: bool,
    floor_label: str,
    target: float | None,
    target_label: str,
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=PALETTE[0], marker="o", ls="", label="one run"),
        Line2D([], [], color="black", lw=2.2, label="median"),
    ]
    if has_floor:
        handles.append(
            Line2D([], [], color=FLOOR_COLOUR, ls="--", lw=1.6, label=floor_label)
        )
    if target is not None:
        handles.append(
            Line2D([], [], color=PALETTE[1], ls=":", lw=1.8, label=target_label)
        )
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles),
        handlelength=1.6,
        columnspacing=1.4,
    )
