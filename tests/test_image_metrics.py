"""Metrics of image pairs agree with scikit-image and see one pair at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from skimage import data as pictures
from skimage import metrics as reference
from skimage.registration import phase_cross_correlation

from gradinv_helpers import image_metrics as metrics
from gradinv_helpers.data import load_images
from gradinv_helpers.errors import InputError


def _random(count=4, channels=3, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator)


def _picture():
    """A colour photograph (3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures.astronaut()).permute(2, 0, 1).double() / 255


class _Judge:
    """A judge whose features are the mean colours and whose class is the brightest."""

    def features(self, images):
        return images.mean(dim=(2, 3)) + 1e-3

    def predict(self, images):
        return images.mean(dim=(2, 3)).argmax(dim=1)


def _skimage_ssim(image, truth):
    side = min(image.shape[-2:])
    window = {"gaussian_weights": True, "sigma": 1.5} if side >= 16 else {"win_size": 7}
    return reference.structural_similarity(
        image.double().numpy(),
        truth.double().numpy(),
        data_range=1.0,
        channel_axis=0,
        use_sample_covariance=False,
        **window,
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "shape", [(7, 7), (8, 8), (15, 15), (16, 16), (32, 32), (8, 40)]
)
def test_ssim_agrees_with_scikit_image_on_random_images(channels, shape):
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(3, channels, *shape, generator=generator)
    images = (truth + 0.2 * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    expected = [_skimage_ssim(a, b) for a, b in zip(images, truth, strict=True)]
    found = metrics.structural_similarity(images, truth)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["digits", "photos", "faces"])
def test_ssim_agrees_with_scikit_image_on_real_images(name):
    truth = load_images(name, split="test").pixels[:6]
    for images in (truth.flip(0), 0.5 * truth + 0.2, torch.full_like(truth, 0.99)):
        expected = [_skimage_ssim(a, b) for a, b in zip(images, truth, strict=True)]
        found = metrics.structural_similarity(images, truth)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ssim_of_flat_bright_images_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    truth = 0.99 + 1e-4 * torch.randn(2, 1, 32, 32, generator=generator)
    images = torch.full_like(truth, 0.99)
    expected = [_skimage_ssim(a, b) for a, b in zip(images, truth, strict=True)]
    found = metrics.structural_similarity(images, truth)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ssim_is_nan_for_tiny_images_and_one_for_equal_ones():
    tiny = _random(side=6)
    assert metrics.structural_similarity(tiny, tiny).isnan().all()
    images = _random(side=8)
    assert metrics.structural_similarity(images, images).tolist() == [1.0] * 4


def test_psnr_and_mse_agree_with_scikit_image():
    images, truth = _random(seed=1), _random(seed=2)
    for i in range(4):
        a, b = images[i].double().numpy(), truth[i].double().numpy()
        mse = reference.mean_squared_error(b, a)
        psnr = reference.peak_signal_noise_ratio(b, a, data_range=1.0)
        assert metrics.mean_squared_error(images, truth)[i] == pytest.approx(mse)
        assert metrics.peak_signal_noise_ratio(images, truth)[i] == pytest.approx(psnr)


def test_psnr_known_values_and_cap():
    truth = torch.zeros(3, 1, 8, 8)
    images = torch.stack([truth[0], truth[1] + 0.1, truth[2] + 1.0])
    found = metrics.peak_signal_noise_ratio(images, truth)
    assert found.tolist() == pytest.approx([200.0, 20.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_assignment_undoes_a_permutation(seed):
    truth = _random(6, seed=seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(truth[order][metrics.assign(truth[order], truth)], truth)


def test_assignment_is_the_optimal_one_to_one_assignment():
    images, truth = _random(7, seed=3), _random(7, seed=4)
    costs = (images[None] - truth[:, None]).double().square().mean(dim=(2, 3, 4))
    assert metrics.assign(images, truth).tolist() == (
        linear_sum_assignment(costs.numpy())[1].tolist()
    )


# --- a classifier's eyes ------------------------------------------------------------


def test_features_and_classes_come_from_the_judge():
    truth = torch.zeros(2, 3, 8, 8)
    truth[0, 0], truth[1, 1] = 1.0, 1.0
    swapped = metrics.feature_similarity(truth.flip(0), truth, judge=_Judge())
    assert metrics.feature_similarity(truth, truth, judge=_Judge()).tolist() == (
        pytest.approx([1.0, 1.0])
    )
    assert swapped.max() < 0.01
    hits = metrics.class_accuracy(truth, torch.tensor([0, 0]), judge=_Judge())
    assert hits.tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="labels: expected shape"):
        metrics.class_accuracy(truth, torch.arange(3), judge=_Judge())


# --- registered PSNR ----------------------------------------------------------------


def _registered_by_hand(image, truth, max_shift):
    """The best PSNR over all overlaps, by explicit loops and scikit-image."""
    _, height, width = image.shape
    best = -math.inf
    for down in range(-max_shift, max_shift + 1):
        for along in range(-max_shift, max_shift + 1):
            ours, theirs = [], []
            for row in range(height):
                for column in range(width):
                    if 0 <= row - down < height and 0 <= column - along < width:
                        ours.append(image[:, row, column])
                        theirs.append(truth[:, row - down, column - along])
            psnr = reference.peak_signal_noise_ratio(
                np.array(theirs), np.array(ours), data_range=1.0
            )
            best = max(best, psnr)
    return best


@pytest.mark.parametrize("max_shift", [0, 1, 2])
def test_registered_psnr_agrees_with_a_search_by_hand(max_shift):
    images, truth = _random(3, side=9, seed=1), _random(3, side=9, seed=2)
    images[2, :, 1:, :-1] = truth[2, :, :-1, 1:]  # one down, one to the left
    found = metrics.registered_psnr(images, truth, max_shift=max_shift)
    expected = [
        _registered_by_hand(a.double().numpy(), b.double().numpy(), max_shift)
        for a, b in zip(images[:2], truth[:2], strict=True)
    ]
    assert found[:2].tolist() == pytest.approx(expected)
    assert (found[2] == 200) == (max_shift > 0)


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-4, 4), (0, 4), (1, 0)])
def test_registered_psnr_finds_the_shift_that_scikit_image_finds(shift):
    down, along = shift
    picture = _picture()[:, 100:, 200:]
    truth = picture[:, 10:42, 10:42]
    image = picture[:, 10 + down : 42 + down, 10 + along : 42 + along]
    image = (image + 0.02 * (_random(1, side=32)[0].double() - 0.5)).clamp(0, 1)
    offset, _, _ = phase_cross_correlation(
        image.mean(0).numpy(), truth.mean(0).numpy(), normalization=None
    )
    assert offset.tolist() == [-down, -along]
    moved = torch.roll(image, (down, along), dims=(1, 2))
    rows = slice(max(0, down), 32 + min(0, down))
    columns = slice(max(0, along), 32 + min(0, along))
    expected = reference.peak_signal_noise_ratio(
        truth[:, rows, columns].numpy(), moved[:, rows, columns].numpy(), data_range=1.0
    )
    found = metrics.registered_psnr(image[None], truth[None])
    assert found.item() == pytest.approx(expected, abs=1e-9)
    assert found.item() > 40


