"""Measure how much a reconstruction shows, next to what a guess would show.

Reconstructed images come back in any order. One one-to-one assignment decides which
reconstruction belongs to which true image, and every metric uses that assignment.
Each score carries its floors: the same metrics for images that no attack produced.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError

if TYPE_CHECKING:
    from gradinv_helpers.attacks.invert import Reconstruction
    from gradinv_helpers.classifier import Classifier
    from gradinv_helpers.data import Images

MSE_FLOOR = 1e-20  # below it two images count as equal, so PSNR stops at 200 dB
GAUSSIAN_MIN_SIDE = 16  # smallest side that gets the 11 x 11 Gaussian window
UNIFORM_MIN_SIDE = 7  # smallest side that gets the 7 x 7 uniform window
FLOOR_IMAGES = 32  # images behind the "random_image" floor, in 3 to 16 draws
RANGE_TOLERANCE = 1e-5  # rounding allowed outside [0, 1]
SIGNIFICANT_DIGITS = 6  # digits kept by LeakageScore.to_dict

_LABELS = {
    "mse": "MSE",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "label_accuracy": "labels right",
    "feature_similarity": "feature cosine",
    "class_accuracy": "class right",
}
_LOWER_IS_BETTER = {"mse"}


class ImagesLike(Protocol):
    """Anything with ``images (N, C, H, W)`` in [0, 1] and ``labels (N,)``."""

    @property
    def images(self) -> Tensor:
        """Images (N, C, H, W) with values in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """Class indices (N,)."""


# --- metrics of image pairs ---------------------------------------------------------


