"""The law of a VAE's codes, against torch's own Gaussians and against draws."""

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from gradinv_helpers import load_images, load_prior, train_classifier
from gradinv_helpers.priors.vae import VAEPrior
from gradinv_helpers.priors.vae_codes import CodeLaw, fit_code_law, standard_law


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def law(classes: int, size: int) -> CodeLaw:
    roots = 0.3 * normal(classes, size, size, seed=1).tril() + torch.eye(size)
    return CodeLaw(normal(classes, size, seed=2), roots)


@pytest.mark.parametrize("classes", [0, 1, 4])
def test_place_and_whiten_undo_each_other(classes: int) -> None:
    made = law(max(classes, 1), 3)
    asked = F.one_hot(torch.arange(8) % classes, classes) if classes else None
    rows = torch.zeros(8, 0) if asked is None else asked.double()
    latents = normal(8, 3, seed=3)
    back = made.whiten(made.place(latents, rows), rows)
    torch.testing.assert_close(back, latents)


def test_density_is_that_of_the_gaussian() -> None:
    made, labels = law(4, 3), torch.tensor([0, 3, 3, 1, 2])
    rows, codes = F.one_hot(labels, 4).double(), normal(5, 3, seed=4)
    wanted = MultivariateNormal(made.means[labels], scale_tril=made.roots[labels])
    whitened = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    found = whitened.log_prob(made.whiten(codes, rows)) - made.log_volume(rows)
    torch.testing.assert_close(found, wanted.log_prob(codes))


def test_standard_law_changes_nothing() -> None:
    latents, rows = normal(6, 5).float(), F.one_hot(torch.arange(6), 6).float()
    assert torch.equal(standard_law(6, 5).place(latents, rows), latents)


def test_fit_finds_the_law_of_many_codes() -> None:
    made, count = law(3, 2), 30_000
    rows = F.one_hot(torch.arange(count) % 3, 3).double()
    codes = made.place(normal(count, 2, seed=5), rows)
    # The encoder is unsure by 0.5: that much wider is the law of its draws.
    found = fit_code_law(codes, torch.full_like(codes, 0.25), rows)
    covariances = made.roots @ made.roots.mT + 0.25 * torch.eye(2)
    torch.testing.assert_close(found.means.double(), made.means, atol=0.03, rtol=0)
    torch.testing.assert_close(
        (found.roots @ found.roots.mT).double(), covariances, atol=0.08, rtol=0
    )


def test_moments_maximise_the_bound_of_one_large_class() -> None:
    means, variances = normal(4000, 2, seed=6), normal(4000, 2, seed=7).square()
    rows = torch.zeros(4000, 0)
    found = fit_code_law(means, variances, rows)

    def cross_entropy(one: CodeLaw) -> float:
        draws = means + variances.sqrt() * normal(50, 4000, 2, seed=8)
        mean, root = one.means[0].double(), one.roots[0].double()
        density = MultivariateNormal(mean, scale_tril=root).log_prob(draws)
        return -float(density.mean())

    best = cross_entropy(found)
    for factor in (0.9, 1.1):
        assert cross_entropy(CodeLaw(found.means, factor * found.roots)) > best + 0.005
    assert cross_entropy(CodeLaw(found.means + 0.1, found.roots)) > best + 0.002


def test_few_images_are_shrunk_and_none_are_borrowed() -> None:
    rows = F.one_hot(torch.tensor([0] * 200 + [1]), 3).double()
    means = torch.cat([normal(200, 4, seed=9), torch.full((1, 4), 5.0)])
    found = fit_code_law(means, torch.zeros_like(means), rows)
    spans = torch.linalg.svdvals(found.roots.double())
    assert bool((spans[1] > 0.5).all())  # one image has no spread of its own
    torch.testing.assert_close(found.means[1], torch.full((4,), 5.0))
    torch.testing.assert_close(found.means[2].double(), means.mean(0))
    assert float(spans[2].min()) > 0.9


@pytest.mark.slow
def test_draws_show_the_class_asked_for() -> None:
    prior = load_prior("vae-digits")
    assert isinstance(prior, VAEPrior)
    images = load_images("digits", image_size=16)
    judge = train_classifier(images, epochs=15, seed=1).model
    labels = torch.arange(10).repeat(20)
    latents = normal(200, prior.size, seed=10).float()
    with torch.no_grad():
        shown = judge(prior.given(labels).decode(latents)).argmax(1)
        standard = VAEPrior(prior.network, prior.residual).given(labels)
        before = judge(standard.decode(latents)).argmax(1)
    assert float((shown == labels).double().mean()) > 0.95
    assert float((before == labels).double().mean()) < 0.5
