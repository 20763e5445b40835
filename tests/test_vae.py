"""The VAE prior against torch.distributions, automatic derivatives and mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import CovariancePrior, ImagePrior
from gradinv_helpers.priors.vae import SoftVAEPrior, VAEPrior
from gradinv_helpers.priors.vae_codes import CodeLaw
from gradinv_helpers.priors.vae_files import PRETRAINED, spectral
from gradinv_helpers.priors.vae_network import VAENetwork, elbo_terms, span_of, vae_loss
from gradinv_helpers.priors.vae_training import (
    VAEEpoch,
    fitted_residual,
    measured,
    train_vae,
)

SMALL: dict[str, Any] = {
    "latent_size": 2,
    "width": 8,
    "hidden": 32,
    "batch_size": 12,
    "seed": 1,
}
SHAPES = ((1, 8, 8), (3, 5, 9), (1, 7, 4), (2, 16, 16), (1, 1, 1), (3, 25, 17))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def network(shape: tuple[int, int, int] = (1, 6, 5), **options: Any) -> VAENetwork:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        settings = {"latent_size": 4, "num_classes": 3, "width": 4, "hidden": 8}
        return VAENetwork(shape, **{**settings, **options}).double()


def prior(
    shape: tuple[int, int, int] = (1, 6, 5), dense: bool = False, **options: Any
) -> VAEPrior:
    channels, *sides = shape
    if dense:
        count = math.prod(shape)
        half = 0.1 * normal(count, count, seed=1) / count**0.5
        root = half @ half.T + 0.05 * torch.eye(count).double()
        gaps = CovariancePrior(torch.zeros(shape).double(), root)
        made = network(shape, **options)
        return VAEPrior(made, gaps, codes=law(made))
    deviations = 0.05 + 0.1 * normal(*sides, seed=1).abs()
    mix = torch.eye(channels).double() + 0.2 * normal(channels, channels, seed=2)
    made = network(shape, **options)
    return VAEPrior(made, spectral(deviations, mix), codes=law(made))


def law(made: VAENetwork) -> CodeLaw:
    count, size = max(made.num_classes, 1), made.latent_size
    roots = 0.2 * normal(count, size, size, seed=4).tril() + torch.eye(size)
    return CodeLaw(normal(count, size, seed=3).double(), roots.double())


def bars(count: int = 120, size: int = 8) -> Images:
    """A broad bar of any brightness; the class says whether it lies or stands."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(count, 1, 1, generator=generator)
    labels = torch.arange(count) % 2
    bar = torch.zeros(size, size)
    bar[3:5] = 1
    shapes = torch.where((labels == 1)[:, None, None], bar.mT, bar)
    grain = 0.05 * torch.randn(count, size, size, generator=generator)
    pixels = (0.2 + 0.6 * levels * shapes + grain).clamp(0, 1)
    return Images(pixels[:, None], labels, ("lying", "standing"))


@pytest.fixture(scope="module")
def trained() -> VAEPrior:
    return train_vae(bars(), epochs=24, **SMALL)


@pytest.fixture(scope="module")
def digits() -> VAEPrior:
    return VAEPrior.load("vae-digits")


# The network


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [0, 3])
def test_any_image_size(shape: tuple[int, int, int], classes: int) -> None:
    net = network(shape, num_classes=classes)
    images = torch.rand(2, *shape).double()
    told = torch.eye(max(classes, 2)).double()[:2, :classes]
    mean, log_variance = net.encode(images, told)
    assert mean.shape == log_variance.shape == (2, 4)
    drawn = net.decode(mean, told).detach()
    assert drawn.shape == images.shape
    assert 0 < float(drawn.min()) and float(drawn.max()) < 1


def test_every_weight_and_class_counts() -> None:
    net, images = network(), torch.rand(3, 1, 6, 5).double()
    terms = elbo_terms(net, images, torch.eye(3).double(), normal(3, 4))
    sum(term.sum() for term in terms).backward()  # type: ignore[union-attr]
    for name, weight in net.named_parameters():
        assert weight.grad is not None and float(weight.grad.abs().max()) > 0, name
    same = torch.zeros(3, 1, 6, 5).double()
    means, _ = net.encode(same, torch.eye(3).double())
    assert not torch.allclose(means[0], means[1])
    drawn = net.decode(normal(1, 4).expand(3, -1), torch.eye(3).double())
    assert not torch.allclose(drawn[0], drawn[1])


