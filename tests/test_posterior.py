"""The energy of latents: plain sums, finite differences, and a case solved by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.posterior import Posterior, last_layer_input
from gradinv_helpers.attacks.replay import local_batches
from gradinv_helpers.data import Images
from gradinv_helpers.defences import (
    Sign,
    StochasticQuantisation,
    TopK,
    defend,
    mixup_update,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

SHAPE, NUM_CLASSES = (3, 8, 8), 4
PRIOR = spectrum_prior(SHAPE)
LABELS = torch.tensor([0, 2, 2, 1])
LEVEL = 3e-2
SHUFFLE = 0  # of the client; its two epochs have different batches


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, NUM_CLASSES),
    )


def private(count: int = 4, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, PRIOR.size, generator=generator).double()
    pixels = PRIOR.decode(latents).clamp(0, 1).float()
    return Images(pixels, LABELS[:count], tuple("abcd"))


def points(trials: int, posterior: Posterior, scale: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return scale * torch.randn(
        trials, posterior.size, generator=generator, dtype=torch.float64
    )


def truth(posterior: Posterior, images: Images) -> Tensor:
    """One point: the latents of the true images."""
    return PRIOR.encode(images.pixels.double()).reshape(1, -1)


def delta(**recipe) -> LocalTraining:
    return dataclasses.replace(LocalTraining(sends="delta", lr=0.05), **recipe)


def of_gradient(**more) -> Posterior:
    return Posterior(local_update(network(), private()), PRIOR, LABELS, **more)


def of_two_clients() -> Posterior:
    """Two clients whose gradients are scaled to unit length before they are added."""
    images = private()
    sent = [local_update(network(), images[part]) for part in ([0], [1, 2, 3])]
    together = aggregate([normalize(update) for update in sent])
    return Posterior(together, PRIOR, LABELS)


def of_features() -> Posterior:
    features = last_layer_input(network(), private().pixels).detach()
    return of_gradient(features=features)


def of_replay(order: object = None, seed: int | None = SHUFFLE, **recipe) -> Posterior:
    training = delta(epochs=2, batch_size=2, **recipe)
    if order is None:
        order = local_batches(4, training, seed=seed)
    update = local_update(network(), private(), training, seed=seed)
    return Posterior(update, PRIOR, LABELS, order=order)


def of_batch_norm(**recipe) -> Posterior:
    """A network in train mode, whose running statistics are sent."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2),
        nn.BatchNorm2d(6),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(96, NUM_CLASSES),
    )
    training = dataclasses.replace(LocalTraining(), **recipe)
    return Posterior(local_update(model, private(), training), PRIOR, LABELS)


def of_clipped() -> Posterior:
    """Half of the samples have longer gradients than is allowed."""
    norms = sorted(_length(local_update(network(), private()[[k]])) for k in range(4))
    bound = (norms[1] + norms[2]) / 2
    training = LocalTraining(clip_norm=bound)
    return Posterior(local_update(network(), private(), training), PRIOR, LABELS)


def _length(update: SharedUpdate) -> float:
    return float(torch.stack([t.norm() for t in update.tensors.values()]).norm())


def of_encoded(defence, training: LocalTraining | None = None) -> Posterior:
    update = local_update(network(), private(), training)
    generator = torch.Generator().manual_seed(0)
    return Posterior(defend(update, defence, generator=generator), PRIOR, LABELS)


def of_mixup() -> Posterior:
    update = mixup_update(
        network(), private(), generator=torch.Generator().manual_seed(0)
    )
    return Posterior(update, PRIOR, LABELS)


ENCODED = {
    "pruned": lambda: of_encoded(TopK(0.2)),
    "signs": lambda: of_encoded(Sign()),
    "quantised": lambda: of_encoded(StochasticQuantisation(3)),
    "signs of a change": lambda: of_encoded(Sign(), delta(weight_decay=0.1)),
    "mixup": of_mixup,
}
CASES = {
    "gradient": of_gradient,
    "statistics": of_batch_norm,
    "statistics of a change": lambda: of_batch_norm(sends="delta", lr=0.05),
    "clipped": of_clipped,
    "normalised clients": of_two_clients,
    "features": of_features,
    "replay": of_replay,
    "replay, momentum": lambda: of_replay(optimiser="momentum"),
    "replay, averaged": lambda: of_replay(order="averaged"),
}


