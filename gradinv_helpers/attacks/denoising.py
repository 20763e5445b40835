r"""What a client that trains a diffusion model sends, and what it says of the steps.

Here the shared model is itself a denoiser :math:`\epsilon_\theta(x_t, t)`. For each
image the client draws a step t and noise :math:`\epsilon`, forms

.. math:: x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon

and sends the gradient of the mean of :math:`(\epsilon - \epsilon_\theta(x_t, t))^2`
over all images and pixels. With :math:`r = \epsilon_\theta(x_t, t) - \epsilon` and
:math:`J = \partial \epsilon_\theta / \partial \theta` that gradient is a multiple of
:math:`J(x_t, t)^\top r`: the image enters through :math:`x_t` alone, the noise through
:math:`x_t` and, linearly, through r. An attack that knows neither can at best find
both, and then :math:`x_0 = (x_t - \sqrt{1 - \bar\alpha_t}\,\epsilon) /
\sqrt{\bar\alpha_t}`, with an error that grows as :math:`1 / \sqrt{\bar\alpha_t}`.

The step itself is no secret: the first layer of the time embedding is linear, and its
gradient is made of the embedded steps.

Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradinv_helpers.compute import private_randomness
from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed
from gradinv_helpers.updates import _checked, _without_caches

Prediction = Literal["epsilon", "v_prediction"]
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, kw_only=True)
class DenoisingUpdate:
    """What the server sees of a client that trains a diffusion model.

    There is no place for images, noise or steps.

    Args:
        model: The denoiser before the update; a copy is kept.
        tensors: Gradient of every trainable parameter, same names and shapes.
        num_samples: Number of images behind the gradient.
        image_shape: Shape (C, H, W) of an image.
        alphas_cumprod: Noise schedule (T,): the share of the image's variance that is
            left at each step.
        prediction: What the model predicts: the noise (``epsilon``) or the velocity
            (``v_prediction``).

    Raises:
        InputError: A tensor is missing, unknown, of a wrong shape, or not finite; the
            schedule is not a falling sequence within (0, 1].

    Source: Ho et al. (2020) for the loss; Salimans and Ho (2022) for the velocity.
    Taught in: notebooks/06_diffusion_prior.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    num_samples: int
    image_shape: tuple[int, int, int]
    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError("model", "a torch.nn.Module", type(self.model).__name__)
        check_count("num_samples", self.num_samples)
        check_choice("prediction", self.prediction, PREDICTIONS)
        shape = tuple(self.image_shape)
        if len(shape) != 3:
            raise InputError("image_shape", "three integers (C, H, W)", repr(shape))
        for side in shape:
            check_count("image_shape", side)
        expected = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for name, value in {
            "tensors": _checked("tensors", self.tensors, expected),
            "model": _without_caches(self.model, shape),
            "image_shape": shape,
            "alphas_cumprod": _schedule(self.alphas_cumprod),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def num_steps(self) -> int:
        """Steps T of the noise schedule."""
        return len(self.alphas_cumprod)

    def __repr__(self) -> str:
        return (
            f"DenoisingUpdate({self.prediction} gradient of {self.num_samples} samples "
            f"for {type(self.model).__name__}, {self.num_steps} steps)"
        )


def denoising_update(
    model: nn.Module,
    images: Tensor,
    *,
    schedule: Any,
    timesteps: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    prediction: Prediction = "epsilon",
    seed: int = 0,
) -> DenoisingUpdate:
    """Compute what a client that trains a diffusion model sends to the server.

    Args:
        model: Any denoiser called as ``model(x_t, timesteps)``, such as diffusers'
            ``UNet2DModel``; it is left as it was.
        images: The client's private images (N, C, H, W) in [0, 1]; the model sees
            them scaled to [-1, 1].
        schedule: A noise schedule (T,), or a diffusers scheduler that has one.
        timesteps: Steps (N,) from 0 to T - 1; drawn uniformly if not given.
        noise: Standard normal noise like ``images``; drawn if not given.
        prediction: What the model is trained to predict.
        seed: Seed of what is drawn.

    Returns:
        The update, free of images, noise and steps.

    Raises:
        InputError: A shape does not fit, or a step is out of range.

    Source: Ho et al. (2020), Algorithm 1.
    Taught in: notebooks/06_diffusion_prior.
    """
    check_seed("seed", seed)
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) == 0:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images)
        raise InputError("images", "a tensor of shape (N, C, H, W)", got)
    alphas = _schedule(getattr(schedule, "alphas_cumprod", schedule))
    like = next(model.parameters())
    drawing = torch.Generator().manual_seed(seed)
    if timesteps is None:
        timesteps = torch.randint(len(alphas), (len(images),), generator=drawing)
    if noise is None:
        noise = torch.randn(images.shape, generator=drawing)
    steps = check_steps("timesteps", timesteps, len(images), len(alphas))
    checked = check_noise("noise", noise, tuple(images.shape))
    worker = _without_caches(model, tuple(images.shape[1:]))
    sent = DenoisingMap(worker, steps, alphas, prediction)
    with private_randomness(seed, like.device):  # of any dropout
        gradients, _ = sent(images[None].to(like), checked[None].to(like))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return DenoisingUpdate(
        model=model,
        tensors={n: g[0] for n, g in zip(names, gradients, strict=True)},
        num_samples=len(images),
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        alphas_cumprod=alphas,
        prediction=prediction,
    )


