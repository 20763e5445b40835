"""Certificates say what is proved, and residuals are what they are called."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradinv_helpers as gi
from gradinv_helpers.attacks.certificate import (
    Certificate,
    LayerSolution,
    gradient_residual,
)
from gradinv_helpers.federated.aggregation import normalize


def certificate(
    residual: float = 1e-14,
    rank: int = 3072,
    condition: float = 10.0,
    layers: tuple[LayerSolution, ...] = (),
) -> Certificate:
    return Certificate("low rank", residual, 3072, rank, condition, layers)


def test_only_both_together_are_exact() -> None:
    assert certificate().exact
    assert not certificate(residual=1e-3).exact
    assert not certificate(rank=3000).exact
    assert not certificate(residual=math.inf).exact
    assert certificate(residual=1e-3).determined
    assert not certificate(rank=3000).determined


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (certificate(), "residual 1.0e-14, rank 3,072 of 3,072, exact"),
        (certificate(rank=72), "not exact: 3,000 directions are not in the update"),
        (certificate(residual=0.5), "not exact: the answer does not explain"),
        (
            certificate(rank=0, layers=(LayerSolution("4", 9, 5, math.inf),)),
            "not exact: layer 4 leaves its input open",
        ),
    ],
)
def test_it_speaks(given: Certificate, message: str) -> None:
    assert message in str(given)
    assert str(given).startswith("low rank: ")


def test_conditions_of_layers() -> None:
    assert LayerSolution("0", 5, 9, 1e6).determined
    assert not LayerSolution("0", 5, 9, 1e8).determined
    assert not LayerSolution("0", 5, 9, math.inf).determined


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, gi.Images, gi.Images]:
    images = gi.load_images("digits", split="test")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 20),
        nn.BatchNorm1d(20),
        nn.Tanh(),
        nn.Linear(20, 10),
    )
    return model.double(), images[[0, 1, 2]], images[[5, 6, 7]]


def flat_gradient(model: nn.Module, images: gi.Images) -> torch.Tensor:
    loss = F.cross_entropy(model(images.pixels.double()), images.labels)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in parts])


@pytest.mark.parametrize("training", [False, True])
def test_residual_is_the_relative_squared_distance(
    setting: tuple[nn.Module, gi.Images, gi.Images], training: bool
) -> None:
    model, truth, other = setting
    model.train(training)
    update = gi.local_update(model, truth)
    ours, theirs = (flat_gradient(model, images) for images in (truth, other))
    expected = float((ours - theirs).square().sum() / ours.square().sum())
    found = gradient_residual(update, other.pixels, other.labels)
    assert found == pytest.approx(expected, rel=1e-9)
    assert gradient_residual(update, truth.pixels, truth.labels) < 1e-25


def test_residual_of_a_normalised_gradient(
    setting: tuple[nn.Module, gi.Images, gi.Images],
) -> None:
    model, truth, other = setting
    model.eval()
    update = normalize(gi.local_update(model, truth))
    assert gradient_residual(update, truth.pixels, truth.labels) < 1e-25
    ours, theirs = (flat_gradient(model, images) for images in (truth, other))
    cosine = float(F.cosine_similarity(ours, theirs, dim=0))
    found = gradient_residual(update, other.pixels, other.labels)
    assert found == pytest.approx(2 - 2 * cosine, rel=1e-9)


def test_answers_that_are_not_finite(
    setting: tuple[nn.Module, gi.Images, gi.Images],
) -> None:
    model, truth, _ = setting
    model.eval()
    update = gi.local_update(model, truth)
    broken = torch.full_like(truth.pixels, math.nan)
    assert gradient_residual(update, broken, truth.labels) == math.inf