# --- derivatives ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["energy", "cosine_energy"])
@pytest.mark.parametrize("name", [*CASES, *ENCODED])
def test_slope_against_differences(name: str, kind: str) -> None:
    posterior = (CASES | ENCODED)[name]().double()
    energy = getattr(posterior, kind)
    here, step = points(2, posterior), 1e-5
    direction = points(2, posterior).flip(0, 1)
    value, slope = energy(here, LEVEL)
    assert value.shape == (2,)
    assert slope.shape == here.shape
    up, down = (energy(here + s * direction, LEVEL)[0] for s in (step, -step))
    along = (slope * direction).sum(1)
    torch.testing.assert_close((up - down) / (2 * step), along, rtol=1e-5, atol=1e-6)
    prior = 2 * (here * direction).sum(1)
    tells = (along - prior).abs() > 0.01 * prior.abs()
    assert bool(tells.any() if name in ENCODED else tells.all())


@pytest.mark.parametrize("name", [*CASES, *ENCODED])
def test_trials_do_not_touch_each_other(name: str, monkeypatch) -> None:
    posterior = (CASES | ENCODED)[name]().double()
    three = points(3, posterior)
    energies, slopes = posterior.energy(three, LEVEL)
    misfits = posterior.misfit(three)
    posterior.together = 2  # and so do not the parts they are cut into
    cut, cut_slopes = posterior.energy(three, LEVEL)
    torch.testing.assert_close(cut, energies)
    torch.testing.assert_close(cut_slopes, slopes)
    torch.testing.assert_close(posterior.misfit(three), misfits)
    for k in range(3):
        alone, slope = posterior.energy(three[k : k + 1], LEVEL)
        torch.testing.assert_close(alone[0], energies[k])
        torch.testing.assert_close(slope[0], slopes[k])


# --- values -----------------------------------------------------------------------


def test_statistics_are_further_equations() -> None:
    posterior = of_batch_norm()
    names = [name for name in posterior.update.buffers if "running" in name]
    assert len(posterior.targets) == posterior.num_gradients + len(names) == 6 + 2
    silent = dataclasses.replace(posterior.update, buffers=None)
    assert len(Posterior(silent, PRIOR, LABELS).targets) == 6


def test_what_is_rounding_only_has_no_weight() -> None:
    """The bias in front of BatchNorm has no gradient but for rounding."""
    posterior = of_batch_norm()
    names = list(posterior.update.tensors)
    bias = names.index("0.bias")
    size = float(posterior.targets[bias].square().mean())
    assert size < 1e-12
    for level in (1e-1, 1e-5):
        assert posterior.variances(level)[bias] >= 0.99 * size


def test_evaluations_leave_the_statistics_alone() -> None:
    features = torch.zeros(4, 96)
    one = of_batch_norm()
    posterior = Posterior(one.update, PRIOR, LABELS, features=features).double()
    here = points(1, posterior)
    first = posterior.energy(here, LEVEL)[0]
    for _ in range(3):
        posterior.energy(points(2, posterior), LEVEL)
    assert torch.equal(posterior.energy(here, LEVEL)[0], first)


def plain_energy(
    model: nn.Module, update: SharedUpdate, latents: Tensor, noise: float
) -> float:
    """The formula of the module's head, layer by layer."""
    model = model.double()
    pixels = PRIOR.decode(latents.view(-1, PRIOR.size))
    loss = F.cross_entropy(model(pixels), LABELS)
    found = torch.autograd.grad(loss, list(model.parameters()))
    total = float(latents.square().sum())
    for gradient, sent in zip(found, update.tensors.values(), strict=True):
        sent = sent.double()
        variance = LEVEL**2 * float(sent.square().sum()) + noise**2
        total += float((gradient - sent).square().sum()) / variance
    return total


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_energy_is_the_formula(noise: float) -> None:
    update = local_update(network(), private())
    update = update.replace_tensors(update.tensors, noise_std=noise)
    posterior = Posterior(update, PRIOR, LABELS).double()
    here = points(1, posterior)
    expected = plain_energy(network(), update, here[0], noise)
    found = float(posterior.energy(here, LEVEL)[0])
    assert found == pytest.approx(expected, rel=1e-6)  # but for the rounding


