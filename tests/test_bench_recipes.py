"""The published recipes: what their papers prescribe, and that they work."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.plan import make_plan
from gradinv_helpers.attacks.problem import MatchingProblem
from gradinv_helpers.bench import recipes
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import local_update

SIZE = 12


@pytest.fixture(scope="module")
def pool() -> Images:
    return load_images("digits", split="test", image_size=SIZE)


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    return build_model("lenet", in_channels=1, image_size=SIZE, num_classes=10)


def gradient_of(model: nn.Module, images: Images) -> list[Tensor]:
    return list(local_update(model, images).tensors.values())


def gain(found: recipes.RecipeResult, truth: Images) -> float:
    """Decibels above the best constant image."""
    result = score(found, truth)
    return result.psnr[0] - result.floors["constant"].psnr[0]


def test_recipes_use_nothing_of_the_engine(root: Path) -> None:
    text = (root / "gradinv_helpers" / "bench" / "recipes.py").read_text("utf-8")
    tree = ast.parse(text)
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "torch" in modules
    assert not any("gradinv" in str(module) for module in modules)


# --- Deep Leakage from Gradients --------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_deep_leakage_recovers_an_image(lenet, pool, known: bool) -> None:
    truth = pool[[3]]
    labels = truth.labels if known else None
    found = recipes.deep_leakage(
        lenet, gradient_of(lenet, truth), truth.shape, labels=labels, iterations=40
    )
    assert gain(found, truth) > 30
    assert found.labels.tolist() == truth.labels.tolist()
    assert not found.diverged
    assert found.loss < 1e-4
    assert 40 <= found.evaluations <= 40 * 25


def test_deep_leakage_uses_the_defaults_of_lbfgs(lenet, pool, monkeypatch) -> None:
    seen = []
    step = torch.optim.LBFGS.step

    def spy(self, closure):
        seen.append({k: v for k, v in self.param_groups[0].items() if k != "params"})
        return step(self, closure)

    monkeypatch.setattr(torch.optim.LBFGS, "step", spy)
    truth = pool[[0]]
    recipes.deep_leakage(lenet, gradient_of(lenet, truth), truth.shape, iterations=3)
    assert len(seen) == 3
    for group in seen:
        assert (group["lr"], group["max_iter"], group["history_size"]) == (1, 20, 100)
        assert group["line_search_fn"] is None


def test_a_run_that_diverges_is_grey_and_says_so(lenet, pool) -> None:
    truth = pool[[0]]
    gradient = [1e30 * g for g in gradient_of(lenet, truth)]
    found = recipes.deep_leakage(lenet, gradient, truth.shape, iterations=2)
    assert found.diverged
    assert (found.images == 0.5).all()


def test_seeds_decide_the_start(lenet, pool) -> None:
    gradient = gradient_of(lenet, pool[[0]])
    runs = [
        recipes.deep_leakage(lenet, gradient, pool.shape, iterations=1, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].images, runs[1].images)
    assert not torch.equal(runs[0].images, runs[2].images)


# --- Inverting Gradients ----------------------------------------------------------


def test_inverting_gradients_recovers_an_image(lenet, pool) -> None:
    truth = pool[[5]]
    found = recipes.inverting_gradients(
        lenet,
        gradient_of(lenet, truth),
        truth.shape,
        labels=truth.labels,
        iterations=200,
    )
    assert gain(found, truth) > 5
    assert found.evaluations == 200


def test_the_step_falls_three_times_and_starts_with_the_sign(
    lenet, pool, monkeypatch
) -> None:
    steps: list[float] = []
    signs: list[Tensor] = []
    step = torch.optim.Adam.step

    def spy(self, closure=None):
        steps.append(self.param_groups[0]["lr"])
        signs.append(self.param_groups[0]["params"][0].grad.abs())
        return step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    truth = pool[[0]]
    recipes.inverting_gradients(
        lenet, gradient_of(lenet, truth), truth.shape, labels=truth.labels, iterations=8
    )
    expected = [0.1] * 3 + [0.01] * 2 + [0.001] * 2 + [0.0001]
    assert steps == pytest.approx(expected)
    assert all(((s == 1) | (s == 0)).all() for s in signs)


def test_unknowns_are_standardised_pixels(lenet, pool) -> None:
    """The first step of Adam moves every unknown by its step size."""
    truth = pool[[0]]
    mean, std = torch.tensor([[[0.5]]]), torch.tensor([[[0.1]]])
    found = recipes.inverting_gradients(
        lenet,
        gradient_of(lenet, truth),
        truth.shape,
        labels=truth.labels,
        iterations=3,  # the step falls to a hundredth after the first
        mean=mean,
        std=std,
        seed=4,
    )
    generator = torch.Generator().manual_seed(4)
    start = mean + std * torch.randn(1, *truth.shape, generator=generator)
    inside = ((start > 0.05) & (start < 0.95)).expand_as(found.images)
    moved = (found.images - start).abs()[inside]
    assert torch.allclose(moved, torch.tensor(0.01), atol=2e-4)
    assert found.images.min() >= 0
    assert found.images.max() <= 1


def test_cosine_does_not_see_the_scale(lenet, pool) -> None:
    truth = pool[[1]]
    gradient = gradient_of(lenet, truth)
    runs = [
        recipes.inverting_gradients(
            lenet,
            [factor * g for g in gradient],
            truth.shape,
            labels=truth.labels,
            iterations=5,
        )
        for factor in (1.0, 8.0)
    ]
    assert torch.allclose(runs[0].images, runs[1].images, atol=1e-4)


# --- the loop over trials ---------------------------------------------------------


def test_trials_in_a_loop_are_independent(lenet, pool) -> None:
    gradients = [gradient_of(lenet, pool[[i]]) for i in range(2)]
    labels = [pool[[i]].labels for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, 1, *pool.shape), generator=generator)
    starts = list(0.5 + 0.05 * noise)
    both, counts = recipes.trials_in_a_loop(
        lenet, gradients, starts, labels=labels, max_evaluations=[60, 30]
    )
    alone, _ = recipes.trials_in_a_loop(
        lenet, gradients[1:], starts[1:], labels=labels[1:], max_evaluations=[30]
    )
    assert torch.equal(both[1], alone[0])
    assert counts[0] == pytest.approx(60, abs=25)
    assert counts[1] == pytest.approx(30, abs=25)
    before, after = (
        recipes.squared_loss(lenet, gradients[0], x, labels=labels[0])
        for x in (starts[0], both[0])
    )
    assert after < 1e-3 * before


def test_the_engine_has_the_loss_and_gradient_of_the_recipe(lenet, pool) -> None:
    """Two implementations, one by hand-written products, one by double backward."""
    model = build_model("lenet", in_channels=1, image_size=SIZE, num_classes=10)
    model.double()
    updates = [local_update(model, pool[[i]]) for i in range(3)]
    labels = [pool[[i]].labels for i in range(3)]
    problem = MatchingProblem(updates, make_plan(updates, "dlg", labels=labels))
    generator = torch.Generator().manual_seed(0)
    points = torch.rand((3, SIZE * SIZE), generator=generator, dtype=torch.float64)
    losses, gradients = problem.evaluate(points, torch.arange(3))
    for i, update in enumerate(updates):
        shared = list(update.tensors.values())
        x = points[i].reshape(1, *pool.shape).requires_grad_()
        scale = sum(g.square().sum() for g in shared)
        loss = recipes.squared_loss(model, shared, x, labels=labels[i]) / scale
        (expected,) = torch.autograd.grad(loss, x)
        assert losses[i].item() == pytest.approx(loss.item(), rel=1e-9)
        assert torch.allclose(gradients[i], expected.flatten(), rtol=1e-6, atol=1e-12)


def test_the_loss_is_zero_at_the_truth(lenet, pool) -> None:
    truth = pool[[2]]
    gradient = gradient_of(lenet, truth)
    loss = recipes.squared_loss(lenet, gradient, truth.pixels, labels=truth.labels)
    assert loss.item() == pytest.approx(0, abs=1e-10)


# --- labels -----------------------------------------------------------------------


def test_label_rules_read_a_relu_network(pool) -> None:
    model = build_model("mlp", in_channels=1, image_size=SIZE, num_classes=10)
    weight = "3.weight"
    one = local_update(model, pool[[7]]).tensors[weight]
    assert recipes.label_by_row_sums(one).tolist() == pool[[7]].labels.tolist()
    first_of_each = [int((pool.labels == c).nonzero()[0]) for c in (2, 5, 8)]
    three = local_update(model, pool[first_of_each]).tensors[weight]
    assert sorted(recipes.labels_by_row_minima(three, 3).tolist()) == [2, 5, 8]
    assert len(recipes.labels_by_row_minima(three, 99)) == 10
