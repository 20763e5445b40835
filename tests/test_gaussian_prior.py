"""Gaussian image priors against scipy, and against their own dense covariance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradinv_helpers.data import load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import (
    CovariancePrior,
    SpectrumPrior,
    cosine_transform,
    fit_gaussian,
    spectrum_prior,
)

SHAPES = ((3, 8, 8), (1, 7, 5), (3, 4, 9), (2, 5, 4), (1, 1, 1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def public(shape: tuple[int, int, int] = (3, 5, 6), count: int = 40) -> Tensor:
    """Images whose pixels and channels depend on one another."""
    raw = normal(count, *shape, seed=1).cumsum(-1).cumsum(-2)
    mixed = raw + 2 * raw.mean(1, keepdim=True)
    return (0.5 + 0.05 * mixed).clamp(0, 1)


def priors() -> dict[str, SpectrumPrior | CovariancePrior]:
    found: dict[str, SpectrumPrior | CovariancePrior] = {
        f"spectrum {shape}": spectrum_prior(shape) for shape in SHAPES
    }
    found["fitted spectrum"] = fit_gaussian(public())
    found["fitted covariance"] = fit_gaussian(public(), form="covariance")
    found["fitted, grey"] = fit_gaussian(public((1, 5, 4)), form="covariance")
    return found


PRIORS = priors()


def covariance_of(prior: SpectrumPrior | CovariancePrior) -> Tensor:
    """C = A Aᵀ, where A takes whitened coordinates to pixels."""
    eye = torch.eye(prior.size, dtype=torch.float64)
    columns = (prior.decode(eye) - prior.mean).flatten(1)
    return columns.T @ columns


def dct(pixels: Tensor) -> np.ndarray:
    return scipy.fft.dctn(pixels.numpy(), axes=(-2, -1), norm="ortho")


# --- the cosine transform ---------------------------------------------------------


@given(size=st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_cosine_transform_is_that_of_scipy(size: int) -> None:
    found = cosine_transform(size)
    expected = scipy.fft.dct(np.eye(size), norm="ortho", axis=0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, eye, rtol=0, atol=1e-12)


def test_cosine_transform_refuses_no_pixels() -> None:
    with pytest.raises(InputError, match="size"):
        cosine_transform(0)


# --- every prior ------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_encode_inverts_decode(name: str) -> None:
    prior = PRIORS[name]
    latents = normal(2, 3, prior.size)
    images = prior.decode(latents)
    assert images.shape == (2, 3, *prior.image_shape)
    # Directions of a variance of 1e-5 and less lose digits on the way.
    torch.testing.assert_close(prior.encode(images), latents, rtol=0, atol=1e-6)
    other = torch.rand(4, *prior.image_shape, dtype=torch.float64)
    back = prior.decode(prior.encode(other))
    torch.testing.assert_close(back, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", PRIORS)
def test_pull_back_is_the_transpose(name: str) -> None:
    prior = PRIORS[name]
    latents, at = normal(5, prior.size, seed=2), normal(5, prior.size, seed=3)
    slopes = normal(5, *prior.image_shape, seed=4)
    forth = prior.decode(latents) - prior.mean
    pulled = prior.pull_back(at, slopes)
    assert pulled.shape == latents.shape
    torch.testing.assert_close(
        (forth * slopes).flatten(1).sum(1), (latents * pulled).sum(1)
    )


@pytest.mark.parametrize("name", PRIORS)
def test_single_precision_agrees_with_double(name: str) -> None:
    prior = PRIORS[name]
    small = prior.to(torch.zeros(1))
    latents = normal(3, prior.size)
    images = small.decode(latents.float())
    assert images.dtype == torch.float32
    assert small.image_shape == prior.image_shape
    assert small.name == prior.name
    torch.testing.assert_close(
        images.double(), prior.decode(latents), rtol=0, atol=1e-5
    )
    assert small.pull_back(latents.float(), images).dtype == torch.float32
    assert small.encode(images).dtype == torch.float32


@pytest.mark.parametrize("name", PRIORS)
def test_zero_is_the_mean_image(name: str) -> None:
    prior = PRIORS[name]
    image = prior.decode(torch.zeros(prior.size, dtype=torch.float64))
    expected = prior.mean.expand(prior.image_shape)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-14)


# --- the spectrum of photographs --------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_covariance_is_diagonal_in_frequencies(
    shape: tuple[int, int, int], power: float
) -> None:
    channels, height, width = shape
    prior = spectrum_prior(shape, power=power, variance=0.05)
    found = covariance_of(prior).view(channels, height * width, channels, -1)
    down = scipy.fft.dct(np.eye(height), norm="ortho", axis=0)
    right = scipy.fft.dct(np.eye(width), norm="ortho", axis=0)
    both = torch.from_numpy(np.kron(down, right))
    bands = torch.einsum("ap,cpdq,bq->cadb", both, found, both)
    shares = torch.tensor(
        [(1 + y * y + x * x) ** -power for y in range(height) for x in range(width)]
    ).double()
    colour = bands[:, 0, :, 0] / bands[0, 0, 0, 0]
    variances = 0.05 * shares / shares.mean()
    scale = bands.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).mean(0)
    torch.testing.assert_close(scale, variances)  # mean over the channels
    expected = torch.einsum("cd,ab->cadb", colour, torch.diag(bands[0, :, 0, :].diag()))
    torch.testing.assert_close(bands, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_variance_is_the_stated_one(shape: tuple[int, int, int]) -> None:
    prior = spectrum_prior(shape, variance=0.04)
    variance = covariance_of(prior).diagonal()
    assert float(variance.mean()) == pytest.approx(0.04)


def test_neighbours_are_alike_and_distant_pixels_are_not() -> None:
    covariance = covariance_of(spectrum_prior((1, 16, 16))).view(16, 16, 16, 16)

    def correlation(y: int, x: int) -> float:
        own = covariance[8, 4, 8, 4] * covariance[8 + y, 4 + x, 8 + y, 4 + x]
        return float(covariance[8, 4, 8 + y, 4 + x] / own.sqrt())

    along = [correlation(0, step) for step in range(9)]
    assert along == sorted(along, reverse=True)
    assert along[1] > 0.6
    assert along[8] < 0.2
    white = covariance_of(spectrum_prior((1, 6, 6), power=0, variance=0.1))
    torch.testing.assert_close(white, 0.1 * torch.eye(36, dtype=torch.float64))


def test_colours_go_up_and_down_together() -> None:
    prior = spectrum_prior((3, 4, 4), colours=(2.6, 0.3, 0.1), variance=0.06)
    blocks = covariance_of(prior).view(3, 16, 3, 16)
    colour = blocks.diagonal(dim1=1, dim2=3).mean(-1)
    values, vectors = torch.linalg.eigh(colour)
    torch.testing.assert_close(
        values, 0.06 * torch.tensor([0.1, 0.3, 2.6], dtype=torch.float64)
    )
    grey = torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64)
    torch.testing.assert_close(vectors[:, 2].abs(), grey)
    torch.testing.assert_close(vectors[2, 1], torch.zeros_like(vectors[2, 1]))
    two = covariance_of(spectrum_prior((2, 3, 3))).view(2, 9, 2, 9)
    assert bool((two[0, :, 1, :] == 0).all())  # of unknown meaning: independent


def test_samples_have_the_covariance() -> None:
    prior = spectrum_prior((3, 4, 5))
    samples = prior.decode(normal(20000, prior.size))
    assert samples.mean() == pytest.approx(0.47, abs=0.005)
    found = torch.cov(samples.flatten(1).T)
    expected = covariance_of(prior)
    assert float((found - expected).norm() / expected.norm()) < 0.05


# --- fitted priors ----------------------------------------------------------------


def test_fitted_covariance_is_that_of_the_sample() -> None:
    images = public()
    prior = fit_gaussian(images, form="covariance", ridge=1e-4)
    flat = images.flatten(1).numpy()
    expected = np.cov(flat.T, bias=True) + 1e-4 * np.eye(flat.shape[1])
    np.testing.assert_allclose(covariance_of(prior).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(prior.mean.flatten(), flat.mean(0), atol=1e-14)
    assert isinstance(prior, CovariancePrior)


def test_fitted_spectrum_has_the_power_of_the_sample() -> None:
    images = public()
    prior = fit_gaussian(images, ridge=1e-4)
    assert isinstance(prior, SpectrumPrior)
    channels = images.mean((0, 2, 3))
    torch.testing.assert_close(prior.mean.flatten(), channels)
    power = (dct(images - channels[:, None, None]) ** 2).mean((0, 1)) + 1e-4
    np.testing.assert_allclose(prior.deviations.square().numpy(), power)
    # All of it together: the variance of the sample, and of the ridge.
    variance = float((images - channels[:, None, None]).square().mean())
    found = float(covariance_of(prior).diagonal().mean())
    assert found == pytest.approx(variance + 1e-4)


def test_fitted_spectrum_has_the_colours_of_the_sample() -> None:
    images = public()
    prior = fit_gaussian(images, ridge=1e-6)
    found = covariance_of(prior).view(3, 30, 3, 30).diagonal(dim1=1, dim2=3).sum(-1)
    by_channel = images.transpose(0, 1).flatten(1).numpy()
    expected = np.cov(by_channel, bias=True)
    np.testing.assert_allclose(
        (found / found.trace()).numpy(), expected / np.trace(expected), atol=1e-4
    )


def test_fit_finds_the_prior_that_made_the_images() -> None:
    truth = spectrum_prior((3, 6, 5), mean=0.3, variance=0.03, power=1.4)
    images = truth.decode(normal(4000, truth.size))
    found = fit_gaussian(images)
    assert isinstance(found, SpectrumPrior)
    ratio = found.deviations / truth.deviations
    assert float((ratio - 1).abs().max()) < 0.05
    torch.testing.assert_close(
        covariance_of(found), covariance_of(truth), rtol=0, atol=2e-3
    )
    torch.testing.assert_close(
        found.mean.flatten(), torch.full((3,), 0.3).double(), rtol=0, atol=0.01
    )


def test_no_image_is_impossible() -> None:
    grey = public((1, 4, 4)).expand(-1, 3, -1, -1)  # no colour in the sample
    alike = torch.full((5, 3, 4, 4), 0.5)  # no variance at all
    red = torch.zeros(3, 4, 4, dtype=torch.float64)
    red[0] = 1
    for images in (grey, alike):
        for form in ("spectrum", "covariance"):
            prior = fit_gaussian(images, form=form)
            latents = prior.encode(red)
            assert bool(latents.isfinite().all())
            torch.testing.assert_close(prior.decode(latents), red, atol=1e-6, rtol=0)


def test_photographs_are_likely() -> None:
    """The data-free prior finds photographs likelier than their shuffled pixels."""
    photos = load_images("photos", image_size=16).pixels[:20].double()
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(256, generator=generator)
    shuffled = photos.flatten(2)[:, :, places].view_as(photos)
    prior = spectrum_prior((3, 16, 16))
    cost, other = (prior.encode(x).square().mean(1) for x in (photos, shuffled))
    assert bool((cost < other).all())
    assert float(cost.mean()) < float(other.mean()) / 4
    assert 0.1 < float(cost.mean()) < 3  # 1 for images that the prior draws


# --- bad input --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum_prior((8, 8)), "image_shape: expected three integers"),
        (lambda: spectrum_prior((3, 8, 0)), "image_shape"),
        (lambda: spectrum_prior((3, 8, 8), variance=0), "variance"),
        (lambda: spectrum_prior((3, 8, 8), power=-1), "power"),
        (lambda: spectrum_prior((3, 8, 8), mean=math.nan), "mean"),
        (lambda: spectrum_prior((3, 8, 8), colours=(1, 1)), "colours"),
        (lambda: spectrum_prior((3, 8, 8), colours=(1, 1, 0)), "colours"),
        (lambda: fit_gaussian(torch.rand(1, 3, 8, 8)), "at least 2 images"),
        (lambda: fit_gaussian(torch.rand(3, 8, 8)), "at least 2 images"),
        (lambda: fit_gaussian(torch.rand(4, 3, 8, 8), form="dense"), "form"),
        (lambda: fit_gaussian(torch.rand(4, 3, 8, 8), ridge=0), "ridge"),
        (
            lambda: fit_gaussian(torch.rand(2, 3, 64, 64), form="covariance"),
            "use form='spectrum'",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