def test_cosine_energy_ignores_the_length() -> None:
    update = local_update(network(), private())
    longer = update.replace_tensors({k: 7 * v for k, v in update.tensors.items()})
    short, long = (Posterior(one, PRIOR, LABELS).double() for one in (update, longer))
    here = points(2, short)
    torch.testing.assert_close(
        short.cosine_energy(here, LEVEL)[0], long.cosine_energy(here, LEVEL)[0]
    )
    assert not torch.allclose(short.energy(here, LEVEL)[0], long.energy(here, LEVEL)[0])


@pytest.mark.parametrize("name", sorted(set(CASES) - {"replay, averaged"}))
def test_true_images_cost_what_the_prior_says(name: str) -> None:
    posterior = CASES[name]().double()
    true = truth(posterior, private())
    assert float(posterior.misfit(true)) < 1e-10
    energy, _ = posterior.energy(true, LEVEL)
    # Each of the 6 biases in front of BatchNorm is rounding, and costs about 1.
    rounding = 6 * name.startswith("statistics")
    gap = float(energy) - float(true.square().sum())
    assert gap == pytest.approx(rounding, abs=0.1 + rounding)
    energy, _ = posterior.cosine_energy(true, LEVEL)
    assert float(energy) == pytest.approx(float(true.square().sum()), rel=1e-4)
    assert float(posterior.misfit(torch.zeros_like(true))) > 1e-3


def test_features_are_further_equations() -> None:
    here = points(2, of_gradient().double())
    plain, more = of_gradient().double(), of_features().double()
    gap = more.energy(here, LEVEL)[0] - plain.energy(here, LEVEL)[0]
    known = last_layer_input(network(), private().pixels).detach().double()
    scale = known.numel() * float(known.var())
    for k in range(2):
        found = last_layer_input(network().double(), more.images(here)[k]).detach()
        expected = float((found - known).square().sum()) / scale / LEVEL**2
        assert float(gap[k]) == pytest.approx(expected, rel=1e-5)


def test_what_mixes_and_what_does_not() -> None:
    posterior = of_gradient().double()
    here = points(1, posterior)
    parts = here.view(4, -1)
    alike = parts[[0, 2, 1, 3]].reshape(1, -1)  # both of label 2
    other = parts[[1, 0, 2, 3]].reshape(1, -1)
    before, after, wrong = (
        float(posterior.energy(p, LEVEL)[0]) for p in (here, alike, other)
    )
    assert after == pytest.approx(before, rel=1e-12)
    assert abs(wrong - before) > 1e-3 * before
    with_labels = posterior.rearranged(LABELS[[1, 0, 2, 3]], "sequential")
    assert float(with_labels.energy(other, LEVEL)[0]) == pytest.approx(before)
    assert float(posterior.energy(other, LEVEL)[0]) == wrong  # is left as it was


def test_known_features_tell_images_of_one_class_apart() -> None:
    posterior, without = of_features().double(), of_gradient().double()
    true = truth(posterior, private())
    swapped = true.view(4, -1)[[0, 2, 1, 3]].reshape(1, -1)
    right, wrong = (float(posterior.energy(p, LEVEL)[0]) for p in (true, swapped))
    assert wrong > right + 1
    right, wrong = (float(without.energy(p, LEVEL)[0]) for p in (true, swapped))
    assert wrong == pytest.approx(right, rel=1e-10)


def test_only_the_true_order_explains_a_change() -> None:
    training = delta(epochs=2, batch_size=2)
    first, _, second, _ = local_batches(4, training, seed=SHUFFLE)
    assert set(first.tolist()) != set(second.tolist())
    right = of_replay().double()
    wrong = right.rearranged(LABELS, local_batches(4, training))
    true = truth(right, private())
    assert float(right.misfit(true)) < 1e-4 * float(wrong.misfit(true))