def test_images_are_kept_to_the_span() -> None:
    flat = normal(60, 3, seed=4) @ normal(3, 30, seed=5) + 0.3
    images = flat.view(60, 1, 6, 5)
    assert span_of(images) == 3
    assert span_of(normal(60, 1, 6, 5)) == 0  # all dimensions
    assert span_of(images[:20]) == 0  # too few to tell
    net = network(span=3)
    net.keep_to_span(images)
    drawn = net.decode(normal(8, 4), torch.eye(3).double()[[0, 1, 2, 0, 1, 2, 0, 1]])
    together = torch.cat([images, drawn.detach()])
    assert span_of(together) == 3
    free = network()
    weights = {k: v for k, v in net.state_dict().items() if k in free.state_dict()}
    free.load_state_dict(weights)
    loose = free.decode(normal(8, 4), torch.eye(3).double()[[0, 1, 2, 0, 1, 2, 0, 1]])
    axes = torch.linalg.qr((flat - flat.mean(0)).T)[0][:, :3]
    rest = (loose - drawn).detach().flatten(1)
    torch.testing.assert_close(rest @ axes, torch.zeros(8, 3).double())


# The bound


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), spread=st.floats(0.05, 2.0))
def test_terms_against_torch_distributions(seed: int, spread: float) -> None:
    net = network()
    with torch.no_grad():
        net.log_variance.fill_(2 * math.log(spread))
    images = normal(3, 1, 6, 5, seed=seed).sigmoid()
    classes, noise = torch.eye(3).double(), normal(3, 4, seed=seed + 1)
    with torch.no_grad():
        reconstruction, divergence = elbo_terms(net, images, classes, noise)
        mean, log_variance = net.encode(images, classes)
        deviation = log_variance.exp().sqrt()
        drawn = net.decode(mean + deviation * noise, classes)
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = kl_divergence(Normal(mean, deviation), standard).sum(1)
    torch.testing.assert_close(divergence, expected)
    likelihood = Normal(drawn, spread).log_prob(images).sum((1, 2, 3))
    torch.testing.assert_close(reconstruction, -likelihood)


def test_mean_over_pixels_and_latents_is_a_larger_beta() -> None:
    net = network()  # 30 pixels, 4 latents
    reconstruction, divergence = normal(5).abs(), normal(5, seed=1).abs()
    right = vae_loss(net, reconstruction, divergence)
    torch.testing.assert_close(right, (reconstruction + divergence).mean())
    wrong = vae_loss(net, reconstruction, divergence, reduction="mean")
    heavy = vae_loss(net, reconstruction, divergence, beta=30 / 4)
    torch.testing.assert_close(30 * wrong, heavy)


def test_mean_over_pixels_and_latents_collapses(trained: VAEPrior) -> None:
    wrong = train_vae(bars(), epochs=24, reduction="mean", **SMALL)
    found = [p.about["history"][-1]["held_out_divergence"] for p in (wrong, trained)]
    assert found[0] < 0.05
    assert found[1] > 1


# The prior


def test_keeps_to_the_protocol() -> None:
    hard: ImagePrior = prior()
    soft: ImagePrior = prior().soft()
    assert (hard.size, soft.size) == (4, 34)
    assert hard.image_shape == soft.image_shape == (1, 6, 5)
    assert soft.name == "soft vae"


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 3)])
def test_pull_back_is_the_transposed_derivative(
    soft: bool, lead: tuple[int, ...]
) -> None:
    bound = prior((2, 6, 5)).given(torch.tensor([2, 0, 1]))
    chosen: ImagePrior = bound.soft() if soft else bound
    latents, step = normal(*lead, chosen.size), normal(*lead, chosen.size, seed=1)
    slopes = normal(*lead, 2, 6, 5, seed=2)
    width = 1e-5
    ahead, behind = (chosen.decode(latents + s * width * step) for s in (1, -1))
    change = (ahead - behind) / (2 * width)
    left = (change * slopes).flatten(len(lead)).sum(-1)
    right = (chosen.pull_back(latents, slopes) * step).sum(-1)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_each_image_takes_its_own_class() -> None:
    bound = prior().given(torch.tensor([0, 2]))
    latents = normal(5, 2, 4)
    together = bound.decode(latents)
    for place, label in enumerate((0, 2)):
        alone = prior().given(torch.tensor([label])).decode(latents[:, place])
        torch.testing.assert_close(together[:, place], alone)


