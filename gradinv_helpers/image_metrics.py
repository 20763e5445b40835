"""Compare pairs of images: a reconstruction and the true image it belongs to.

``assign`` decides which reconstruction belongs to which true image; every other
function takes images in that order and gives one number for each pair.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError, check_count

if TYPE_CHECKING:
    from gradinv_helpers.classifier import Classifier

MSE_FLOOR = 1e-20  # below it two images count as equal, so PSNR stops at 200 dB
GAUSSIAN_MIN_SIDE = 16  # smallest side that gets the 11 x 11 Gaussian window
UNIFORM_MIN_SIDE = 7  # smallest side that gets the 7 x 7 uniform window
MAX_SHIFT = 4  # largest shift in pixels that registered_psnr tries by itself
SIDE_PER_SHIFT = 8  # it tries one pixel for every 8 pixels of the smaller side
RANGE_TOLERANCE = 1e-5  # rounding allowed outside [0, 1]


class ImagesLike(Protocol):
    """Anything with ``images (N, C, H, W)`` in [0, 1] and ``labels (N,)``."""

    @property
    def images(self) -> Tensor:
        """Images (N, C, H, W) with values in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """Class indices (N,)."""


# --- one-to-one assignment ----------------------------------------------------------


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

    left, right = check_pair(images, truth)
    size = left[0].numel()
    distances = torch.cdist(  # (N, N); this mode has no cancellation near zero
        right.flatten(1),
        left.flatten(1),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    _, columns = linear_sum_assignment((distances.square() / size).numpy())
    return torch.as_tensor(columns, dtype=torch.int64)


# --- pixels -------------------------------------------------------------------------


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
    left, right = check_pair(images, truth)
    return _squared_error(left, right)


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
    return decibels(mean_squared_error(images, truth))


def registered_psnr(
    images: Tensor, truth: Tensor, *, max_shift: int | None = None, flip: bool = False
) -> Tensor:
    """Compute the PSNR of each image pair after the best small shift of the pair.

    Every image is moved by whole pixels along both axes and compared with its own
    truth where the two overlap; the best PSNR counts. It is never below the PSNR
    without a shift. Trying many shifts also raises the PSNR of a guess a little, so
    compare with the floors of this metric, not with those of the PSNR.

    Args:
        images: Reconstructions (N, C, H, W), already in the order of ``truth``.
        truth: True images (N, C, H, W), values in [0, 1].
        max_shift: Largest shift in pixels along each axis; by default an eighth of
            the smaller side, at most 4 pixels.
        flip: Also try the mirrored image (left and right exchanged).

    Returns:
        (N,) float64, in dB, at most 200.

    Raises:
        InputError: The shapes differ, are not (N, C, H, W), a value is not finite, or
            the shift is not from 0 to the smaller side minus 1.

    Source: Yin et al. (2021), See through gradients, for registering images in
    gradient inversion. They warp with RANSAC-Flow; here images only move.
    Taught in: notebooks/03_stronger_matching
    """
    left, right = check_pair(images, truth)
    side = min(left.shape[-2:])
    if max_shift is None:
        max_shift = min(MAX_SHIFT, side // SIDE_PER_SHIFT)
    check_count("max_shift", max_shift, minimum=0, maximum=side - 1)
    best = _best_shift_error(left, right, max_shift)
    if flip:
        best = torch.minimum(best, _best_shift_error(left.flip(-1), right, max_shift))
    return decibels(best)


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
    left, right = check_pair(images, truth)  # float32 is off by up to 2e-3 where flat
    side = min(left.shape[-2:])
    if side < UNIFORM_MIN_SIDE:
        return torch.full((len(left),), math.nan, dtype=torch.float64)
    window = _gaussian_window(11, 1.5) if side >= GAUSSIAN_MIN_SIDE else [1 / 7] * 7
    values = torch.stack([left, right, left**2, right**2, left * right])
    mean_l, mean_r, square_l, square_r, product = _smoothed(values, window)
    spread = square_l - mean_l**2 + square_r - mean_r**2
    common = product - mean_l * mean_r
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_l * mean_r + c1) / (mean_l**2 + mean_r**2 + c1)
    structure = (2 * common + c2) / (spread + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


# --- an independent classifier ------------------------------------------------------


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
    check_pair(images, truth)
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
    pixels = check_images(images, "images")
    if labels.shape != (len(pixels),):
        raise InputError("labels", f"shape ({len(pixels)},)", tuple(labels.shape))
    return (judge.predict(pixels) == labels.cpu()).double()


# --- parts --------------------------------------------------------------------------


def decibels(error: Tensor) -> Tensor:
    """Turn mean squared errors into PSNR in dB, at most 200."""
    return -10.0 * error.clamp_min(MSE_FLOOR).log10()


def _squared_error(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).square().flatten(1).mean(dim=1)


def _best_shift_error(left: Tensor, right: Tensor, max_shift: int) -> Tensor:
    """Return the least MSE of each pair over all shifts, where the two overlap."""
    height, width = left.shape[-2:]
    shifts = range(-max_shift, max_shift + 1)
    errors = [
        _squared_error(
            left[..., max(down, 0) : height + down, max(along, 0) : width + along],
            right[..., max(-down, 0) : height - down, max(-along, 0) : width - along],
        )
        for down in shifts
        for along in shifts
    ]
    return torch.stack(errors).amin(dim=0)


def _gaussian_window(size: int, sigma: float) -> list[float]:
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [weight / math.fsum(weights) for weight in weights]


def _smoothed(values: Tensor, window: list[float]) -> Tensor:
    """Average along both image axes, where the whole window lies inside."""
    for axis in (-2, -1):
        length = values.shape[axis] - len(window) + 1
        total = torch.zeros_like(values.narrow(axis, 0, length))
        for start, weight in enumerate(window):
            total.add_(values.narrow(axis, start, length), alpha=weight)
        values = total
    return values


# --- checks -------------------------------------------------------------------------


def check_images(images: object, argument: str) -> Tensor:
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


def check_pair(images: object, truth: object) -> tuple[Tensor, Tensor]:
    """Return both sides in float64 on the CPU, checked."""
    left, right = check_images(images, "images"), check_images(truth, "truth")
    check_same_shape(left, right)
    return left.double(), right.double()


def check_same_shape(images: Tensor, truth: Tensor) -> None:
    """Refuse images that do not come one for each true image and of its shape."""
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


def check_unit_range(images: Tensor, argument: str) -> Tensor:
    """Return the images if their pixels lie in [0, 1], up to rounding."""
    low, high = images.min().item(), images.max().item()
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise InputError(
            argument,
            "pixels in [0, 1]",
            f"[{low:.3g}, {high:.3g}]",
            "undo the normalisation or clamp first",
        )
    return images


def check_reconstruction(reconstruction: object) -> Tensor:
    """Return the images of a reconstruction, or the pixels of ``Images``."""
    found = getattr(reconstruction, "images", None)
    if not isinstance(found, Tensor):
        found = getattr(reconstruction, "pixels", None)
    return check_unit_range(check_images(found, "reconstruction"), "reconstruction")
