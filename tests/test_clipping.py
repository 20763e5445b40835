"""Per-sample clipping against a loop over samples and automatic derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gradinv_helpers.attacks.clipping import clipped
from gradinv_helpers.attacks.gradients import gradient_map
from gradinv_helpers.errors import InputError

SHAPE, CLASSES = (1, 5, 5), 3


class Residual(nn.Module):
    """No chain: its gradients come from automatic differentiation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(25, 25), nn.Linear(25, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.last(flat + torch.tanh(self.first(flat)))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, CLASSES)
    )


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (chain() if kind == "chain" else Residual()).double()


def batches(trials: int = 2, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(trials, count, *SHAPE, generator=generator).double()
    logits = 3 * torch.randn(trials, count, CLASSES, generator=generator).double()
    return images, torch.softmax(logits, 2)


def per_sample(model: nn.Module, image: Tensor, target: Tensor) -> list[Tensor]:
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    logits = functional_call(model, weights, (image[None],))
    loss = -(target * F.log_softmax(logits, 1)).sum()
    return list(torch.autograd.grad(loss, list(weights.values()), create_graph=True))


def plain(model: nn.Module, images: Tensor, targets: Tensor, bound: float) -> list:
    """Clipped mean gradient of one batch, sample by sample."""
    total: list[Tensor] = []
    for image, target in zip(images, targets, strict=True):
        found = per_sample(model, image, target)
        norm = torch.cat([g.flatten() for g in found]).norm()
        parts = [g * (bound / norm).clamp(max=1) / len(images) for g in found]
        total = [t + p for t, p in zip(total, parts, strict=True)] if total else parts
    return total


def median_norm(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    pairs = zip(images.flatten(0, 1), targets.flatten(0, 1), strict=True)
    norms = [
        torch.cat([g.detach().flatten() for g in per_sample(model, x, y)]).norm()
        for x, y in pairs
    ]
    return float(torch.stack(norms).sort().values[3:5].mean())


@pytest.mark.parametrize("kind", ["chain", "module"])
def test_map_and_pull_back_are_those_of_a_loop(kind: str) -> None:
    model = build(kind)
    images, targets = batches()
    bound = median_norm(model, images, targets)  # some samples are clipped
    gradients, pullback = clipped(gradient_map(model), bound)(images, targets)
    generator = torch.Generator().manual_seed(2)
    along = [torch.randn(g.shape, generator=generator).double() for g in gradients]
    to_images, to_targets = pullback(along)
    for t in range(len(images)):
        x, y = images[t].requires_grad_(), targets[t].requires_grad_()
        expected = plain(model, x, y, bound)
        for found, own in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[t], own.detach())
        product = sum((e * v[t]).sum() for e, v in zip(expected, along, strict=True))
        slopes = torch.autograd.grad(product, [x, y])
        torch.testing.assert_close(to_images[t], slopes[0])
        if kind == "module":
            torch.testing.assert_close(to_targets[t], slopes[1])


def test_a_large_bound_changes_nothing() -> None:
    model, (images, targets) = build("chain"), batches()
    one, pull = gradient_map(model)(images, targets)
    other, pull_clipped = clipped(gradient_map(model), 1e6)(images, targets)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(pull(one)[0], pull_clipped(one)[0])


def test_the_norm_stays_within_the_bound() -> None:
    model, (images, targets) = build("chain"), batches()
    gradients, _ = clipped(gradient_map(model), 1e-2)(images[:, :1], targets[:, :1])
    norms = torch.cat([g.flatten(1) for g in gradients], 1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1e-2))


def test_a_gradient_of_zero_stays_zero() -> None:
    model = build("chain")
    images, _ = batches()
    with torch.no_grad():  # all classes equally likely, and so they are called
        model[-1].weight.zero_()
        model[-1].bias.zero_()
    targets = torch.full((2, 4, CLASSES), 1 / CLASSES, dtype=torch.float64)
    gradients, pullback = clipped(gradient_map(model), 1.0)(images, targets)
    assert all(not bool(g.abs().max() > 1e-15) for g in gradients)
    assert bool(pullback(gradients)[0].isfinite().all())


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf")])
def test_the_bound_must_be_positive(bound: float) -> None:
    with pytest.raises(InputError, match="clip_norm"):
        clipped(gradient_map(build("chain")), bound)
