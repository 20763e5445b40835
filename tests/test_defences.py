"""Defences do what they state, and give way to the attack that reads it."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.unmixing import mixing_weights, unmix
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import (
    GaussianNoise,
    Sign,
    StochasticQuantisation,
    TopK,
    defend,
    mixup_update,
    soteria_update,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.gaussian import ImagePrior, fit_gaussian
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update


@pytest.fixture(scope="module")
def update() -> SharedUpdate:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=4)
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return local_update(model, Images(pixels, torch.tensor([1, 3]), tuple("abcd")))


def difference(one: SharedUpdate, other: SharedUpdate) -> torch.Tensor:
    return torch.cat(
        [(other.tensors[n] - t).flatten().double() for n, t in one.tensors.items()]
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_absolute_noise(update: SharedUpdate) -> None:
    noisy = defend(update, GaussianNoise(0.02), generator=seeded())
    noise = difference(update, noisy)
    assert float(noise.std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(noise.mean())) < 4 * 0.02 / math.sqrt(len(noise))
    assert noisy.noise_std == 0.02
    kurtosis = float((noise / noise.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3, abs=0.2)  # Gaussian, not Laplace (6)


def test_relative_noise_is_a_share_of_the_norm(update: SharedUpdate) -> None:
    noisy = defend(update, GaussianNoise(0.1, relative=True), generator=seeded())
    entries = sum(t.numel() for t in update.tensors.values())
    norm = math.sqrt(sum(float(t.square().sum()) for t in update.tensors.values()))
    assert float(difference(update, noisy).norm()) == pytest.approx(
        0.1 * norm, rel=0.03
    )
    assert noisy.noise_std == pytest.approx(0.1 * norm / math.sqrt(entries))


def test_noise_does_not_depend_on_the_layer(update: SharedUpdate) -> None:
    noisy = defend(update, GaussianNoise(0.5), generator=seeded())
    weight = noisy.tensors["1.weight"] - update.tensors["1.weight"]
    bias = noisy.tensors["1.bias"] - update.tensors["1.bias"]
    assert float(weight.std()) == pytest.approx(0.5, rel=0.05)
    assert float(bias.std()) == pytest.approx(0.5, rel=0.2)
    assert not torch.equal(weight[0, :4], bias[:4])


def test_noise_of_two_defences_adds_up_in_variance(update: SharedUpdate) -> None:
    noisy = defend(update, GaussianNoise(0.03), GaussianNoise(0.04), generator=seeded())
    assert noisy.noise_std == pytest.approx(0.05)
    assert float(difference(update, noisy).std()) == pytest.approx(0.05, rel=0.03)


def test_generator_decides(update: SharedUpdate) -> None:
    def once(seed: int) -> torch.Tensor:
        noisy = defend(update, GaussianNoise(1.0), generator=seeded(seed))
        return difference(update, noisy)

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))
    torch.manual_seed(3)
    first = defend(update, GaussianNoise(1.0))
    assert not torch.equal(once(1), difference(update, first))
    torch.manual_seed(3)
    again = defend(update, GaussianNoise(1.0))
    assert torch.equal(first.tensors["1.bias"], again.tensors["1.bias"])


def test_global_random_state_is_left_alone(update: SharedUpdate) -> None:
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    defend(update, GaussianNoise(1.0), generator=seeded())
    assert torch.equal(torch.rand(2), expected)


def test_no_defence_and_no_noise_change_nothing(update: SharedUpdate) -> None:
    assert defend(update) is update
    quiet = defend(update, GaussianNoise(0.0))
    assert float(difference(update, quiet).abs().max()) == 0
    assert quiet.noise_std == 0


def test_the_update_itself_is_left_as_it_was(update: SharedUpdate) -> None:
    before = update.tensors["1.bias"].clone()
    defend(update, GaussianNoise(1.0), generator=seeded())
    assert torch.equal(update.tensors["1.bias"], before)
    assert update.noise_std == 0


def test_defences_run_in_order_with_the_same_generator(update: SharedUpdate) -> None:
    calls = []

    def named(name: str):
        def defence(update, *, generator):
            calls.append((name, generator))
            return update

        return defence

    generator = seeded()
    defend(update, named("first"), named("second"), generator=generator)
    assert calls == [("first", generator), ("second", generator)]


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf"), "0.1", None])
def test_bad_noise(std) -> None:
    with pytest.raises(InputError, match="std: expected a finite number >= 0, got"):
        GaussianNoise(std)


# --- pruning ----------------------------------------------------------------------


def flat(update: SharedUpdate) -> torch.Tensor:
    return torch.cat([t.flatten() for t in update.tensors.values()])


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.3, 1.0])
def test_the_largest_entries_are_sent(update: SharedUpdate, share: float) -> None:
    pruned = defend(update, TopK(share))
    before, after = flat(update), flat(pruned)
    sent = after != 0
    count = max(1, round(share * len(before)))
    assert count - int((before == 0).sum()) <= int(sent.sum()) <= count
    assert torch.equal(after[sent], before[sent])
    (bound,) = set(pruned.encoding.scales.values())
    assert bound == float(before.abs().sort(descending=True).values[count - 1])
    assert set(pruned.encoding.scales) == set(update.tensors)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, "all"])
def test_bad_share(share) -> None:
    with pytest.raises(InputError, match="share: expected a"):
        TopK(share)


# --- signs and few bits -------------------------------------------------------------


def test_signs_with_their_mean_magnitude(update: SharedUpdate) -> None:
    signs = defend(update, Sign())
    for name, tensor in update.tensors.items():
        scale = float(tensor.abs().mean())
        assert signs.encoding.scales[name] == pytest.approx(scale)
        expected = torch.where(tensor < 0, -scale, scale)
        torch.testing.assert_close(signs.tensors[name], expected)
    assert float((flat(update) == 0).sum()) > 0  # of dead units, sent as positive


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_levels_and_step(update: SharedUpdate, bits: int) -> None:
    sent = defend(update, StochasticQuantisation(bits), generator=seeded())
    levels = 2 ** (bits - 1) - 1
    for name, tensor in update.tensors.items():
        step = sent.encoding.scales[name]
        assert step * levels == pytest.approx(float(tensor.abs().max()))
        counts = sent.tensors[name] / step
        assert int(counts.abs().round().max()) == levels  # the largest entry is exact
        assert float((counts - counts.round()).abs().max()) < 1e-4
        assert float((sent.tensors[name] - tensor).abs().max()) <= step * (1 + 1e-5)


def test_rounding_is_right_on_average(update: SharedUpdate) -> None:
    """Mean and variance of each entry, within five of their standard errors."""
    generator, draws = seeded(), 400
    total, squares = torch.zeros(2, len(flat(update)), dtype=torch.float64)
    for _ in range(draws):
        sent = defend(update, StochasticQuantisation(3), generator=generator)
        total += flat(sent).double()
        squares += flat(sent).double().square()
    steps = torch.cat(
        [
            torch.full((t.numel(),), sent.encoding.scales[name], dtype=torch.float64)
            for name, t in update.tensors.items()
        ]
    )
    mean, exact = total / draws, flat(update).double()
    parts = (exact.abs() / steps) % 1
    variance = parts * (1 - parts) * steps.square()
    errors = (mean - exact).abs() / (variance / draws).sqrt().clamp_min(1e-6 * steps)
    assert float(errors.max()) < 6
    found = float((squares / draws - exact.square()).sum() / variance.sum())
    assert found == pytest.approx(1, abs=0.02)


def test_generator_rounds(update: SharedUpdate) -> None:
    once, again, other = (
        flat(defend(update, StochasticQuantisation(4), generator=seeded(s)))
        for s in (1, 1, 2)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@pytest.mark.parametrize("bits", [1, 17, 2.0])
def test_bad_bits(bits) -> None:
    with pytest.raises(InputError, match="bits: expected an integer of at"):
        StochasticQuantisation(bits)


# --- what the client computes ---------------------------------------------------------


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Sigmoid(), nn.Linear(6, 4))


def small_images(count: int = 3) -> Images:
    pixels = torch.rand(count, 1, 4, 4, generator=seeded(2))
    return Images(pixels, torch.arange(count), tuple("abcd"))


def test_soteria_hides_the_columns_that_tell_most() -> None:
    model, images = two_layers(), small_images()
    update = soteria_update(model, images, share=0.5, layer="3")
    plain = local_update(model, images)
    scores = torch.zeros(6)
    for pixels in images.pixels:  # the Jacobian of the representation by hand
        r = torch.sigmoid(model[1](pixels.flatten()))
        jacobian = (r * (1 - r))[:, None] * model[1].weight
        scores += (r / jacobian.norm(dim=1)).detach()
    hidden = scores.topk(3).indices
    missing = update.tensors["3.weight"] == 0
    assert sorted(missing.all(0).nonzero()[:, 0].tolist()) == sorted(hidden.tolist())
    for name, tensor in plain.tensors.items():
        same = update.tensors[name] == tensor
        assert bool((same | (missing if name == "3.weight" else same)).all())
    assert dict(update.encoding.scales) == {"3.weight": math.inf}
    assert soteria_update(model, images, share=0.0).encoding is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"share": 1.0}, "share: expected a number of at least 0 and below 1"),
        ({"share": 0.5, "layer": "2"}, "layer: expected one of '1', '3', got '2'"),
        (
            {"share": 0.5, "training": LocalTraining(sends="delta")},
            "training.sends: expected 'gradient'",
        ),
    ],
)
def test_bad_soteria(asked: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        soteria_update(two_layers(), small_images(), **asked)


def test_mixup_is_the_gradient_of_mixed_images_and_labels() -> None:
    """Two images have one way to be paired; the weight follows from the update."""
    model, images = two_layers(), small_images(2)
    update = mixup_update(model, images, alpha=2.0, generator=seeded(4))
    assert update.encoding.kind == "mixed"
    assert update.num_samples == 2

    def gap(weight: float) -> float:
        pixels = weight * images.pixels + (1 - weight) * images.pixels.flip(0)
        hard = F.one_hot(images.labels, 4).float()
        soft = weight * hard + (1 - weight) * hard.flip(0)
        loss = F.cross_entropy(model(pixels), soft)
        found = torch.autograd.grad(loss, list(model.parameters()))
        pairs = zip(found, update.tensors.values(), strict=True)
        return float(sum((a - b).square().sum() for a, b in pairs))

    gaps = [gap(k / 200) for k in range(101, 200)]
    assert min(gaps) < 1e-4 * max(gaps)


def test_no_image_is_mixed_with_itself(monkeypatch) -> None:
    """With a weight of zero every image is its partner: a cycle through all of them."""
    from gradinv_helpers.defences import mixing

    monkeypatch.setattr(mixing, "_beta", lambda alpha, generator: 0.0)
    seen = []

    def caught(model, images, training=None, *, seed=None):
        seen.append(images)
        return local_update(model, images)

    monkeypatch.setattr(mixing, "local_update", caught)
    images = small_images(4)
    mixup_update(two_layers(), images, generator=seeded())
    order = [
        int((images.pixels - p).abs().sum((1, 2, 3)).argmin()) for p in seen[0].pixels
    ]
    assert sorted(order) == [0, 1, 2, 3]
    assert all(a != b for a, b in enumerate(order))
    assert seen[1].labels.tolist() == order


def test_mixing_weights_are_beta() -> None:
    """Mean and variance of Beta(a, a): 1/2 and 1 / (4 (2 a + 1))."""
    from gradinv_helpers.defences.mixing import _beta

    generator = seeded()
    drawn = torch.tensor([_beta(0.4, generator) for _ in range(4000)])
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(drawn.var()) == pytest.approx(1 / (4 * 1.8), rel=0.06)


@pytest.mark.parametrize(("count", "alpha"), [(1, 1.0), (2, 0.0), (2, -1.0)])
def test_bad_mixup(count: int, alpha: float) -> None:
    with pytest.raises(InputError, match="images: expected|alpha: expected"):
        mixup_update(two_layers(), small_images(count), alpha=alpha)


# --- every defence with its adaptive attack ---------------------------------------


@functools.cache
def digits(split: str) -> Images:
    return load_images("digits", split=split)


@functools.cache
def prior() -> ImagePrior:
    return fit_gaussian(digits("train").pixels, form="covariance")


def lenet() -> nn.Module:
    return build_model("lenet", in_channels=1, image_size=8, num_classes=10)


def gains(images: torch.Tensor, found, truth: Images) -> list[float]:
    """PSNR of every image above the best of its floors, in dB."""
    result = score(dataclasses.replace(found, images=images), truth)
    floors = zip(*(floor.psnr for floor in result.floors.values()), strict=True)
    return [psnr - max(low) for psnr, low in zip(result.psnr, floors, strict=True)]


DEFENDED = {
    "top-k": TopK(0.1),
    "sign": Sign(),
    "2 bits": StochasticQuantisation(2),
    "4 bits": StochasticQuantisation(4),
}


@pytest.mark.parametrize("name", [*DEFENDED, "Soteria"])
def test_adaptive_attack_beats_the_naive_one_and_the_floor(name: str) -> None:
    truth = digits("test")[[5]]
    if name == "Soteria":
        update = soteria_update(lenet(), truth, share=0.8)
    else:
        plain = local_update(lenet(), truth)
        update = defend(plain, DEFENDED[name], generator=seeded())
    naive = dataclasses.replace(update, encoding=None)
    adaptive, blind = (
        invert(u, attack=a, prior=prior(), iterations=8)
        for u, a in ((update, "auto"), (naive, "gaussian-map"))
    )
    assert adaptive.attack == "gaussian-map"
    assert f"{update.encoding.kind} messages" in adaptive.reason
    assert adaptive.labels.tolist() == truth.labels.tolist()
    (gain,), (blind_gain,) = (gains(r.images, r, truth) for r in (adaptive, blind))
    assert gain > 4
    assert gain > blind_gain + 2


def test_a_change_of_weights_is_read_like_a_gradient() -> None:
    truth = digits("test")[[5]]
    training = LocalTraining(sends="delta", lr=0.1)
    update = defend(local_update(lenet(), truth, training), Sign())
    found = invert(update, prior=prior(), iterations=8)
    assert gains(found.images, found, truth)[0] > 4


def test_mixtures_come_back_with_their_labels_and_are_taken_apart() -> None:
    pool = digits("test")
    truth = pool[[int((pool.labels == k).nonzero()[0]) for k in (3, 8)]]
    update = mixup_update(lenet(), truth, generator=seeded(4))
    estimate = map_estimate(update, prior=prior(), iterations=20, last_level=1e-4)
    found = estimate.reconstruction
    blind = map_estimate(
        dataclasses.replace(update, encoding=None),
        prior=prior(),
        iterations=20,
        last_level=1e-4,
    )
    weights = mixing_weights(estimate.label_shares)
    apart = unmix(found.images, weights).clamp(0, 1)
    unmixed = min(gains(apart, found, truth))
    assert unmixed > 6
    for mixtures in (found, blind.reconstruction):
        assert unmixed > 3 + min(gains(mixtures.images, mixtures, truth))


def test_encoded_updates_are_refused_by_what_takes_them_at_face_value() -> None:
    update = defend(local_update(lenet(), digits("test")[[5]]), Sign())
    for attack in ("dlg", "exact"):
        with pytest.raises(InputError, match="gradient as it was computed, got one"):
            invert(update, attack=attack, iterations=1)