def test_registered_psnr_compares_an_image_with_its_own_truth_only():
    """breaching registers each image with the whole batch of true images."""
    truth = _random(3, side=16)
    images = truth.roll(1, dims=0)  # every image is another one's truth, exactly
    found = metrics.registered_psnr(images, truth)
    assert found.max() < 15
    alone = [
        metrics.registered_psnr(images[[i]], truth[[i]]).item()
        for i in range(len(truth))
    ]
    assert found.tolist() == pytest.approx(alone, rel=1e-12)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    side=st.integers(2, 12),
    noise=st.floats(0, 1),
)
def test_registering_never_lowers_the_psnr(seed, side, noise):
    truth = _random(2, 1, side, seed=seed)
    images = ((1 - noise) * truth + noise * _random(2, 1, side, seed=seed + 1)).float()
    plain = metrics.peak_signal_noise_ratio(images, truth)
    zero = metrics.registered_psnr(images, truth, max_shift=0)
    assert torch.equal(zero, plain)
    former = plain
    for max_shift in range(1, side):
        wider = metrics.registered_psnr(images, truth, max_shift=max_shift)
        assert (wider >= former).all()
        former = wider


def test_registered_psnr_mirrors_only_on_request():
    truth = _random(2, side=16)
    images = truth.flip(-1)
    images[1] = images[1].roll(1, dims=-2)
    assert metrics.registered_psnr(images, truth).max() < 15
    assert metrics.registered_psnr(images, truth, flip=True).tolist() == [200.0] * 2
    assert metrics.registered_psnr(truth, truth, flip=True).tolist() == [200.0] * 2


@pytest.mark.parametrize(("side", "reach"), [(7, 0), (8, 1), (16, 2), (32, 4), (64, 4)])
def test_registered_psnr_reaches_an_eighth_of_the_side_and_four_pixels(side, reach):
    whole = _random(1, 1, side + 5)
    truth = whole[..., :side, :side]
    for shift in range(6):
        image = whole[..., shift : shift + side, :side]
        found = metrics.registered_psnr(image, truth).item()
        assert (found == 200) == (shift <= reach)


@pytest.mark.parametrize("max_shift", [-1, 8, 1.5, True])
def test_registered_psnr_refuses_shifts_beyond_the_image(max_shift):
    truth = _random(1, side=8)
    with pytest.raises(InputError, match="max_shift: expected an integer of at "):
        metrics.registered_psnr(truth, truth, max_shift=max_shift)


@pytest.mark.parametrize(
    "metric",
    [
        metrics.mean_squared_error,
        metrics.peak_signal_noise_ratio,
        metrics.registered_psnr,
        metrics.structural_similarity,
    ],
)
def test_metrics_see_each_pair_alone_and_keep_float64(metric):
    images, truth = _random(3, seed=1).double(), _random(3, seed=2)
    together = metric(images, truth)
    assert together.dtype == torch.float64 and together.shape == (3,)
    for i in range(3):
        alone = metric(images[[i]], truth[[i]])
        assert together[i].item() == pytest.approx(alone.item(), rel=1e-12)
    assert metric(images[[2, 0, 1]], truth[[2, 0, 1]]).tolist() == pytest.approx(
        together[[2, 0, 1]].tolist(), rel=1e-12
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "expected 3 images, one for each true image, got 2"),
        (torch.zeros(3, 1, 8, 9), "images of shape \\(1, 8, 8\\) like the truth"),
        (torch.zeros(1, 8, 8), "add a batch axis with images\\[None\\]"),
        (torch.full((3, 1, 8, 8), math.inf), "got NaN or infinity in image 0"),
        (np.zeros((3, 1, 8, 8)), "expected images \\(N, C, H, W\\), got ndarray"),
    ],
)
def test_bad_pairs_are_refused(images, message):
    truth = torch.zeros(3, 1, 8, 8)
    for metric in (metrics.assign, metrics.registered_psnr, metrics.mean_squared_error):
        with pytest.raises(InputError, match=message):
            metric(images, truth)