def test_huge_noise_leaves_the_prior() -> None:
    update = local_update(network(), private())
    update = update.replace_tensors(update.tensors, noise_std=1e6)
    posterior = Posterior(update, PRIOR, LABELS).double()
    here = points(2, posterior)
    energy, slope = posterior.energy(here, LEVEL)
    torch.testing.assert_close(energy, here.square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, 2 * here, rtol=1e-4, atol=1e-6)
    mean = posterior.images(torch.zeros_like(here))
    torch.testing.assert_close(mean, torch.full_like(mean, 0.47))


@pytest.mark.parametrize("name", sorted(set(ENCODED) - {"mixup"}))
def test_true_images_agree_with_their_messages(name: str) -> None:
    """At face value the same tensors contradict them."""
    posterior = ENCODED[name]().double()
    true = truth(posterior, private())
    assert float(posterior.misfit(true)) < 1e-10
    costs = [
        float(posterior.energy(here, LEVEL)[0] - here.square().sum())
        for here in (true, torch.zeros_like(true), points(1, posterior))
    ]
    assert costs[0] < min(costs[1:])
    face = dataclasses.replace(posterior.update, encoding=None)
    naive = Posterior(face, PRIOR, LABELS).double()
    assert float(naive.misfit(true)) > 1e-3


def test_labels_of_mixtures_are_unknowns() -> None:
    posterior = of_mixup().double()
    assert posterior.size == 4 * (PRIOR.size + NUM_CLASSES)
    here = points(2, posterior)
    shares = posterior.label_shares(here)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 4).double())
    moved = here.clone()
    moved.view(2, 4, -1)[:, :, PRIOR.size] += 1.0
    assert bool((posterior.label_shares(moved)[..., 0] > shares[..., 0]).all())
    assert torch.equal(posterior.images(moved), posterior.images(here))
    assert not torch.allclose(
        posterior.energy(moved, LEVEL)[0], posterior.energy(here, LEVEL)[0]
    )


def test_signs_have_no_spread() -> None:
    for name in ("signs", "mixup"):
        with pytest.raises(InputError, match="a Gaussian likelihood of the latents"):
            ENCODED[name]().spreads(LEVEL)
    spreads = ENCODED["pruned"]().spreads(LEVEL)
    sent = [t.flatten() != 0 for t in ENCODED["pruned"]().targets]
    for spread, seen in zip(spreads, sent, strict=True):
        assert torch.equal(torch.as_tensor(spread).isfinite(), seen)


# --- a case with a closed form ----------------------------------------------------