@pytest.mark.parametrize("dense", [False, True])
def test_soft_images_are_reached_exactly(dense: bool) -> None:
    bound = prior((3, 6, 5), dense).given(torch.tensor([0, 1])).soft()
    images = normal(4, 2, 3, 6, 5).sigmoid()
    latents = bound.encode(images)
    torch.testing.assert_close(bound.decode(latents), images)
    torch.testing.assert_close(latents[..., :4], bound.hard.encode(images))


def test_soft_spread_about_the_decoder_is_the_residual() -> None:
    soft = prior((1, 3, 4)).given(torch.tensor([1])).soft()
    latents = normal(20_000, soft.size)
    latents[:, :4] = 0
    gaps = (soft.decode(latents) - soft.hard.decode(latents[:, :4])).flatten(1)
    root = soft.hard.residual.decode(torch.eye(12).double()).flatten(1)
    expected = root.T @ root
    error = (gaps.T.cov() - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.03


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 2, 3)])
def test_log_densities_against_torch_distributions(
    shape: tuple[int, int, int], dense: bool
) -> None:
    hard = prior(shape, dense)
    images, means = normal(5, *shape).sigmoid(), normal(5, *shape, seed=1).sigmoid()
    expected = Normal(means, hard.noise_std).log_prob(images).sum((1, 2, 3))
    torch.testing.assert_close(hard.log_density(images, means), expected)
    root = hard.residual.decode(torch.eye(hard.residual.size).double()).flatten(1)
    law = MultivariateNormal(means.flatten(1), root.T @ root)
    torch.testing.assert_close(
        hard.soft().log_density(images, means), law.log_prob(images.flatten(1))
    )


def test_weighted_estimate_finds_a_likelihood_that_is_known() -> None:
    """A decoder that ignores z: log p(x | y) is log p(x | z) for any z."""
    net = network((1, 8, 8), num_classes=2)
    with torch.no_grad():
        net.from_latents[0].weight[:, :4] = 0
    hard = replace(prior((1, 8, 8)), network=net, codes=None)
    images = bars(10)
    bound = hard.given(images.labels)
    pixels = images.pixels.double()
    for known in (hard, hard.soft()):
        exact = known.log_density(pixels, bound.decode(normal(10, 4)))
        errors = [
            float((known.log_likelihood(images, samples=count) - exact).abs().max())
            for count in (1, 1000)
        ]
        assert errors[1] < 0.15 < errors[0]
        lower = known.elbo(images, samples=500)
        assert bool((lower < exact).all())


def test_more_samples_tighten_the_bound(trained: VAEPrior) -> None:
    images = bars()
    values = [trained.elbo(images, samples=64).mean()]
    for samples in (4, 64):
        values.append(trained.log_likelihood(images, samples=samples).mean())
    assert values[0] < values[1] < values[2]


def _parts(trained: VAEPrior) -> tuple[Images, Images]:
    chosen, kept = (trained.about[k] for k in ("train_indices", "held_out_indices"))
    return bars()[chosen], bars()[kept]


@pytest.mark.parametrize("form", ["spectrum", "covariance"])
def test_residual_has_the_size_of_unseen_errors(trained: VAEPrior, form: str) -> None:
    images, held_out = _parts(trained)
    found = fitted_residual(trained, images, held_out, form=form, seed=1)
    assert float(found.decode(torch.zeros(64)).abs().max()) == 0
    draws = list(trained.posterior_draws(held_out, samples=50))
    gaps = torch.cat([x - drawn for x, drawn, _ in draws], 1)
    assert float(found.encode(gaps).square().mean()) == pytest.approx(1, abs=0.05)
    soft = replace(trained, residual=found).soft()
    best = float(soft.elbo(held_out, samples=50).mean())
    for factor in (0.8, 1.25):  # any other size makes the bound looser
        if isinstance(found, CovariancePrior):
            other = replace(found, root=factor * found.root)
            resized = replace(trained, residual=other).soft()
        else:
            wider = spectral(factor * found.deviations, found.colours)
            resized = replace(trained, residual=wider).soft()
        assert float(resized.elbo(held_out, samples=50).mean()) < best


