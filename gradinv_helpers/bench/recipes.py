"""Published attacks, written as in their papers with nothing but PyTorch.

They are what the suites compare with and what tests of the engine are held against,
so they use nothing of it: one trial at a time, the ordinary optimisers of
``torch.optim``, and double backward through ``torch.autograd.grad``.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class RecipeResult:
    """Where a recipe ended.

    Args:
        images: Shape (N, C, H, W), clamped to [0, 1]; grey where it diverged.
        labels: Shape (N,).
        loss: Matching loss at the last evaluation.
        evaluations: Evaluations of the loss with its gradient.
        seconds: Wall time.
        diverged: Whether the last point holds NaN or infinite values.
    """

    images: Tensor
    labels: Tensor
    loss: float
    evaluations: int
    seconds: float
    diverged: bool


def deep_leakage(
    model: nn.Module,
    gradient: Sequence[Tensor],
    image_shape: tuple[int, int, int],
    *,
    num_images: int = 1,
    labels: Tensor | None = None,
    iterations: int = 300,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    seed: int = 0,
) -> RecipeResult:
    """Run Deep Leakage from Gradients.

    Dummy images and label logits start from N(0, 1); ``torch.optim.LBFGS`` with its
    defaults (step 1, 20 updates per iteration, history 100, no line search) minimises
    the squared distance of the gradients.

    Args:
        model: The model that the server sent out.
        gradient: Gradient of the mean cross-entropy, in the order of the parameters.
        image_shape: (C, H, W).
        num_images: Number N of images behind the gradient.
        labels: True labels (N,), if they are known; only the images are then fitted.
        iterations: Calls of the optimiser.
        mean: Images are ``mean + std * z`` for the unknown z; per channel (C, 1, 1).
        std: As ``mean``.
        seed: Seed of the start.

    Returns:
        The last point, as in the released code.

    Source: Zhu et al. (2019), Algorithm 1, and its released code.
    Taught in: notebooks/03_stronger_matching.
    """
    begun = time.perf_counter()
    z, label_logits = _dummies(model, gradient, image_shape, num_images, seed)
    mean, std = (torch.as_tensor(value).to(z) for value in (mean, std))
    unknowns = [z] if labels is not None else [z, label_logits]
    optimiser = torch.optim.LBFGS(unknowns)
    evaluations, latest = 0, float("nan")

    def squared_distance() -> Tensor:
        nonlocal evaluations, latest
        optimiser.zero_grad()
        if labels is not None:
            target = F.one_hot(labels, label_logits.shape[1]).to(z)
        else:
            target = label_logits.softmax(dim=-1)
        dummy = _gradient(model, mean + std * z, target)
        pairs = zip(dummy, gradient, strict=True)
        loss = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
        loss.backward(inputs=unknowns)
        evaluations, latest = evaluations + 1, loss.item()
        return loss

    for _ in range(iterations):
        optimiser.step(squared_distance)
    found = label_logits.argmax(dim=-1) if labels is None else labels
    seconds = time.perf_counter() - begun
    return _result(mean + std * z, found, latest, evaluations, seconds)


def inverting_gradients(
    model: nn.Module,
    gradient: Sequence[Tensor],
    image_shape: tuple[int, int, int],
    *,
    labels: Tensor,
    iterations: int = 4800,
    lr: float = 0.1,
    tv_weight: float = 0.01,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    seed: int = 0,
) -> RecipeResult:
    """Run Inverting Gradients: cosine distance, total variation, signed Adam.

    The step falls to a tenth at 3/8, 5/8 and 7/8 of the iterations, and every step
    ends in the box of valid pixels.

    Args:
        model: The model that the server sent out.
        gradient: Gradient of the mean cross-entropy, in the order of the parameters.
        image_shape: (C, H, W).
        labels: Known labels (N,).
        iterations: Steps of Adam.
        lr: Its first step size, in units of z.
        tv_weight: Weight of the mean absolute difference of neighbours in z.
        mean: Images are ``mean + std * z`` for the unknown z; per channel (C, 1, 1).
            The paper standardises CIFAR-10 by its statistics.
        std: As ``mean``.
        seed: Seed of the start.

    Returns:
        The last point.

    Source: Geiping et al. (2020), Section 4, and its released code.
    Taught in: notebooks/03_stronger_matching.
    """
    begun = time.perf_counter()
    z, label_logits = _dummies(model, gradient, image_shape, len(labels), seed)
    target = F.one_hot(labels, label_logits.shape[1]).to(z)
    mean, std = (torch.as_tensor(value).to(z) for value in (mean, std))
    black, white = (0 - mean) / std, (1 - mean) / std
    optimiser = torch.optim.Adam([z], lr=lr)
    drops = [iterations * eighths // 8 for eighths in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, drops, gamma=0.1)
    latest = float("nan")
    for _ in range(iterations):
        optimiser.zero_grad()
        dummy = _gradient(model, mean + std * z, target)
        loss = _cosine_distance(dummy, gradient) + tv_weight * _total_variation(z)
        loss.backward(inputs=[z])
        assert z.grad is not None
        z.grad.sign_()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            z.copy_(z.clamp(black, white))
        latest = loss.item()
    seconds = time.perf_counter() - begun
    return _result(mean + std * z, labels, latest, iterations, seconds)


def trials_in_a_loop(
    model: nn.Module,
    gradients: Sequence[Sequence[Tensor]],
    starts: Sequence[Tensor],
    *,
    labels: Sequence[Tensor],
    max_evaluations: Sequence[int],
) -> tuple[list[Tensor], list[int]]:
    """Run trials one after the other, each with L-BFGS and strong-Wolfe searches.

    Each trial minimises the squared distance of the gradients, relative to the shared
    one, over its images; labels are known.

    Args:
        model: The model that the server sent out.
        gradients: Shared gradient of every trial.
        starts: First images (N, C, H, W) of every trial.
        labels: Known labels (N,) of every trial.
        max_evaluations: When to stop each trial; a line search may go a little
            beyond.

    Returns:
        The last images of every trial, and its evaluations.

    Source: Zhu et al. (2019), Algorithm 1, with the line search of ``torch.optim``.
    Taught in: notebooks/03_stronger_matching.
    """
    trials = zip(gradients, starts, labels, max_evaluations, strict=True)
    ended = [_line_search_trial(model, *trial) for trial in trials]
    return [images for images, _ in ended], [count for _, count in ended]


def _line_search_trial(
    model: nn.Module,
    gradient: Sequence[Tensor],
    start: Tensor,
    labels: Tensor,
    max_evaluations: int,
) -> tuple[Tensor, int]:
    """Last images of one trial, and its evaluations."""
    x = start.clone().requires_grad_()
    scale = torch.stack([g.square().sum() for g in gradient]).sum()
    optimiser = torch.optim.LBFGS(
        [x],
        max_iter=max_evaluations,
        max_eval=max_evaluations,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def relative_distance() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        loss = squared_loss(model, gradient, x, labels=labels) / scale
        loss.backward(inputs=[x])
        return loss

    optimiser.step(relative_distance)
    return x.detach(), evaluations


def squared_loss(
    model: nn.Module, gradient: Sequence[Tensor], images: Tensor, *, labels: Tensor
) -> Tensor:
    """Squared distance between the gradient of images and a shared gradient.

    Args:
        model: The model.
        gradient: The shared gradient, in the order of the parameters.
        images: (N, C, H, W).
        labels: (N,).

    Returns:
        A scalar that can be differentiated with respect to the images.

    Source: Zhu et al. (2019), Algorithm 1.
    Taught in: notebooks/03_stronger_matching.
    """
    loss = F.cross_entropy(model(images), labels)
    dummy = torch.autograd.grad(loss, _trainable(model), create_graph=True)
    pairs = zip(dummy, gradient, strict=True)
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()


def label_by_row_sums(weight_gradient: Tensor) -> Tensor:
    """Pick the class whose row of the last layer's weight gradient sums lowest.

    Args:
        weight_gradient: Gradient of the last weight, (classes, features).

    Returns:
        One label, shape (1,).

    Source: Zhao et al. (2020), iDLG, as in its released code.
    Taught in: notebooks/03_stronger_matching.
    """
    return weight_gradient.sum(dim=1).argmin().reshape(1)


def labels_by_row_minima(weight_gradient: Tensor, num_images: int) -> Tensor:
    """Pick the N classes whose rows hold the most negative entries.

    Args:
        weight_gradient: Gradient of the last weight, (classes, features).
        num_images: Number N of images; their labels are taken to be different.

    Returns:
        N labels; fewer where there are fewer classes.

    Source: Yin et al. (2021), GradInversion, label restoration.
    Taught in: notebooks/03_stronger_matching.
    """
    return weight_gradient.amin(dim=1).argsort()[:num_images]


# --- pieces -----------------------------------------------------------------------


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _dummies(
    model: nn.Module,
    gradient: Sequence[Tensor],
    image_shape: tuple[int, int, int],
    num_images: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Standard normal unknowns of images and of label logits."""
    generator = torch.Generator().manual_seed(seed)
    like = gradient[0]
    z = torch.randn((num_images, *image_shape), generator=generator).to(like)
    with torch.no_grad():
        num_classes = model(z).shape[1]
    logits = torch.randn((num_images, num_classes), generator=generator).to(like)
    return z.requires_grad_(), logits.requires_grad_()


def _gradient(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Gradient of the mean cross-entropy with soft labels (N, K), with its graph."""
    loss = -(target * model(images).log_softmax(dim=-1)).sum(dim=-1).mean()
    return torch.autograd.grad(loss, _trainable(model), create_graph=True)


def _cosine_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of two gradients, all layers taken as one vector."""
    one, other = (torch.cat([g.flatten() for g in each]) for each in (first, second))
    return 1 - (one @ other) / (one.norm() * other.norm())


def _total_variation(z: Tensor) -> Tensor:
    """Mean absolute difference of vertical and of horizontal neighbours."""
    vertical = (z[..., 1:, :] - z[..., :-1, :]).abs().mean()
    return vertical + (z[..., :, 1:] - z[..., :, :-1]).abs().mean()


def _result(
    images: Tensor, labels: Tensor, loss: float, evaluations: int, seconds: float
) -> RecipeResult:
    diverged = not bool(images.isfinite().all())
    grey = torch.full_like(images, 0.5)
    pixels = (grey if diverged else images).detach().clamp(0, 1).float().cpu()
    found = labels.detach().cpu()
    return RecipeResult(pixels, found, loss, evaluations, seconds, diverged)
