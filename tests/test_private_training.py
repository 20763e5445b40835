"""DP-SGD: sampling, noise, cost and what an observer sees belong together."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model
from gradinv_helpers.privacy import epsilon_spent
from gradinv_helpers.private_training import PrivateTraining, train_private
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

LEVEL = 1e-3
BOUND, NOISE = 0.5, 2.0


def two_classes(count: int, seed: int = 0) -> Images:
    """Bright on the left or on the right, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = 0.3 * torch.rand(count, 1, 4, 4, generator=generator)
    pixels[labels == 0, :, :, :2] += 0.6
    pixels[labels == 1, :, :, 2:] += 0.6
    return Images(pixels, labels, ("left", "right"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("mlp", in_channels=1, image_size=4, num_classes=2)


def train(model: nn.Module, **changes: object) -> PrivateTraining:
    asked = {
        "clip_norm": BOUND,
        "noise_multiplier": NOISE,
        "sample_rate": 0.5,
        "steps": 6,
        "lr": 0.1,
        "optimiser": "sgd",
    }
    return train_private(
        model, two_classes(40), two_classes(30, 1), **(asked | changes)
    )


def flat(update: SharedUpdate) -> Tensor:
    return torch.cat([t.flatten().double() for t in update.tensors.values()])


def residual(update: SharedUpdate, members: Tensor, images: Images) -> Tensor:
    recipe = LocalTraining(clip_norm=BOUND)
    clean = local_update(update.model, images[members], recipe)
    return flat(update) - flat(clean)


def test_it_learns_with_little_noise(model: nn.Module) -> None:
    found = train(model, noise_multiplier=0.2, steps=40, optimiser="momentum")
    assert found.accuracy > 0.95
    assert found.epsilon > 10


def test_noise_drowns_everything(model: nn.Module) -> None:
    found = train(model, noise_multiplier=500.0, steps=5, accountant="prv")
    assert found.epsilon < 0.1
    assert found.accuracy < 0.95


@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_the_model_given_is_left_alone(model: nn.Module, optimiser: str) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    found = train(model, steps=2, optimiser=optimiser)
    pairs = zip(before, model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert all(p.grad is None for p in model.parameters())
    changed = zip(before, found.model.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in changed)


@pytest.mark.parametrize("name", ["rdp", "prv"])
def test_epsilon_is_the_accountant_s_along_the_way(model: nn.Module, name: str) -> None:
    found = train(model, evaluations=3, accountant=name, delta=1e-4)
    assert [mark.step for mark in found.history] == [2, 4, 6]
    for mark in found.history:
        expected = epsilon_spent(
            noise_multiplier=NOISE,
            sample_rate=0.5,
            steps=mark.step,
            delta=1e-4,
            accountant=name,
        )
        assert mark.epsilon == expected
    assert found.epsilon == found.history[-1].epsilon


def test_what_was_kept_is_the_clipped_mean_with_its_noise(model: nn.Module) -> None:
    images = two_classes(40)
    found = train(model, keep=(1, 4))
    drawn = []
    for step in (1, 4):
        (update,), (members,) = found.updates[step], found.members[step]
        assert update.num_samples == len(members)
        assert update.noise_std == pytest.approx(NOISE * BOUND / len(members))
        assert update.training.clip_norm == BOUND
        drawn.append(residual(update, members, images) / update.noise_std)
    noise = torch.cat(drawn).numpy()
    assert stats.kstest(noise, "norm").pvalue > LEVEL
    assert LEVEL < stats.chi2(len(noise)).cdf((noise**2).sum()) < 1 - LEVEL


def test_steps_divide_by_the_expected_number(model: nn.Module) -> None:
    """The weights move by lr times the kept sum over q N, whoever was there."""
    found = train(model, steps=1, keep=(1,))
    (update,) = found.updates[1]
    after = dict(found.model.named_parameters())
    for name, before in update.model.named_parameters():
        step = 0.1 * update.tensors[name] * update.num_samples / (0.5 * 40)
        torch.testing.assert_close(after[name], before - step, atol=1e-6, rtol=1e-5)


def test_every_sample_is_drawn_on_its_own(model: nn.Module) -> None:
    """Poisson sampling: batch sizes are binomial, and so is everyone's part."""
    steps = 150
    found = train(model, steps=steps, sample_rate=0.3, keep=range(1, steps + 1))
    sizes = torch.tensor([len(found.members[s][0]) for s in range(1, steps + 1)])
    spread = float(sizes.double().var()) * (steps - 1) / (40 * 0.3 * 0.7)
    assert LEVEL < stats.chi2(steps - 1).cdf(spread) < 1 - LEVEL
    parts = torch.cat([m for (m,) in found.members.values()]).bincount(minlength=40)
    expected, variance = steps * 0.3, steps * 0.3 * 0.7
    chi2 = float((parts.double() - expected).square().sum()) / variance
    assert LEVEL < stats.chi2(40).cdf(chi2) < 1 - LEVEL


def test_an_empty_batch_is_noise(model: nn.Module) -> None:
    found = train(model, sample_rate=1e-6, steps=1, keep=(1,))
    assert found.updates[1] == ()
    pairs = zip(model.parameters(), found.model.parameters(), strict=True)
    moved = torch.cat([(a - b).detach().flatten() for a, b in pairs]).double()
    noise = moved.numpy() * (1e-6 * 40) / (0.1 * NOISE * BOUND)
    # The step is so large that rounding of the weights does not show.
    assert stats.kstest(noise, "norm").pvalue > LEVEL


def test_local_trust(model: nn.Module) -> None:
    """One message per client; its noise and its cost are its own."""
    images = two_classes(40)
    found = train(model, trust="local", client_size=4, keep=(2,))
    updates, members = found.updates[2], found.members[2]
    assert len(updates) == len(members) > 1
    noise = torch.cat(
        [
            residual(update, who, images) / update.noise_std
            for update, who in zip(updates, members, strict=True)
        ]
    ).numpy()
    assert stats.kstest(noise, "norm").pvalue > LEVEL
    for update, who in zip(updates, members, strict=True):
        assert who.tolist() == list(range(int(who[0]), int(who[0]) + 4))
        assert update.noise_std == pytest.approx(NOISE * BOUND / 4)


def test_sampling_hides_nothing_from_a_server_that_reads_messages(
    model: nn.Module,
) -> None:
    steps = 5
    local = train(model, trust="local", client_size=4, steps=steps, sample_rate=1.0)
    full = epsilon_spent(
        noise_multiplier=NOISE, sample_rate=1.0, steps=steps, delta=1e-5
    )
    assert local.epsilon == full
    half = train(
        model, trust="local", client_size=4, steps=steps, keep=range(1, steps + 1)
    )
    firsts = [int(m[0]) for taken in half.members.values() for m in taken]
    most = max(firsts.count(first) for first in set(firsts))
    assert half.epsilon == epsilon_spent(
        noise_multiplier=NOISE, sample_rate=1.0, steps=most, delta=1e-5
    )
    central = train(model, steps=steps)
    assert central.epsilon < half.epsilon


def test_same_seed_same_training(model: nn.Module) -> None:
    def weights(seed: int) -> Tensor:
        found = train(model, steps=2, seed=seed)
        return torch.cat([p.detach().flatten() for p in found.model.parameters()])

    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_clipping_only(model: nn.Module) -> None:
    assert train(model, noise_multiplier=0.0, steps=1).epsilon == math.inf


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_norm", 0.0),
        ("noise_multiplier", -1.0),
        ("sample_rate", 1.1),
        ("steps", 0),
        ("lr", 0.0),
        ("trust", "server"),
        ("client_size", 2),
        ("evaluations", 7),
        ("keep", (7,)),
        ("seed", -1),
    ],
)
def test_bad_values(model: nn.Module, name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        train(model, **{name: value})