def test_measures_are_those_of_the_prior(trained: VAEPrior) -> None:
    images, held_out = _parts(trained)
    made, measures = measured(trained, images, held_out, seed=1)
    assert measures == trained.about["held_out"]
    weighted = made.soft().log_likelihood(held_out, samples=64, seed=1)
    assert float(weighted.mean()) == measures["soft_log_likelihood"]
    rows = held_out.labels
    bound = trained.given(rows)
    gaps = held_out.pixels - bound.decode(bound.encode(held_out.pixels))
    errors = gaps.flatten(1).square().mean(1)
    assert measures["reconstruction_psnr"] == pytest.approx(
        float(-10 * errors.log10().mean())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("soft", [False, True])
def test_to_changes_the_type(dtype: torch.dtype, soft: bool) -> None:
    bound = prior().given(torch.tensor([0, 1]))
    chosen: ImagePrior = bound.soft() if soft else bound
    there = chosen.to(torch.zeros(1, dtype=dtype))
    latents = normal(2, chosen.size)
    drawn = there.decode(latents.to(dtype))
    assert drawn.dtype == there.encode(drawn).dtype == dtype
    torch.testing.assert_close(
        drawn.double(), chosen.decode(latents), rtol=1e-4, atol=1e-5
    )
    assert bound.network.log_variance.dtype == torch.float64


def test_without_classes_labels_are_ignored() -> None:
    free = prior(num_classes=0)
    latents = normal(2, 4)
    bound = free.given(torch.tensor([7, 9]))
    torch.testing.assert_close(bound.decode(latents), free.decode(latents))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.decode(normal(2, 4)), "classes are bound"),
        (lambda p: p.encode(normal(2, 1, 6, 5)), "classes are bound"),
        (lambda p: p.given(torch.tensor([0, 3])), "classes from 0 to 2"),
        (lambda p: p.given(torch.tensor([-1])), "classes from 0 to 2"),
        (lambda p: p.given(torch.tensor([0.5])), r"integers of shape \(N,\)"),
        (lambda p: p.given(torch.tensor([0, 1])).decode(normal(3, 4)), "2 images"),
        (lambda p: p.elbo(bars()), r"images of shape \(1, 6, 5\)"),
        (lambda p: p.log_likelihood(bars(), samples=0), "samples: expected"),
    ],
)
def test_clear_errors(call: Callable[[VAEPrior], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(prior())


# Training


def test_learns_and_reports(trained: VAEPrior) -> None:
    history = trained.about["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 25))
    assert history[0]["beta"] < history[-1]["beta"] == 1
    assert history[-1]["held_out_elbo"] > history[0]["held_out_elbo"]
    best = max(epoch["held_out_elbo"] for epoch in history)
    place = trained.about["training"]["best_epoch"] - 1
    assert history[place]["held_out_elbo"] == best
    held_out = trained.about["held_out"]
    assert held_out["reconstruction_psnr"] > held_out["mean_image_psnr"] + 3
    assert held_out["log_likelihood"] > held_out["elbo"]
    used, kept = (set(trained.about[k]) for k in ("train_indices", "held_out_indices"))
    assert used | kept == set(range(120)) and not used & kept and len(kept) == 12


def test_same_call_same_weights_whatever_the_global_seed() -> None:
    recipe = {"epochs": 1, "latent_size": 2, "width": 4, "hidden": 8}
    before = torch.get_rng_state()
    first = train_vae(bars(20), seed=5, **recipe)  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = train_vae(bars(20), seed=5, **recipe)  # type: ignore[arg-type]
    other = train_vae(bars(20), seed=6, **recipe)  # type: ignore[arg-type]
    weights = [
        torch.cat([w.flatten() for w in p.network.state_dict().values()])
        for p in (first, second, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.about == second.about


def test_interruption_keeps_the_best() -> None:
    def stop(epoch: VAEEpoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    recipe = {"latent_size": 2, "width": 4, "hidden": 8, "batch_size": 8}
    made = train_vae(bars(40), epochs=9, on_epoch=stop, **recipe)  # type: ignore[arg-type]
    assert made.about["training"]["interrupted"] is True
    assert len(made.about["history"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected"),
        ({"latent_size": 0}, "latent_size: expected"),
        ({"lr": 0.0}, "lr: expected"),
        ({"beta": -1.0}, "beta: expected"),
        ({"reduction": "max"}, "reduction: expected one of sum, mean"),
        ({"held_out": 1.0}, "held_out: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"lr": 1e12, "epochs": 3}, "finite training loss"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    recipe = {"epochs": 1, "latent_size": 2, "width": 4, "hidden": 8, **options}
    with pytest.raises(InputError, match=message):
        train_vae(bars(20), **recipe)


# The folder


@pytest.mark.parametrize("form", ["spectrum", "covariance"])
def test_round_trip(trained: VAEPrior, tmp_path: Path, form: str) -> None:
    saved = replace(
        trained, residual=fitted_residual(trained, bars(), bars(), form=form)
    )
    folder = saved.save(tmp_path / "prior")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors"]
    again = VAEPrior.load(folder)
    assert (again.name, again.about) == (trained.name, trained.about)
    labels, latents = torch.tensor([0, 1]), normal(2, 2 + 64, dtype=torch.float32)
    ours, theirs = (p.soft().given(labels) for p in (saved, again))
    assert torch.equal(ours.decode(latents), theirs.decode(latents))


def _edited(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["architecture"] |= changes
        path.write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "a folder with config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "folder with model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "undamaged"),
        (lambda f: (f / "config.json").write_text("{}"), "no 'kind'"),
        (lambda f: (f / "config.json").write_text("[]"), "undamaged"),
        (lambda f: (f / "config.json").write_text('{"kind": "gan"}'), "one of vae"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "undamaged"),
        (_edited(latent_size=3), "does not fit config.json"),
        (_edited(latent_size=-2), "latent_size"),
        (_edited(colour=1), "colour"),
        (_edited(image_shape=[1, 9, 8]), "does not fit config.json"),
    ],
)
def test_damaged_folder(
    trained: VAEPrior,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    folder = trained.save(tmp_path)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        VAEPrior.load(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(
    trained: VAEPrior, tmp_path: Path
) -> None:
    state = trained.network.state_dict()
    broken = network((1, 8, 8), latent_size=2, num_classes=2, width=8, hidden=32)
    broken.load_state_dict(state)
    with torch.no_grad():
        broken.log_variance.fill_(math.nan)
    replace(trained, network=broken).save(tmp_path)
    with pytest.raises(InputError, match=r"log_variance has NaN"):
        VAEPrior.load(tmp_path)


def test_unknown_folder() -> None:
    with pytest.raises(InputError, match=r"a folder with config\.json"):
        VAEPrior.load("vae-nothing")


# The shipped priors


@pytest.mark.parametrize("name", PRETRAINED)
def test_shipped_priors_say_how_they_were_made(name: str) -> None:
    shipped = VAEPrior.load(name)
    about = shipped.about
    images = load_images(about["dataset"], image_size=about["image_size"])
    unseen = load_images(about["dataset"], image_size=about["image_size"], split="test")
    used, kept = about["train_indices"], about["held_out_indices"]
    assert about["split"] == "train" and about["command"].startswith("gradinv train-")
    assert sorted(used + kept) == list(range(len(images)))
    seen = {row.numpy().tobytes() for row in images.pixels[torch.tensor(used)]}
    assert not any(row.numpy().tobytes() in seen for row in unseen.pixels)
    measured = about["held_out"]
    held_out = images[torch.tensor(kept)]
    elbo = float(shipped.elbo(held_out).mean())
    assert elbo == pytest.approx(measured["elbo"], rel=1e-2)
    assert measured["reconstruction_psnr"] > measured["mean_image_psnr"] + 4


def test_shipped_digits_are_reproduced_at_their_size(digits: VAEPrior) -> None:
    assert digits.image_shape == (1, 16, 16) and digits.size == 16
    images = load_images("digits", image_size=16)
    held_out = images[torch.tensor(digits.about["held_out_indices"])]
    bound = digits.given(held_out.labels)
    gaps = held_out.pixels - bound.decode(bound.encode(held_out.pixels))
    mean = held_out.pixels - images.pixels.mean(0)
    assert float(gaps.square().mean()) < 0.06 * float(mean.square().mean())
    other = digits.given((held_out.labels + 1) % 10)
    wrong = held_out.pixels - other.decode(bound.encode(held_out.pixels))
    assert float(wrong.square().mean()) > 4 * float(gaps.square().mean())


def test_shipped_digits_draw_typical_soft_images(digits: VAEPrior) -> None:
    """Held-out images cost about as much as draws from the prior."""
    images = load_images("digits", image_size=16)
    held_out = images[torch.tensor(digits.about["held_out_indices"])]
    soft = digits.soft().given(held_out.labels)
    assert isinstance(soft, SoftVAEPrior)
    surprise = float(soft.encode(held_out.pixels).square().mean())
    assert 0.5 < surprise < 1.5