def linear_case(noise: float) -> tuple[SharedUpdate, Tensor, Tensor]:
    """A model of zeros, whose gradient is linear in the images: A and b of A x + b.

    All classes are equally likely for every image, so row k of the weight's gradient is
    the mean of (1 / K - [label = k]) x.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), NUM_CLASSES))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    update = local_update(model, private(2))
    generator = torch.Generator().manual_seed(9)
    tensors = {
        name: t + noise * torch.randn(t.shape, generator=generator)
        for name, t in update.tensors.items()
    }
    update = update.replace_tensors(tensors, noise_std=noise)
    shares = (1 / NUM_CLASSES - F.one_hot(LABELS[:2], NUM_CLASSES).double()) / 2
    return update, shares.T.contiguous(), tensors["1.weight"].double()


def closed_form(noise: float, level: float) -> Tensor:
    """Latents (2, d) of the most probable images, by linear algebra.

    Column j of the weight's gradient holds ``shares @ x_j`` for pixel j of both images.
    """
    _, shares, sent = linear_case(noise)
    eye = torch.eye(PRIOR.size, dtype=torch.float64)
    root = (PRIOR.decode(eye) - PRIOR.mean).flatten(1)  # latents to pixels
    mapped = torch.kron(shares, root.T.contiguous())  # (K d, 2 d)
    rest = sent - shares.sum(1, keepdim=True) * PRIOR.mean
    variance = level**2 * float(sent.square().sum()) + noise**2
    normal = mapped.T @ mapped / variance
    normal.diagonal().add_(1)
    found = torch.linalg.solve(normal, mapped.T @ rest.flatten() / variance)
    return found.view(2, -1)


@pytest.mark.parametrize(("noise", "level"), [(1e-3, 1e-2), (0.02, 1e-3)])
def test_maximum_is_the_closed_form(noise: float, level: float) -> None:
    update, _, _ = linear_case(noise)
    posterior = Posterior(update, PRIOR, LABELS[:2]).double()
    best = closed_form(noise, level).reshape(1, -1)
    energy, slope = posterior.energy(best, level)
    _, at_zero = posterior.energy(torch.zeros_like(best), level)
    assert float(slope.norm() / at_zero.norm()) < 1e-6
    around = best + 1e-2 * points(3, posterior)
    assert bool((posterior.energy(around, level)[0] > energy).all())


# --- what an update states --------------------------------------------------------


def test_one_step_of_sgd_is_a_gradient() -> None:
    training = delta(lr=0.2)
    update = local_update(network(), private(), training)
    update = update.replace_tensors(update.tensors, noise_std=1e-3)
    posterior = Posterior(update, PRIOR, LABELS)
    gradient = local_update(network(), private()).tensors
    assert posterior.steps == 0
    for found, expected in zip(posterior.targets, gradient.values(), strict=True):
        torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-6)
    assert posterior.noise == pytest.approx(1e-3 / 0.2)
    assert float(posterior.double().misfit(truth(posterior, private()))) < 1e-9


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({"epochs": 2}, 2),
        ({"batch_size": 3}, 2),
        ({"optimiser": "adam"}, 1),
        ({"optimiser": "momentum"}, 0),
        ({"epochs": 3, "batch_size": 1}, 12),
    ],
)
def test_which_changes_are_replayed(recipe: dict, steps: int) -> None:
    update = local_update(network(), private(), delta(**recipe))
    posterior = Posterior(update, PRIOR, LABELS)
    assert posterior.steps == steps
    assert posterior.several_batches == ("batch_size" in recipe)
    sent = update.tensors if steps else update.gradient()
    for found, expected in zip(posterior.targets, sent.values(), strict=True):
        assert torch.equal(found[0], expected)


def test_tempering_is_a_share_of_every_layer() -> None:
    update = local_update(network(), private())
    posterior = Posterior(update, PRIOR, LABELS)
    norms = [float(t.double().square().sum()) for t in update.tensors.values()]
    high = posterior.variances(1.0)
    assert high == pytest.approx(norms, rel=1e-5)
    # Without tempering, what is left is the rounding of single precision.
    for value, t in zip(posterior.variances(0), update.tensors.values(), strict=True):
        step = torch.finfo(torch.float32).eps * float(t.square().mean().sqrt())
        assert (step / 10) ** 2 < value < step**2
    count = sum(t.numel() for t in update.tensors.values())
    assert posterior.entry == pytest.approx((sum(norms) / count) ** 0.5, rel=1e-5)


def test_the_model_is_left_alone() -> None:
    update = local_update(network(), private())
    before = {name: p.clone() for name, p in update.model.named_parameters()}
    posterior = Posterior(update, PRIOR, LABELS)
    posterior.energy(points(1, posterior).float(), LEVEL)
    posterior.double().energy(points(1, posterior), LEVEL)
    for name, parameter in update.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    found = posterior.energy(points(1, posterior).float(), LEVEL)
    exact = posterior.double().energy(points(1, posterior), LEVEL)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-3, atol=0)
    assert found[1].dtype == torch.float32


def test_last_layer_input() -> None:
    model, pixels = network(), private().pixels
    expected = model[:-1](pixels)
    found = last_layer_input(model, pixels)
    assert torch.equal(found, expected)
    assert not model[-1]._forward_pre_hooks


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(192, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))


def test_bad_input() -> None:
    pixels = private().pixels
    with pytest.raises(InputError, match="a linear layer at the end"):
        last_layer_input(nn.Flatten(), pixels)
    with pytest.raises(InputError, match="a last linear layer that is used"):
        last_layer_input(Unused(), pixels)
    update = local_update(network(), private())
    nothing = update.replace_tensors(
        {name: torch.zeros_like(t) for name, t in update.tensors.items()}
    )
    with pytest.raises(InputError, match="a non-zero update"):
        Posterior(nothing, PRIOR, LABELS)