def assign(images: Tensor, truth: Tensor) -> Tensor:
    """Match every true image with one reconstruction, each used once.

    The assignment minimises the sum over pairs of the mean squared error, so no
    reconstruction counts twice and all metrics speak about the same pairs.

    Args:
        images: Reconstructions (N, C, H, W), in any order.
        truth: True images (N, C, H, W).

    Returns:
        Indices (N,), int64: ``images[assign(images, truth)]`` has the order of
        ``truth``.

    Raises:
        InputError: The shapes differ, are not (N, C, H, W), or a value is not finite.

    Source: Kuhn (1955), The Hungarian method for the assignment problem.
    Taught in: notebooks/02_dlg_four_steps
    """
    from scipy.optimize import linear_sum_assignment

    left, right = _pair(images, truth)
    size = left[0].numel()
    distances = torch.cdist(  # (N, N); this mode has no cancellation near zero
        right.flatten(1),
        left.flatten(1),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    _, columns = linear_sum_assignment((distances.square() / size).numpy())
    return torch.as_tensor(columns, dtype=torch.int64)


def mean_squared_error(images: Tensor, truth: Tensor) -> Tensor:
    """Compute the mean squared difference of each image pair.

    ``mean over C, H, W of (x' - x)^2``

    Args:
        images: Reconstructions (N, C, H, W), already in the order of ``truth``.
        truth: True images (N, C, H, W).

    Returns:
        (N,) float64, in squared units of the pixel range.

    Raises:
        InputError: The shapes differ, are not (N, C, H, W), or a value is not finite.

    Taught in: notebooks/02_dlg_four_steps

    >>> mean_squared_error(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item()
    1.0
    """
    left, right = _pair(images, truth)
    return (left - right).square().flatten(1).mean(dim=1)


def peak_signal_noise_ratio(images: Tensor, truth: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image pair in dB.

    ``-10 log10(MSE)`` for pixels in [0, 1]. An MSE below 1e-20 counts as 1e-20, so
    equal images score 200 dB and a mean over images stays finite.

    Args:
        images: Reconstructions (N, C, H, W), already in the order of ``truth``.
        truth: True images (N, C, H, W), values in [0, 1].

    Returns:
        (N,) float64, in dB, at most 200.

    Raises:
        InputError: The shapes differ, are not (N, C, H, W), or a value is not finite.

    Taught in: notebooks/02_dlg_four_steps
    """
    return _decibels(mean_squared_error(images, truth))


def structural_similarity(images: Tensor, truth: Tensor) -> Tensor:
    """Compute the structural similarity (SSIM) of each image pair.

    Images whose smaller side is at least 16 use the 11 x 11 Gaussian window with
    sigma 1.5 of the original paper; sides from 7 to 15 use a uniform 7 x 7 window.
    Only positions where the whole window lies inside the image count. Channels are
    averaged. Variances are population variances and the pixel range is 1.

    Args:
        images: Reconstructions (N, C, H, W), already in the order of ``truth``.
        truth: True images (N, C, H, W), values in [0, 1].

    Returns:
        (N,) float64 in [-1, 1]; NaN for every image when a side is below 7.

    Raises:
        InputError: The shapes differ, are not (N, C, H, W), or a value is not finite.

    Source: Wang et al. (2004), Image quality assessment, sec. III.
    Taught in: notebooks/02_dlg_four_steps
    """
    left, right = _pair(images, truth)  # float32 is off by up to 2e-3 where it is flat
    side = min(left.shape[-2:])
    if side < UNIFORM_MIN_SIDE:
        return torch.full((len(left),), math.nan, dtype=torch.float64)
    from torchmetrics.functional.image import structural_similarity_index_measure

    gaussian = side >= GAUSSIAN_MIN_SIDE
    result = structural_similarity_index_measure(
        left,
        right,
        gaussian_kernel=gaussian,
        sigma=1.5,
        kernel_size=11 if gaussian else 7,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    border = 5 if gaussian else 3  # the map is padded: keep whole windows only
    whole = result[1][..., border:-border, border:-border]
    return whole.flatten(1).mean(dim=1)


def feature_similarity(images: Tensor, truth: Tensor, *, judge: Classifier) -> Tensor:
    """Compute the cosine of each pair in the feature space of a classifier.

    The features are the input of the classifier's last linear layer. A reconstruction
    can score high here while its pixels differ, for example when it is shifted.

    Args:
        images: Reconstructions (N, C, H, W), already in the order of ``truth``.
        truth: True images (N, C, H, W).
        judge: An independent classifier; never the attacked model.

    Returns:
        (N,) float64 in [-1, 1].

    Raises:
        InputError: The shapes differ, are not (N, C, H, W), or a value is not finite.

    Source: Zhang et al. (2018), The unreasonable effectiveness of deep features,
        for the idea of distances between deep features.
    Taught in: notebooks/02_dlg_four_steps
    """
    _pair(images, truth)
    left, right = judge.features(images), judge.features(truth)
    return torch.cosine_similarity(left.double(), right.double(), dim=1)


def class_accuracy(images: Tensor, labels: Tensor, *, judge: Classifier) -> Tensor:
    """Tell for each image whether an independent classifier sees the true class.

    Args:
        images: Reconstructions (N, C, H, W), already in the order of ``labels``.
        labels: True class indices (N,).
        judge: An independent classifier; never the attacked model.

    Returns:
        (N,) float64: 1 where the predicted class is the true class, else 0.

    Raises:
        InputError: The counts differ, or a value is not finite.

    Taught in: notebooks/02_dlg_four_steps
    """
    pixels = _pixels(images, "images")
    if labels.shape != (len(pixels),):
        raise InputError("labels", f"shape ({len(pixels)},)", tuple(labels.shape))
    return (judge.predict(pixels) == labels.cpu()).double()


# --- the score ----------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _PerImage:
    """Metrics per true image, in the order of the true images.

    Attributes:
        mse: Mean squared errors.
        psnr: Peak signal-to-noise ratios in dB, at most 200.
        ssim: Structural similarities; None for images with a side below 7.
        label_correct: Whether the label that came with the image is the true one; a
            share between 0 and 1 in a floor that averages draws; None in a floor
            that has no labels.
        feature_similarity: Cosines of the judge's features; None without a judge.
        class_correct: Whether the judge sees the true class in the image (a share in
            a floor that averages draws); None without a judge.
    """

    mse: tuple[float, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...] | None
    label_correct: tuple[float, ...] | None
    feature_similarity: tuple[float, ...] | None
    class_correct: tuple[float, ...] | None

    def __len__(self) -> int:
        return len(self.mse)

    def _columns(self) -> dict[str, tuple[float, ...]]:
        columns = {
            "mse": self.mse,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "label_accuracy": self.label_correct,
            "feature_similarity": self.feature_similarity,
            "class_accuracy": self.class_correct,
        }
        return {name: values for name, values in columns.items() if values is not None}

    def means(self) -> dict[str, float]:
        """Return the mean over images of every metric that is present."""
        return {name: statistics.fmean(v) for name, v in self._columns().items()}

    @property
    def label_accuracy(self) -> float | None:
        """Share of images with the true label; None where there are no labels."""
        return None if self.label_correct is None else self.means()["label_accuracy"]

    @property
    def class_accuracy(self) -> float | None:
        """Share of images whose class the judge sees; None without a judge."""
        return None if self.class_correct is None else self.means()["class_accuracy"]

    def _per_image(self) -> dict[str, list[float] | None]:
        pixels = ("mse", "psnr", "ssim")
        judged = ("feature_similarity", "class_correct")
        names = (*pixels, "label_correct", *judged)
        values = {name: getattr(self, name) for name in names}
        return {name: None if v is None else list(v) for name, v in values.items()}


@dataclass(frozen=True, repr=False)
class Floor(_PerImage):
    """The metrics of images that a guess, not an attack, would show.

    Attributes:
        mse, psnr, ssim, label_correct, feature_similarity, class_correct: As in
            ``LeakageScore``, averaged over the draws of the floor.

    Taught in: notebooks/02_dlg_four_steps
    """

    def __repr__(self) -> str:
        numbers = ", ".join(f"{k}={_short(k, v)}" for k, v in self.means().items())
        return f"Floor({numbers})"


@dataclass(frozen=True, repr=False)
class LeakageScore(_PerImage):
    """What one reconstruction shows of the truth, and what a guess would show.

    Attributes:
        mse: Mean squared error of each true image.
        psnr: Peak signal-to-noise ratio of each true image in dB, at most 200.
        ssim: Structural similarities; None for images with a side below 7.
        label_correct: Whether the reconstructed label is the true one.
        feature_similarity: Cosines of the judge's features; None without a judge.
        class_correct: Whether the judge sees the true class in the reconstruction;
            None without a judge.
        assignment: Index of the reconstruction that belongs to each true image.
        floors: Baselines by name. ``constant``: each true image replaced by its own
            mean colour, no constant image has a lower MSE. ``random_image``: other
            images of the data set. ``batch_mean``: the mean true image shown for
            every one (more than one image only).

    Taught in: notebooks/02_dlg_four_steps
    """

    assignment: tuple[int, ...]
    floors: Mapping[str, Floor]

    def summary(self) -> dict[str, Any]:
        """Summarise the score over the images.

        Returns:
            ``images`` (count); for every metric its ``mean``, ``median`` and ``min``;
            ``label_accuracy`` and, with a judge, ``class_accuracy`` as one share;
            ``floors`` with the means of each floor; ``gains``: mean minus the best
            floor's mean, with the sign turned for the MSE so that a positive gain
            always means that more is shown than by the best guess.
        """
        result: dict[str, Any] = {"images": len(self)}
        for name, values in self._columns().items():
            if name in ("label_accuracy", "class_accuracy"):
                result[name] = statistics.fmean(values)
            else:
                result[name] = {
                    "mean": statistics.fmean(values),
                    "median": statistics.median(values),
                    "min": min(values),
                }
        result["floors"] = {name: f.means() for name, f in self.floors.items()}
        result["gains"] = self._gains()
        return result

    def _gains(self) -> dict[str, float]:
        gains = {}
        floors = [floor.means() for floor in self.floors.values()]
        for name, value in self.means().items():
            known = [means[name] for means in floors if name in means]
            if known and name in _LOWER_IS_BETTER:
                gains[name] = min(known) - value
            elif known:
                gains[name] = value - max(known)
        return gains

    def to_dict(self) -> dict[str, Any]:
        """Return the score as plain values for JSON, the same in every run.

        Returns:
            ``assignment``, ``per_image`` (metric -> list or None), ``floors`` (name ->
            the same lists) and ``summary``; numbers have six significant digits.
        """
        return {
            "assignment": list(self.assignment),
            "per_image": _rounded(self._per_image()),
            "floors": _rounded({k: f._per_image() for k, f in self.floors.items()}),
            "summary": _rounded(self.summary()),
        }

    def table(self) -> str:
        """Return a small text table: each metric, its floors, its gain."""
        gains = self._gains()
        floors = {name: floor.means() for name, floor in self.floors.items()}
        head = ["", "mean", "median", "min", *floors, "gain"]
        rows = [head]
        for name, values in self._columns().items():
            mean = statistics.fmean(values)
            row = [_LABELS[name], _short(name, mean)]
            if name in ("label_accuracy", "class_accuracy"):
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
    seed: int = 0,
) -> LeakageScore:
    """Measure a reconstruction against the true images, with its floors.

    This is for the one who evaluates: an attacker has no ``truth`` and nothing under
    ``attacks`` may call this.

    Args:
        reconstruction: What an attack returned: ``images`` (N, C, H, W) in [0, 1] in
            any order, and ``labels`` (N,). ``Images`` work too.
        truth: The N true images.
        others: Images of the same data set for the ``random_image`` floor; copies of
            true images in it are left out. Each draw takes N of them and gets its own
            one-to-one assignment, as the reconstruction does; so its labels are right
            more often than by pure chance. Without it, the other true images serve
            when N > 1, and there is no such floor when N = 1.
        judge: An independent classifier for feature similarity and class accuracy.
        seed: Seed of the draws of the ``random_image`` floor.

    Returns:
        The metrics of every true image and the floors.

    Raises:
        InputError: Counts or shapes differ, or a value is not finite or not in [0, 1].

    Taught in: notebooks/02_dlg_four_steps
    """
    found = getattr(reconstruction, "images", None)
    if not isinstance(found, Tensor):
        found = getattr(reconstruction, "pixels", None)
    images = _unit_range(_pixels(found, "reconstruction"), "reconstruction")
    target = _unit_range(_pixels(truth.pixels, "truth"), "truth")
    _same_shape(images, target)
    found_labels = _labels(reconstruction.labels, len(images), "reconstruction.labels")
    labels = _labels(truth.labels, len(target), "truth.labels")
    order = assign(images, target)
    columns = _measure(images[order], target, found_labels[order], labels, judge)
    if columns["label_correct"] is not None:
        columns["label_correct"] = tuple(map(bool, columns["label_correct"]))
    if columns["class_correct"] is not None:
        columns["class_correct"] = tuple(map(bool, columns["class_correct"]))
    return LeakageScore(
        **columns,
        assignment=tuple(order.tolist()),
        floors=_floors(target, labels, others, judge, seed),
    )


# --- floors -------------------------------------------------------------------------


def _floors(
    truth: Tensor,
    labels: Tensor,
    others: Images | None,
    judge: Classifier | None,
    seed: int,
) -> dict[str, Floor]:
    """Measure the baselines that need no attack."""
    constant = truth.mean(dim=(-2, -1), keepdim=True).expand_as(truth)
    draws: dict[str, list[tuple[Tensor, Tensor | None]]] = {"constant": []}
    draws["constant"].append((constant, None))
    generator = torch.Generator().manual_seed(seed)
    if others is not None:
        draws["random_image"] = _draws_from_pool(truth, others, generator)
    elif len(truth) > 1:
        draws["random_image"] = _draws_from_batch(truth, labels, generator)
    if len(truth) > 1:
        mean = truth.mean(dim=0, keepdim=True).expand_as(truth)
        draws["batch_mean"] = [(mean, None)]
    return {
        name: _averaged([_measure(i, truth, g, labels, judge) for i, g in pairs])
        for name, pairs in draws.items()
    }


def _draws_from_pool(
    truth: Tensor, others: Images, generator: torch.Generator
) -> list[tuple[Tensor, Tensor | None]]:
    """Draw N pool images at a time and assign them as a reconstruction would be."""
    pool = _unit_range(_pixels(others.pixels, "others"), "others")
    if pool.shape[1:] != truth.shape[1:]:
        expected = f"images of shape {tuple(truth.shape[1:])}"
        raise InputError("others", expected, tuple(pool.shape[1:]))
    pool_labels = _labels(others.labels, len(pool), "others.labels")
    known = {image.numpy().tobytes() for image in truth.float()}
    keep = [i for i, p in enumerate(pool.float()) if p.numpy().tobytes() not in known]
    if not keep:
        expected = "at least one image that is not a true image"
        raise InputError("others", expected, f"{len(pool)} copies of true images")
    kept = torch.tensor(keep)
    draws: list[tuple[Tensor, Tensor | None]] = []
    count = len(truth)
    for _ in range(_draw_count(count)):
        if len(kept) >= count:
            chosen = kept[torch.randperm(len(kept), generator=generator)[:count]]
        else:
            chosen = kept[torch.randint(len(kept), (count,), generator=generator)]
        chosen = chosen[assign(pool[chosen], truth)]
        draws.append((pool[chosen], pool_labels[chosen]))
    return draws


def _draws_from_batch(
    truth: Tensor, labels: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, Tensor | None]]:
    """Show every true image another true image: all cyclic shifts, or some."""
    shifts = 1 + torch.randperm(len(truth) - 1, generator=generator)
    shifts = shifts[: _draw_count(len(truth))]
    return [
        (truth.roll(shift, dims=0), labels.roll(shift, dims=0))
        for shift in sorted(shifts.tolist())
    ]


def _draw_count(count: int) -> int:
    """Draw often for few images; many images average over themselves."""
    return min(16, max(3, math.ceil(FLOOR_IMAGES / count)))


def _averaged(draws: Sequence[dict[str, Any]]) -> Floor:
    """Average the per-image metrics over the draws."""
    columns: dict[str, Any] = {}
    for name in draws[0]:
        values = [draw[name] for draw in draws]
        columns[name] = (
            None
            if values[0] is None
            else tuple(map(statistics.fmean, zip(*values, strict=True)))
        )
    return Floor(**columns)


def _measure(
    images: Tensor,
    truth: Tensor,
    guessed: Tensor | None,
    labels: Tensor,
    judge: Classifier | None,
) -> dict[str, Any]:
    """Compute every metric for images that are already in the order of the truth."""
    error = mean_squared_error(images, truth)
    similar = structural_similarity(images, truth)
    columns: dict[str, Any] = {
        "mse": error,
        "psnr": _decibels(error),
        "ssim": None if similar.isnan().any() else similar,
        "label_correct": None if guessed is None else (guessed == labels).double(),
        "feature_similarity": None,
        "class_correct": None,
    }
    if judge is not None:
        columns["feature_similarity"] = feature_similarity(images, truth, judge=judge)
        columns["class_correct"] = class_accuracy(images, labels, judge=judge)
    return {k: None if v is None else tuple(v.tolist()) for k, v in columns.items()}


# --- checks and numbers -------------------------------------------------------------


def _decibels(error: Tensor) -> Tensor:
    return -10.0 * error.clamp_min(MSE_FLOOR).log10()


def _pixels(images: object, argument: str) -> Tensor:
    """Return the images as a finite (N, C, H, W) tensor on the CPU."""
    if not isinstance(images, Tensor):
        raise InputError(argument, "images (N, C, H, W)", type(images).__name__)
    if images.ndim != 4 or 0 in images.shape:
        hint = "add a batch axis with images[None]" if images.ndim == 3 else ""
        raise InputError(
            argument, "images of shape (N, C, H, W)", tuple(images.shape), hint
        )
    values = images.detach().cpu()
    if not values.isfinite().all():
        bad = [i for i, image in enumerate(values) if not image.isfinite().all()]
        raise InputError(
            argument, "finite pixels", f"NaN or infinity in image {bad[0]}"
        )
    return values


def _pair(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides in float64, checked."""
    left, right = _pixels(images, "images"), _pixels(truth, "truth")
    _same_shape(left, right)
    return left.double(), right.double()


def _same_shape(images: Tensor, truth: Tensor) -> None:
    if len(images) != len(truth):
        raise InputError(
            "images",
            f"{len(truth)} images, one for each true image",
            f"{len(images)}",
        )
    if images.shape != truth.shape:
        raise InputError(
            "images",
            f"images of shape {tuple(truth.shape[1:])} like the truth",
            tuple(images.shape[1:]),
        )


def _unit_range(images: Tensor, argument: str) -> Tensor:
    low, high = images.min().item(), images.max().item()
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise InputError(
            argument,
            "pixels in [0, 1]",
            f"[{low:.3g}, {high:.3g}]",
            "undo the normalisation or clamp first",
        )
    return images


def _labels(labels: object, count: int, argument: str) -> Tensor:
    if not isinstance(labels, Tensor) or labels.shape != (count,):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else repr(labels)
        raise InputError(argument, f"class indices of shape ({count},)", got)
    return labels.detach().cpu()


def _short(name: str, value: float | None, *, sign: bool = False) -> str:
    """Format a number for the table: dB with 1 decimal, errors with 3 digits."""
    if value is None:
        return "-"
    digits = {"mse": ".2e", "psnr": ".1f"}.get(name, ".3f")
    return format(value, f"+{digits}" if sign else digits)


def _rounded(value: Any) -> Any:
    """Round every float inside to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
