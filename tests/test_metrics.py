"""All metrics of a score share one assignment and carry their floors."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binomtest

from gradinv_helpers import metrics
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.intervals import bootstrap_interval


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


def test_psnr_is_per_image_not_of_the_batch():
    truth = _random(2)
    images = torch.stack([truth[0], 0.5 * truth[1]])  # one image is exact
    score = metrics.score(_found(images), _images(truth))
    error = (images[1] - truth[1]).double().square().mean().item()
    assert score.psnr == pytest.approx((200.0, -10 * math.log10(error)))
    assert score.summary()["psnr"]["mean"] == pytest.approx(sum(score.psnr) / 2)
    assert max(score.registered_psnr) == 200.0
    json.dumps(score.to_dict(), allow_nan=False)


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
    rows = [line.split("  ")[0] for line in text.splitlines()]
    assert rows[1:-1] == [
        "MSE",
        "PSNR (dB)",
        "SSIM",
        "recovered (30 dB)",
        "labels right",
        "feature cosine",
        "class right",
    ]
    for word in ("constant", "random_image", "batch_mean", "200.0"):
        assert word in text
    assert repr(score) == text
    assert "chance" not in text
    assert "recovered (12.5 dB)" in score.table(threshold_db=12.5)
    assert "psnr=" in repr(score.floors["constant"])
    assert "1 image;" in str(metrics.score(_images(truth[:1]), _images(truth[:1])))


def test_table_shows_what_is_known_and_no_more():
    digits = load_images("digits", split="test")
    truth = digits[[3, 8]]
    text = str(metrics.score(truth, truth, others=digits))
    assert "identified " in text and text.endswith("identified by chance: 1 of 360")
    assert "PSNR, shifted (dB)" not in text
    moved = truth.pixels.roll(1, dims=-1)
    shifted = str(metrics.score(_found(moved, truth.labels), truth))
    assert "PSNR, shifted (dB)" in shifted and "identified" not in shifted
    assert max(map(len, shifted.splitlines())) < 100


# --- recovered ----------------------------------------------------------------------


def _at_decibels(truth, levels):
    """Images whose errors are constants, so that their PSNR has the given levels."""
    errors = torch.tensor([10 ** (-level / 20) for level in levels])
    return 0.4 * truth + errors[:, None, None, None], 0.4 * truth


def test_recovered_counts_the_images_that_reach_the_threshold():
    images, truth = _at_decibels(_random(4).double(), [10, 20, 29.9, 30.1])
    score = metrics.score(_found(images), _images(truth))
    assert score.psnr == pytest.approx((10, 20, 29.9, 30.1), abs=1e-3)
    assert score.recovered() == 0.25
    assert [score.recovered(threshold_db=t) for t in (0, 19, 29, 40)] == [
        *(1.0, 0.75, 0.5, 0.0)
    ]
    summary = score.summary()
    assert summary["recovered"] == 0.25 and summary["recovered_threshold_db"] == 30
    assert score.summary(threshold_db=19)["recovered"] == 0.75
    assert summary["gains"]["recovered"] == 0.25


def test_recovered_of_a_floor_is_the_share_over_its_draws():
    truth = _images(
        torch.tensor([0.0, 0.01, 0.5])[:, None, None, None].expand(3, 1, 8, 8)
    )
    floor = metrics.score(truth, truth).floors["random_image"]
    # Of the other two images one is at 40 dB for the first two, none for the third;
    # the mean PSNR of both draws is below 30 dB for all.
    assert max(floor.psnr) < 30
    assert floor.recovered(threshold_db=30) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert len(floor.psnr_draws) == 2
    flat = metrics.score(truth, truth).floors["constant"]
    assert flat.recovered() == 1.0  # flat images need no attack


def test_recovered_above_floor_asks_for_more_than_the_best_guess():
    truth = _random(1)
    constant = truth.double().mean(dim=(2, 3), keepdim=True)
    for kept, margin in [(0.0, 0.0), (0.5, 6.02), (0.69, 10.17), (0.9, 20.0)]:
        # What is left of the floor's squared error is the square of what is not kept.
        images = constant + kept * (truth.double() - constant)
        score = metrics.score(_found(images), _images(truth))
        assert list(score.floors) == ["constant"]
        gain = score.psnr[0] - score.floors["constant"].psnr[0]
        assert gain == pytest.approx(margin, abs=0.01)
        assert score.recovered_above_floor() == float(margin > 10)
        assert score.recovered_above_floor(margin_db=margin + 0.1) == 0.0
        if margin:
            assert score.recovered_above_floor(margin_db=margin - 0.1) == 1.0
        summary = score.summary()
        assert summary["recovered_above_floor"] == float(margin > 10)
        assert summary["recovered_margin_db"] == 10


def test_the_best_floor_is_chosen_for_each_image():
    flat = torch.full((1, 1, 16, 16), 0.5)
    truth = torch.cat([flat, _random(1, 1), flat + 0.01, _random(1, 1, seed=1)])
    images = (truth + 0.03).clamp(0, 1)
    score = metrics.score(_found(images), _images(truth))
    expected = [
        value - max(floor.psnr[i] for floor in score.floors.values())
        for i, value in enumerate(score.psnr)
    ]
    assert min(expected) < 0 < max(expected)
    for margin in (0.0, 5.0, 15.0):
        share = sum(value >= margin for value in expected) / 4
        assert score.recovered_above_floor(margin_db=margin) == share


def test_a_flat_image_is_not_recovered_above_its_floor():
    truth = _images(torch.full((1, 1, 8, 8), 0.3))
    score = metrics.score(_found(truth.pixels + 1e-4), truth)
    assert score.recovered() == 1.0 and score.recovered_above_floor() == 0.0


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "30"])
def test_bad_thresholds_are_refused(value):
    score = metrics.score(_images(_random(1)), _images(_random(1)))
    for call in (score.recovered, score.summary, score.table, score.means):
        with pytest.raises(InputError, match="threshold_db: expected a finite number"):
            call(threshold_db=value)
    with pytest.raises(InputError, match="margin_db: expected a finite number"):
        score.recovered_above_floor(margin_db=value)


# --- registered PSNR, identification and intervals in a score ------------------------


def test_registered_psnr_uses_the_assignment_and_has_floors():
    truth = _random(3, side=16)
    moved = truth.roll(1, dims=-2)
    score = metrics.score(_found(moved[[2, 0, 1]]), _images(truth))
    order = torch.tensor(score.assignment)
    paired = metrics.registered_psnr(moved[[2, 0, 1]][order], truth)
    assert score.registered_psnr == pytest.approx(tuple(paired.tolist()))
    for name, floor in score.floors.items():
        pairs = zip(floor.registered_psnr, floor.psnr, strict=True)
        assert all(shifted >= plain for shifted, plain in pairs), name
    colour = truth.mean(dim=(2, 3), keepdim=True).expand_as(truth)
    expected = metrics.registered_psnr(colour, truth)
    found = score.floors["constant"].registered_psnr
    assert found == pytest.approx(tuple(expected.tolist()))


def test_identified_counts_the_nearest_neighbours_with_floors_and_chance():
    digits = load_images("digits", split="test")
    truth = digits[[0, 10, 20, 30]]
    images = 0.8 * truth.pixels + 0.1
    images[1] = digits.pixels[200]  # looks like another person's image
    score = metrics.score(_found(images.flip(0)), truth, others=digits)
    assert score.identified == (True, False, True, True)
    assert score.identification.ranks[1] > 1
    assert [rank == 1 for rank in score.identification.ranks] == list(score.identified)
    summary = score.summary()
    assert summary["identified"] == 0.75
    assert summary["identified_by_chance"] == pytest.approx(1 / 360)
    for name in ("constant", "batch_mean"):
        expected = tuple(float(r == 1) for r in score.identification.floors[name])
        assert score.floors[name].identified == expected
    assert score.floors["random_image"].identified == (0.0,) * 4
    best = max(floor["identified"] for floor in summary["floors"].values())
    assert summary["gains"]["identified"] == 0.75 - max(best, 1 / 360)
    values = score.to_dict()
    assert values["identification"]["ranks"] == list(score.identification.ranks)
    assert values["identification"]["pool_size"] == 360
    assert values["per_image"]["identified"] == [True, False, True, True]


def test_a_drawn_image_is_its_own_nearest_neighbour():
    """The random_image floor identifies nobody, whoever is asked."""
    digits = load_images("digits", split="test")
    truth = digits[[0, 1]]
    guess = digits[[2, 3]]
    score = metrics.score(guess, truth, others=digits)
    assert score.identified == score.floors["random_image"].identified == (0, 0)


def test_without_others_nothing_is_identified_or_claimed():
    truth = _images(_random(3))
    score = metrics.score(truth, truth)
    assert score.identified is None and score.identification is None
    summary = score.summary()
    assert "identified" not in summary and "identified" not in summary["gains"]
    values = score.to_dict()
    assert values["identification"] is None
    assert values["per_image"]["identified"] is None


def test_every_metric_has_a_value_in_every_floor():
    digits = load_images("digits", split="test")
    truth = digits[[3, 8, 11]]
    score = metrics.score(truth, truth, others=digits)
    for floor in score.floors.values():
        missing = set(score.means()) - set(floor.means())
        assert missing <= {"label_accuracy"}
    assert set(score.means()) == set(score.summary()["gains"])


def test_intervals_come_on_request():
    truth = _random(9)
    noise = 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    images = (truth + noise * torch.arange(9)[:, None, None, None]).clamp(0, 1)
    score = metrics.score(_found(images), _images(truth))
    plain, full = score.summary(), score.summary(intervals=True)
    assert plain == {k: v for k, v in full.items() if k != "intervals"}
    assert full == score.summary(intervals=True)
    low, high = full["intervals"]["psnr"]
    assert min(score.psnr) < low < full["psnr"]["mean"] < high < max(score.psnr)
    assert full["intervals"]["psnr"] == bootstrap_interval(score.psnr)
    right = full["intervals"]["label_accuracy"]
    assert right == pytest.approx(tuple(binomtest(9, 9).proportion_ci(method="wilson")))
    found = round(9 * score.recovered(threshold_db=20))
    assert 0 < found < 9
    expected = binomtest(found, 9).proportion_ci(method="wilson")
    share = score.summary(threshold_db=20, intervals=True)["intervals"]["recovered"]
    assert share == pytest.approx(tuple(expected))


def test_few_images_have_no_interval_of_a_mean():
    truth = _images(_random(7))
    intervals = metrics.score(truth, truth).summary(intervals=True)["intervals"]
    assert intervals["psnr"] is None and intervals["ssim"] is None
    assert intervals["label_accuracy"][0] == pytest.approx(7 / (7 + 1.96**2), abs=1e-3)


# --- bad input ----------------------------------------------------------------------


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
