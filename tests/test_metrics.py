"""Metrics agree with scikit-image, share one assignment, and carry their floors."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from skimage import metrics as reference

from gradinv_helpers import metrics
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError


def _random(count=4, channels=3, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator)


def _images(pixels, labels=None):
    labels = torch.arange(len(pixels)) if labels is None else labels
    names = tuple(map(str, range(int(labels.max()) + 2)))
    return Images(pixels, labels, names)


def _found(pixels, labels=None):
    labels = torch.arange(len(pixels)) if labels is None else labels
    return SimpleNamespace(images=pixels, labels=labels)


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


def test_psnr_is_per_image_not_of_the_batch():
    truth = _random(2)
    images = torch.stack([truth[0], 0.5 * truth[1]])  # one image is exact
    score = metrics.score(_found(images), _images(truth))
    error = (images[1] - truth[1]).double().square().mean().item()
    assert score.psnr == pytest.approx((200.0, -10 * math.log10(error)))


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


def test_one_reconstruction_cannot_serve_two_true_images():
    truth = torch.stack([torch.full((1, 8, 8), v) for v in (0.4, 0.6)])
    images = torch.stack([torch.full((1, 8, 8), v) for v in (0.5, 0.0)])
    score = metrics.score(_found(images), _images(truth))
    # 0.5 is nearest to both; a best match per image would score 20 dB twice.
    assert sorted(score.assignment) == [0, 1]
    assert min(score.psnr) < 10


def test_every_metric_uses_the_same_assignment():
    truth = torch.zeros(2, 1, 8, 8)
    truth[0, 0, ::2], truth[1, 0, :, ::2] = 1.0, 1.0  # stripes across and down
    # Nearest in MSE is the faint right stripe; SSIM and the labels prefer the other.
    near = 0.5 + 0.02 * (truth - 0.5)
    far = torch.stack([near[0] * 0 + 0.5, truth[1]])
    score = metrics.score(
        _found(torch.stack([far[1], near[1]]), torch.tensor([0, 1])), _images(truth)
    )
    order = list(score.assignment)
    assert order == [1, 0]
    images = torch.stack([far[1], near[1]])[order]
    assert score.label_correct == (False, False)
    assert score.ssim == pytest.approx(
        tuple(metrics.structural_similarity(images, truth).tolist())
    )
    assert score.mse == pytest.approx(
        tuple(metrics.mean_squared_error(images, truth).tolist())
    )


def test_scores_do_not_depend_on_the_order_of_the_reconstruction():
    truth, labels = _random(5), torch.tensor([3, 1, 2, 0, 4])
    images = (truth + 0.05 * _random(5, seed=9)).clamp(0, 1)
    order = torch.tensor([4, 2, 0, 1, 3])
    one = metrics.score(_found(images, labels), _images(truth, labels))
    two = metrics.score(_found(images[order], labels[order]), _images(truth, labels))
    assert one.assignment != two.assignment
    assert one.mse == two.mse and one.psnr == two.psnr and one.ssim == two.ssim
    assert two.label_correct == (True,) * 5 and two.label_accuracy == 1.0


def test_score_takes_images_as_a_reconstruction():
    truth = _images(_random(3))
    score = metrics.score(truth, truth)
    assert score.psnr == (200.0,) * 3 and score.label_accuracy == 1.0


def test_constant_floor_is_the_best_constant_image():
    truth = _random(3)
    floor = metrics.score(_found(truth), _images(truth)).floors["constant"]
    for index, image in enumerate(truth.double()):
        colour = image.mean(dim=(1, 2), keepdim=True)
        best = (image - colour).square().mean().item()
        assert floor.mse[index] == pytest.approx(best)
        for shift in (-0.05, 0.01, 0.1):
            other = (image - colour - shift).square().mean().item()
            assert other > floor.mse[index]
    assert floor.label_correct is None and floor.label_accuracy is None


def test_random_image_floor_of_a_batch_averages_the_other_true_images():
    truth, labels = _random(3), torch.tensor([0, 0, 1])
    floor = metrics.score(_found(truth, labels), _images(truth, labels)).floors
    others = [
        metrics.peak_signal_noise_ratio(truth[i].expand(2, -1, -1, -1), truth[rest])
        for i, rest in enumerate([[1, 2], [0, 2], [0, 1]])
    ]
    expected = [pair.mean().item() for pair in others]
    assert floor["random_image"].psnr == pytest.approx(expected)
    assert floor["random_image"].label_correct == (0.5, 0.5, 0.0)


def test_random_image_floor_from_a_pool_leaves_the_true_image_out():
    digits = load_images("digits", split="test")
    truth = digits[[5]]
    score = metrics.score(_found(truth.pixels, truth.labels), truth, others=digits)
    floor = score.floors["random_image"]
    assert floor.psnr[0] < 40
    assert 0 <= floor.label_correct[0] < 0.6
    assert "batch_mean" not in score.floors
    assert "random_image" not in metrics.score(truth, truth).floors
    with pytest.raises(InputError, match="others: expected at least one image that"):
        metrics.score(truth, truth, others=truth)


def test_random_image_floor_depends_on_the_seed_alone():
    digits = load_images("digits", split="test")
    truth = digits[[5, 7]]
    floors = [
        metrics.score(truth, truth, others=digits, seed=seed).floors["random_image"]
        for seed in (0, 0, 1)
    ]
    assert floors[0] == floors[1] != floors[2]


def test_random_images_get_the_same_assignment_as_a_reconstruction():
    truth = _random(2)
    pool = _images((truth.flip(0) + 1e-3).clamp(0, 1))  # the truth, in the other order
    floor = metrics.score(_found(truth), _images(truth), others=pool).floors
    assert min(floor["random_image"].psnr) > 50


def test_batch_mean_floor_shows_the_mean_for_everybody():
    truth = _random(4)
    floor = metrics.score(_found(truth), _images(truth)).floors["batch_mean"]
    mean = truth.mean(dim=0, keepdim=True).expand_as(truth)
    expected = metrics.mean_squared_error(mean, truth)
    assert floor.mse == pytest.approx(expected.tolist())


def test_judge_metrics():
    truth = torch.zeros(2, 3, 8, 8)
    truth[0, 0], truth[1, 1] = 1.0, 1.0
    judge = _Judge()
    score = metrics.score(
        _found(truth.flip(0), torch.tensor([1, 0])), _images(truth), judge=judge
    )
    assert score.feature_similarity == pytest.approx((1.0, 1.0))
    assert score.class_correct == (True, True) and score.class_accuracy == 1.0
    assert score.floors["batch_mean"].class_correct == (1.0, 0.0)
    assert score.floors["random_image"].feature_similarity[0] < 0.01
    plain = metrics.score(_found(truth), _images(truth))
    assert plain.feature_similarity is None and plain.class_accuracy is None
    hits = metrics.class_accuracy(truth, torch.tensor([0, 0]), judge=judge)
    assert hits.tolist() == [1.0, 0.0]


def test_summary_and_gains():
    truth = _random(3)
    images = (truth + 0.1).clamp(0, 1)
    score = metrics.score(_found(images), _images(truth), judge=_Judge())
    summary = score.summary()
    assert summary["images"] == 3
    assert summary["psnr"]["min"] == min(score.psnr)
    assert summary["mse"]["median"] == sorted(score.mse)[1]
    assert summary["label_accuracy"] == 1.0
    best = max(floor["psnr"] for floor in summary["floors"].values())
    assert summary["gains"]["psnr"] == pytest.approx(summary["psnr"]["mean"] - best)
    assert summary["gains"]["mse"] > 0 and summary["gains"]["psnr"] > 0


def test_a_floor_has_no_gain_over_itself():
    truth = _random(3)
    constant = truth.mean(dim=(2, 3), keepdim=True).expand_as(truth)
    score = metrics.score(_found(constant), _images(truth))
    assert score.summary()["gains"]["psnr"] <= 1e-6


def test_to_dict_is_plain_json_and_the_same_each_time():
    truth = _random(3, side=6)  # too small for SSIM
    images = (truth + 0.1 * _random(3, side=6, seed=5)).clamp(0, 1)
    texts = [
        json.dumps(
            metrics.score(_found(images), _images(truth), seed=3).to_dict(),
            allow_nan=False,
        )
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    values = json.loads(texts[0])
    assert values["per_image"]["ssim"] is None
    assert values["per_image"]["label_correct"] == [True] * 3
    assert values["floors"]["constant"]["label_correct"] is None
    assert set(values["summary"]["floors"]) == {
        "constant",
        "random_image",
        "batch_mean",
    }
    assert all(len(f"{v:.10g}") <= 12 for v in values["per_image"]["mse"])


def test_table_names_every_floor_and_metric():
    truth = _random(2)
    score = metrics.score(_found(truth), _images(truth), judge=_Judge())
    text = str(score)
    for word in (
        "PSNR (dB)",
        "SSIM",
        "labels right",
        "constant",
        "random_image",
        "200.0",
    ):
        assert word in text
    assert repr(score) == text and len(text.splitlines()) == 8
    assert "psnr=" in repr(score.floors["constant"])
    assert "1 image;" in str(metrics.score(_images(truth[:1]), _images(truth[:1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:2], "images: expected 3 images, one for each true image, got 2"),
        (lambda x: x[:, :1], "expected images of shape \\(3, 16, 16\\) like the truth"),
        (lambda x: x[0], "add a batch axis with images\\[None\\]"),
        (lambda x: x * float("nan"), "expected finite pixels, got NaN or infinity in"),
        (lambda x: 255 * x, "expected pixels in \\[0, 1\\], got .* undo the normalis"),
        (lambda x: x.numpy(), "expected images \\(N, C, H, W\\), got NoneType"),
    ],
)
def test_bad_images_are_refused(change, message):
    truth = _random(3)
    wrong = SimpleNamespace(
        images=change(truth), labels=torch.arange(len(change(truth)))
    )
    with pytest.raises(InputError, match=message):
        metrics.score(wrong, _images(truth))


def test_bad_labels_and_pools_are_refused():
    truth = _random(3)
    with pytest.raises(InputError, match="reconstruction.labels: expected class ind"):
        metrics.score(_found(truth, torch.arange(2)), _images(truth))
    with pytest.raises(InputError, match="others: expected images of shape"):
        metrics.score(_found(truth), _images(truth), others=_images(_random(3, side=8)))
    with pytest.raises(InputError, match="labels: expected shape"):
        metrics.class_accuracy(truth, torch.arange(2), judge=_Judge())


def test_scoring_leaves_the_global_random_state_alone():
    truth = _images(_random(3))
    state = torch.random.get_rng_state()
    metrics.score(truth, truth)
    assert torch.equal(state, torch.random.get_rng_state())
