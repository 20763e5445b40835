"""Noise has the size that it states."""

from __future__ import annotations

import math

import pytest
import torch

from gradinv_helpers.data import Images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import SharedUpdate, local_update


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
