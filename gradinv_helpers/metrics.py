"""Measure how much a reconstruction shows, next to what a guess would show.

Reconstructed images come back in any order. One one-to-one assignment decides which
reconstruction belongs to which true image, and every metric uses that assignment.
Each score carries its floors: the same metrics for images that no attack produced.
The metrics of single pairs live in ``image_metrics``, ``perceptual`` and
``identifiability`` and can be called alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError, check_choice, check_number
from gradinv_helpers.identifiability import (
    Gallery,
    Identification,
    build_gallery,
    identification,
)
from gradinv_helpers.image_metrics import ImagesLike as ImagesLike
from gradinv_helpers.image_metrics import assign as assign
from gradinv_helpers.image_metrics import (
    check_images,
    check_reconstruction,
    check_same_shape,
    check_unit_range,
    decibels,
)
from gradinv_helpers.image_metrics import class_accuracy as class_accuracy
from gradinv_helpers.image_metrics import feature_similarity as feature_similarity
from gradinv_helpers.image_metrics import mean_squared_error as mean_squared_error
from gradinv_helpers.image_metrics import (
    peak_signal_noise_ratio as peak_signal_noise_ratio,
)
from gradinv_helpers.image_metrics import registered_psnr as registered_psnr
from gradinv_helpers.image_metrics import structural_similarity as structural_similarity
from gradinv_helpers.intervals import bootstrap_interval, share_interval
from gradinv_helpers.perceptual import (
    PERCEPTUAL_NETS,
    PerceptualNet,
    fits_perceptual_net,
    perceptual_distance,
    perceptual_weights_available,
)

if TYPE_CHECKING:
    from gradinv_helpers.attacks.invert import Reconstruction
    from gradinv_helpers.classifier import Classifier
    from gradinv_helpers.data import Images

# An image counts as recovered from here on: its root mean square error is 8 of 255
# grey levels. As a flat colour, 0 % of the test images of digits, 2 % of photos and
# 7.5 % of faces get there.
RECOVERED_DB = 30.0
# Above the floor: a tenth of the squared error of the best guess, or less, is left.
ABOVE_FLOOR_DB = 10.0
# From this many images on a mean gets an interval. With 8 values, intervals of 95 %
# were measured to cover 97 % (two clusters), 89 % (normal) and 83 % (log-normal).
MIN_INTERVAL_IMAGES = 8
FLOOR_IMAGES = 32  # images behind the "random_image" floor, in 3 to 16 draws
SIGNIFICANT_DIGITS = 6  # digits kept by LeakageScore.to_dict

_LABELS = {
    "mse": "MSE",
    "psnr": "PSNR (dB)",
    "registered_psnr": "PSNR, shifted (dB)",
    "ssim": "SSIM",
    "perceptual_distance": "LPIPS",
    "recovered": "recovered",
    "identified": "identified",
    "label_accuracy": "labels right",
    "feature_similarity": "feature cosine",
    "class_accuracy": "class right",
}
_SHARES = {"recovered", "identified", "label_accuracy", "class_accuracy"}
_LOWER_IS_BETTER = {"mse", "perceptual_distance"}


# --- the score ----------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _PerImage:
    """Metrics per true image, in the order of the true images.

    Attributes:
        mse: Mean squared errors.
        psnr: Peak signal-to-noise ratios in dB, at most 200.
        registered_psnr: The same after the best small shift of each pair.
        ssim: Structural similarities; None for images with a side below 7.
        perceptual_distance: LPIPS; None where it was not asked for or cannot be had.
        identified: Whether the true image is the nearest one in the data set; None
            without a data set.
        label_correct: Whether the label that came with the image is the true one; a
            share between 0 and 1 in a floor that averages draws; None in a floor
            that has no labels.
        feature_similarity: Cosines of the judge's features; None without a judge.
        class_correct: Whether the judge sees the true class in the image (a share in
            a floor that averages draws); None without a judge.
    """

    mse: tuple[float, ...]
    psnr: tuple[float, ...]
    registered_psnr: tuple[float, ...]
    ssim: tuple[float, ...] | None
    perceptual_distance: tuple[float, ...] | None
    identified: tuple[float, ...] | None
    label_correct: tuple[float, ...] | None
    feature_similarity: tuple[float, ...] | None
    class_correct: tuple[float, ...] | None

    def __len__(self) -> int:
        return len(self.mse)

    def _columns(self, threshold_db: float) -> dict[str, tuple[float, ...]]:
        columns = {
            "mse": self.mse,
            "psnr": self.psnr,
            "registered_psnr": self.registered_psnr,
            "ssim": self.ssim,
            "perceptual_distance": self.perceptual_distance,
            "recovered": self._recovered(threshold_db),
            "identified": self.identified,
            "label_accuracy": self.label_correct,
            "feature_similarity": self.feature_similarity,
            "class_accuracy": self.class_correct,
        }
        return {name: values for name, values in columns.items() if values is not None}

    def means(self, *, threshold_db: float = RECOVERED_DB) -> dict[str, float]:
        """Return the mean over images of every metric that is present."""
        columns = self._columns(check_number("threshold_db", threshold_db))
        return {name: statistics.fmean(values) for name, values in columns.items()}

    def recovered(self, *, threshold_db: float = RECOVERED_DB) -> float:
        """Return the share of images that reach a PSNR.

        Args:
            threshold_db: Least PSNR of a recovered image in dB.

        Returns:
            A share in [0, 1]; in a floor the mean share over its draws.

        Raises:
            InputError: The threshold is not a finite number of at least 0.
        """
        return self.means(threshold_db=threshold_db)["recovered"]

    def _recovered(self, threshold_db: float) -> tuple[float, ...]:
        """Tell for each image whether, or how often, its PSNR reaches a threshold."""
        draws = zip(*self._psnr_draws(), strict=True)
        return tuple(statistics.fmean(v >= threshold_db for v in d) for d in draws)

    def _psnr_draws(self) -> tuple[tuple[float, ...], ...]:
        return (self.psnr,)

    @property
    def label_accuracy(self) -> float | None:
        """Share of images with the true label; None where there are no labels."""
        return None if self.label_correct is None else self.means()["label_accuracy"]

    @property
    def class_accuracy(self) -> float | None:
        """Share of images whose class the judge sees; None without a judge."""
        return None if self.class_correct is None else self.means()["class_accuracy"]

    def _per_image(self) -> dict[str, list[float] | None]:
        values = {name: getattr(self, name) for name in _PerImage.__dataclass_fields__}
        return {name: None if v is None else list(v) for name, v in values.items()}


@dataclass(frozen=True, repr=False)
class Floor(_PerImage):
    """The metrics of images that a guess, not an attack, would show.

    Attributes:
        mse, psnr, registered_psnr, ssim, perceptual_distance, identified,
            label_correct, feature_similarity, class_correct: As in ``LeakageScore``,
            averaged over the draws of the floor.
        psnr_draws: PSNR of each image in each draw, in dB.

    Taught in: notebooks/02_dlg_four_steps
    """

    psnr_draws: tuple[tuple[float, ...], ...]

    def _psnr_draws(self) -> tuple[tuple[float, ...], ...]:
        return self.psnr_draws

    def __repr__(self) -> str:
        numbers = ", ".join(f"{k}={_short(k, v)}" for k, v in self.means().items())
        return f"Floor({numbers})"


@dataclass(frozen=True, repr=False)
class LeakageScore(_PerImage):
    """What one reconstruction shows of the truth, and what a guess would show.

    Attributes:
        mse: Mean squared error of each true image.
        psnr: Peak signal-to-noise ratio of each true image in dB, at most 200.
        registered_psnr: The same after the best small shift of each pair.
        ssim: Structural similarities; None for images with a side below 7.
        perceptual_distance: LPIPS; None where it was not asked for, its weights are
            not there, or the images do not fit its network.
        identified: Whether the true image is nearer to its reconstruction than every
            other image of the data set; None without ``others``.
        label_correct: Whether the reconstructed label is the true one.
        feature_similarity: Cosines of the judge's features; None without a judge.
        class_correct: Whether the judge sees the true class in the reconstruction;
            None without a judge.
        assignment: Index of the reconstruction that belongs to each true image.
        floors: Baselines by name. ``constant``: each true image replaced by its own
            mean colour, no constant image has a lower MSE. ``random_image``: other
            images of the data set. ``batch_mean``: the mean true image shown for
            every one (more than one image only).
        identification: The ranks behind ``identified``, with their chance level; None
            without ``others``.

    Taught in: notebooks/02_dlg_four_steps
    """

    assignment: tuple[int, ...]
    floors: Mapping[str, Floor]
    identification: Identification | None

    def recovered_above_floor(self, *, margin_db: float = ABOVE_FLOOR_DB) -> float:
        """Return the share of images that beat the best guess by a margin.

        A flat image reaches a high PSNR without any attack. Here each image is
        compared with the best floor of the same image: 10 dB above it, the squared
        error is a tenth of that of the best guess.

        Args:
            margin_db: Least distance from the best floor in dB.

        Returns:
            A share in [0, 1].

        Raises:
            InputError: The margin is not a finite number of at least 0.
        """
        margin = check_number("margin_db", margin_db)
        best = map(
            max, zip(*(floor.psnr for floor in self.floors.values()), strict=True)
        )
        pairs = zip(self.psnr, best, strict=True)
        return statistics.fmean(value >= floor + margin for value, floor in pairs)

    def summary(
        self, *, threshold_db: float = RECOVERED_DB, intervals: bool = False
    ) -> dict[str, Any]:
        """Summarise the score over the images.

        Args:
            threshold_db: Least PSNR of a recovered image in dB.
            intervals: Add 95 % intervals of the means and shares.

        Returns:
            ``images`` (count); for every metric its ``mean``, ``median`` and ``min``;
            one share for ``recovered``, ``label_accuracy``, with ``others``
            ``identified`` (and ``identified_by_chance``) and with a judge
            ``class_accuracy``; ``recovered_above_floor`` and the limits in dB of both
            ways to count; ``floors`` with the means of each floor;
            ``gains``: mean minus the best floor's mean, with the sign turned for the
            MSE and LPIPS so that a positive gain always means that more is shown than
            by the best guess. On request ``intervals``: (low, high) by metric, a
            Wilson interval for a share and a bootstrap interval for a mean, the
            latter None for fewer than 8 images.

        Raises:
            InputError: The threshold is not a finite number of at least 0.
        """
        check_number("threshold_db", threshold_db)
        result: dict[str, Any] = {"images": len(self)}
        for name, values in self._columns(threshold_db).items():
            if name in _SHARES:
                result[name] = statistics.fmean(values)
            else:
                result[name] = {
                    "mean": statistics.fmean(values),
                    "median": statistics.median(values),
                    "min": min(values),
                }
        if self.identification is not None:
            result["identified_by_chance"] = self.identification.chance
        result["recovered_threshold_db"] = float(threshold_db)
        result["recovered_above_floor"] = self.recovered_above_floor()
        result["recovered_margin_db"] = ABOVE_FLOOR_DB
        result["floors"] = {
            name: floor.means(threshold_db=threshold_db)
            for name, floor in self.floors.items()
        }
        result["gains"] = self._gains(threshold_db)
        if intervals:
            result["intervals"] = self._intervals(threshold_db)
        return result

    def _gains(self, threshold_db: float) -> dict[str, float]:
        gains = {}
        floors = [
            floor.means(threshold_db=threshold_db) for floor in self.floors.values()
        ]
        if self.identification is not None:
            floors.append({"identified": self.identification.chance})
        for name, value in self.means(threshold_db=threshold_db).items():
            known = [means[name] for means in floors if name in means]
            if known and name in _LOWER_IS_BETTER:
                gains[name] = min(known) - value
            elif known:
                gains[name] = value - max(known)
        return gains

    def _intervals(self, threshold_db: float) -> dict[str, tuple[float, float] | None]:
        result: dict[str, tuple[float, float] | None] = {}
        for name, values in self._columns(threshold_db).items():
            if name in _SHARES:
                result[name] = share_interval(round(sum(values)), len(values))
            else:
                enough = len(values) >= MIN_INTERVAL_IMAGES
                result[name] = bootstrap_interval(values) if enough else None
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the score as plain values for JSON, the same in every run.

        Returns:
            ``assignment``, ``per_image`` (metric -> list or None), ``floors`` (name ->
            the same lists), ``identification`` (``ranks``, ``pool_size`` and the ranks
            of its ``floors``, or None) and ``summary``; numbers have six significant
            digits.
        """
        found, ranks = self.identification, None
        if found is not None:
            ranks = {
                "ranks": list(found.ranks),
                "pool_size": found.pool_size,
                "floors": {name: list(floor) for name, floor in found.floors.items()},
            }
        return {
            "assignment": list(self.assignment),
            "per_image": _rounded(self._per_image()),
            "floors": _rounded({k: f._per_image() for k, f in self.floors.items()}),
            "identification": ranks,
            "summary": _rounded(self.summary()),
        }

    def table(self, *, threshold_db: float = RECOVERED_DB) -> str:
        """Return a small text table: each metric, its floors, its gain.

        Args:
            threshold_db: Least PSNR of a recovered image in dB.

        Returns:
            One row for each metric; the row of the shifted PSNR only where a shift
            changes what is printed.
        """
        gains = self._gains(check_number("threshold_db", threshold_db))
        floors = {
            name: floor.means(threshold_db=threshold_db)
            for name, floor in self.floors.items()
        }
        columns = self._columns(threshold_db)
        if _shown(self.registered_psnr) == _shown(self.psnr):
            del columns["registered_psnr"]
        head = ["", "mean", "median", "min", *floors, "gain"]
        rows = [head]
        for name, values in columns.items():
            level = f" ({threshold_db:g} dB)" if name == "recovered" else ""
            row = [_LABELS[name] + level]
            row += [_short(name, statistics.fmean(values))]
            if name in _SHARES:
                row += ["", ""]
            else:
                row += [_short(name, statistics.median(values))]
                row += [_short(name, min(values))]
            row += [_short(name, means.get(name)) for means in floors.values()]
            rows.append([*row, _short(name, gains.get(name), sign=True)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        plural = "image" if len(self) == 1 else "images"
        note = f"{len(self)} {plural}; the columns between min and gain are floors"
        if self.identification is not None:
            note += f"; identified by chance: 1 of {self.identification.pool_size}"
        return "\n".join([*lines, note])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return self.table()


def score(
    reconstruction: Reconstruction | ImagesLike | Images,
    truth: Images,
    *,
    others: Images | None = None,
    judge: Classifier | None = None,
    perceptual_net: PerceptualNet | None = None,
    seed: int = 0,
) -> LeakageScore:
    """Measure a reconstruction against the true images, with its floors.

    This is for the one who evaluates: an attacker has no ``truth`` and nothing under
    ``attacks`` may call this.

    Args:
        reconstruction: What an attack returned: ``images`` (N, C, H, W) in [0, 1] in
            any order, and ``labels`` (N,). ``Images`` work too.
        truth: The N true images.
        others: Images of the same data set, for ``identified`` and for the
            ``random_image`` floor; copies of true images in it are left out. Each
            draw of the floor takes N of them and gets its own one-to-one assignment,
            as the reconstruction does; so its labels are right more often than by
            pure chance. Without it, the other true images serve when N > 1, and there
            is no such floor when N = 1.
        judge: An independent classifier for feature similarity and class accuracy.
        perceptual_net: Network of the perceptual distance (``alex``, ``vgg`` or
            ``squeeze``), measured where its weights are in torch's hub cache and it
            takes images of this size; nothing is downloaded.
        seed: Seed of the draws of the ``random_image`` floor.

    Returns:
        The metrics of every true image and the floors.

    Raises:
        InputError: Counts or shapes differ, or a value is not finite or not in [0, 1].

    Taught in: notebooks/02_dlg_four_steps
    """
    images = check_reconstruction(reconstruction)
    target = check_unit_range(check_images(truth.pixels, "truth"), "truth")
    check_same_shape(images, target)
    found_labels = _labels(reconstruction.labels, len(images), "reconstruction.labels")
    labels = _labels(truth.labels, len(target), "truth.labels")
    against = _Truth(target, labels, judge, _usable(perceptual_net, target))
    order = assign(images, target)
    gallery = found = None
    if others is not None:
        gallery = build_gallery(target, others, argument="others")
        found = identification(images[order], gallery)
    columns = against.measure(images[order], found_labels[order])
    columns["identified"] = None
    if found is not None:
        columns["identified"] = tuple(rank == 1 for rank in found.ranks)
    for name in ("label_correct", "class_correct"):
        if columns[name] is not None:
            columns[name] = tuple(map(bool, columns[name]))
    draws = _draws(against, others, gallery, seed)
    return LeakageScore(
        **columns,
        assignment=tuple(order.tolist()),
        floors={name: _floor(name, pairs, against, found) for name, pairs in draws},
        identification=found,
    )


@dataclass(frozen=True, eq=False)
class _Truth:
    """The true images, and what measures other images against them."""

    pixels: Tensor
    labels: Tensor
    judge: Classifier | None
    perceptual_net: PerceptualNet | None

    def measure(self, images: Tensor, guessed: Tensor | None) -> dict[str, Any]:
        """Compute the metrics of images that are in the order of the truth."""
        truth, judge, net = self.pixels, self.judge, self.perceptual_net
        error = mean_squared_error(images, truth)
        similar = structural_similarity(images, truth)
        columns: dict[str, Tensor | None] = {
            "mse": error,
            "psnr": decibels(error),
            "registered_psnr": registered_psnr(images, truth),
            "ssim": None if similar.isnan().any() else similar,
            "perceptual_distance": None,
            "label_correct": None,
            "feature_similarity": None,
            "class_correct": None,
        }
        if net is not None:
            columns["perceptual_distance"] = perceptual_distance(images, truth, net=net)
        if guessed is not None:
            columns["label_correct"] = (guessed == self.labels).double()
        if judge is not None:
            columns["feature_similarity"] = feature_similarity(
                images, truth, judge=judge
            )
            columns["class_correct"] = class_accuracy(images, self.labels, judge=judge)
        return {k: None if v is None else tuple(v.tolist()) for k, v in columns.items()}


def _usable(net: PerceptualNet | None, images: Tensor) -> PerceptualNet | None:
    """Return the network if its weights are there and it takes these images."""
    if net is None:
        return None
    check_choice("perceptual_net", net, PERCEPTUAL_NETS)
    there = fits_perceptual_net(images, net) and perceptual_weights_available(net)
    return net if there else None


# --- floors -------------------------------------------------------------------------

_Draw = tuple[Tensor, Tensor | None]  # images and labels in the order of the truth


def _draws(
    truth: _Truth, others: Images | None, gallery: Gallery | None, seed: int
) -> list[tuple[str, list[_Draw]]]:
    """Return by name the images of the baselines that need no attack."""
    pixels = truth.pixels
    constant = pixels.mean(dim=(-2, -1), keepdim=True).expand_as(pixels)
    draws: list[tuple[str, list[_Draw]]] = [("constant", [(constant, None)])]
    generator = torch.Generator().manual_seed(seed)
    if others is not None and gallery is not None:
        labels = _labels(others.labels, len(gallery.pool), "others.labels")
        draws.append(("random_image", _draws_from_pool(gallery, labels, generator)))
    elif len(pixels) > 1:
        draws.append(("random_image", _draws_from_batch(truth, generator)))
    if len(pixels) > 1:
        mean = pixels.mean(dim=0, keepdim=True).expand_as(pixels)
        draws.append(("batch_mean", [(mean, None)]))
    return draws


def _draws_from_pool(
    gallery: Gallery, labels: Tensor, generator: torch.Generator
) -> list[_Draw]:
    """Draw N pool images at a time and assign them as a reconstruction would be."""
    kept, count = gallery.kept, len(gallery.truth)
    if not len(kept):
        expected = "at least one image that is not a true image"
        raise InputError("others", expected, f"{len(labels)} copies of true images")
    draws: list[_Draw] = []
    for _ in range(_draw_count(count)):
        if len(kept) >= count:
            chosen = kept[torch.randperm(len(kept), generator=generator)[:count]]
        else:
            chosen = kept[torch.randint(len(kept), (count,), generator=generator)]
        chosen = chosen[assign(gallery.pool[chosen], gallery.truth)]
        draws.append((gallery.pool[chosen], labels[chosen]))
    return draws


def _draws_from_batch(truth: _Truth, generator: torch.Generator) -> list[_Draw]:
    """Show every true image another true image: all cyclic shifts, or some."""
    count = len(truth.pixels)
    shifts = 1 + torch.randperm(count - 1, generator=generator)
    return [
        (truth.pixels.roll(shift, dims=0), truth.labels.roll(shift, dims=0))
        for shift in sorted(shifts[: _draw_count(count)].tolist())
    ]


def _draw_count(count: int) -> int:
    """Draw often for few images; many images average over themselves."""
    return min(16, max(3, math.ceil(FLOOR_IMAGES / count)))


def _floor(
    name: str, draws: Sequence[_Draw], truth: _Truth, found: Identification | None
) -> Floor:
    """Average the metrics per image over the draws."""
    measured = [truth.measure(images, guessed) for images, guessed in draws]
    columns: dict[str, Any] = {}
    for metric, first in measured[0].items():
        values = [draw[metric] for draw in measured]
        columns[metric] = (
            None
            if first is None
            else tuple(map(statistics.fmean, zip(*values, strict=True)))
        )
    identified: tuple[float, ...] | None = None
    if found is not None:
        # A drawn image is in the pool: it is its own nearest neighbour.
        ranks = found.floors.get(name, (0,) * len(truth.pixels))
        identified = tuple(float(rank == 1) for rank in ranks)
    psnr_draws = tuple(draw["psnr"] for draw in measured)
    return Floor(**columns, identified=identified, psnr_draws=psnr_draws)


# --- checks and numbers -------------------------------------------------------------


def _labels(labels: object, count: int, argument: str) -> Tensor:
    if not isinstance(labels, Tensor) or labels.shape != (count,):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else repr(labels)
        raise InputError(argument, f"class indices of shape ({count},)", got)
    return labels.detach().cpu()


def _short(name: str, value: float | None, *, sign: bool = False) -> str:
    """Format a number for the table: dB with 1 decimal, errors with 3 digits."""
    if value is None:
        return "-"
    digits = {"mse": ".2e", "psnr": ".1f", "registered_psnr": ".1f"}.get(name, ".3f")
    return format(value, f"+{digits}" if sign else digits)


def _shown(values: Sequence[float]) -> list[str]:
    """Return PSNR values as the table prints them."""
    return [_short("psnr", value) for value in values]


def _rounded(value: Any) -> Any:
    """Round every float inside to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