class DenoisingMap:
    """Gradients of the denoising loss for many trials, and the way back.

    Args:
        model: The denoiser.
        timesteps: Steps (N,), the same for every trial.
        alphas_cumprod: Noise schedule (T,).
        prediction: What the model predicts.

    Taught in: notebooks/06_diffusion_prior.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: Tensor,
        alphas_cumprod: Tensor,
        prediction: Prediction,
    ):
        self.model = model
        named = list(model.named_parameters())
        self.trained = {n: p for n, p in named if p.requires_grad}
        self.fixed = {n: p.detach() for n, p in named if not p.requires_grad}
        like = next(iter(self.trained.values()))
        self.timesteps = timesteps.to(like.device)
        alphas = alphas_cumprod.double().cpu()[timesteps.cpu()]
        self.signal = alphas.sqrt()[:, None, None, None].to(like)
        self.spread = (1 - alphas).sqrt()[:, None, None, None].to(like)
        self.prediction = prediction

    def __call__(
        self, images: Tensor, noise: Tensor
    ) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Tensor, Tensor]]]:
        """Gradients, each (A, ...), of trials with images and noise (A, N, C, H, W).

        The second result maps derivatives by the gradients to those by images and
        noise, once.
        """
        images = images.detach().requires_grad_()
        noise = noise.detach().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            rows = [self._one(x, e) for x, e in zip(images, noise, strict=True)]
            gradients = [torch.stack(column) for column in zip(*rows, strict=True)]

        def pullback(slopes: list[Tensor]) -> tuple[Tensor, Tensor]:
            pairs = zip(gradients, slopes, strict=True)
            useful = [(g, v) for g, v in pairs if g.requires_grad]
            to_images, to_noise = torch.autograd.grad(
                [g for g, _ in useful], [images, noise], [v for _, v in useful]
            )
            return to_images, to_noise

        return [g.detach() for g in gradients], pullback

    def _one(self, images: Tensor, noise: Tensor) -> list[Tensor]:
        weights = {n: p.detach().requires_grad_() for n, p in self.trained.items()}
        clean = 2 * images - 1
        noisy = self.signal * clean + self.spread * noise
        target = noise
        if self.prediction == "v_prediction":
            target = self.signal * noise - self.spread * clean
        state = {**weights, **self.fixed}
        answer = functional_call(self.model, state, (noisy, self.timesteps))
        predicted = answer if isinstance(answer, Tensor) else answer[0]
        if predicted.shape != target.shape:
            raise InputError(
                "model", f"a prediction {tuple(target.shape)}", tuple(predicted.shape)
            )
        loss = (target - predicted).square().mean()
        found = torch.autograd.grad(
            loss, list(weights.values()), create_graph=True, allow_unused=True
        )
        pairs = zip(found, weights.values(), strict=True)
        return [torch.zeros_like(w) if g is None else g for g, w in pairs]


def check_steps(argument: str, value: Any, count: int, total: int) -> Tensor:
    """Steps (N,) as integers from 0 to ``total`` - 1."""
    steps = torch.as_tensor(value)
    if steps.dim() == 0:
        steps = steps.expand(count)
    if steps.shape != (count,) or steps.is_floating_point():
        raise InputError(argument, f"{count} integers", tuple(steps.shape))
    low, high = int(steps.min()), int(steps.max())
    if low < 0 or high >= total:
        raise InputError(argument, f"steps from 0 to {total - 1}", f"{low} to {high}")
    return steps.long().cpu()


def check_noise(argument: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """Noise of the shape of the images, finite."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(argument, f"a tensor of shape {shape}", got)
    if not bool(value.isfinite().all()):
        raise InputError(argument, "finite numbers", "NaN or infinite values")
    return value.detach()


def _schedule(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 1 or len(value) == 0:
        raise InputError(
            "schedule", "alphas_cumprod of shape (T,)", type(value).__name__
        )
    found = value.detach().double().cpu().clone()
    falls = bool((found.diff() <= 0).all())
    if not falls or not 0 < float(found[-1]) <= float(found[0]) <= 1:
        raise InputError("schedule", "numbers that fall within (0, 1]", "others")
    return found
