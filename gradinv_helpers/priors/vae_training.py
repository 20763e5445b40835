"""Train a VAE prior on public images, and measure it on held-out ones.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.compute import cpu_threads, private_randomness
from gradinv_helpers.data import Images
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.priors.gaussian import CovariancePrior, SpectrumPrior, fit_gaussian
from gradinv_helpers.priors.vae import VAEPrior
from gradinv_helpers.priors.vae_codes import CodeLaw, fit_code_law
from gradinv_helpers.priors.vae_files import spectral
from gradinv_helpers.priors.vae_network import (
    REDUCTIONS,
    VAENetwork,
    elbo_terms,
    span_of,
    vae_loss,
)

_WARM_UP = 0.2  # share of the steps in which the divergence's weight rises
_RISE = 0.1  # share of the steps in which the step size rises
_VARIANCE_RATE = 20  # its logarithm moves that much faster than the weights
_DRAWS, _WEIGHTED_DRAWS = 16, 64  # per held-out image
_MOST_DENSE = 512  # values of an image whose residuals get a dense covariance


@dataclass(frozen=True)
class VAEEpoch:
    """What happened in one epoch of training.

    Attributes:
        epoch: Number of the epoch, from 1.
        epochs: Number of epochs in all.
        reconstruction: Mean negative log p(x | z) in nats per training image.
        divergence: Mean KL divergence in nats per training image.
        beta: Weight of the divergence at the end of the epoch.
        held_out_elbo: Mean evidence lower bound of the held-out images, one draw each,
            with codes of the law N(0, I).
        held_out_divergence: Their mean KL divergence, in nats per image.
    """

    epoch: int
    epochs: int
    reconstruction: float
    divergence: float
    beta: float
    held_out_elbo: float
    held_out_divergence: float


def train_vae(
    images: Images,
    *,
    epochs: int = 50,
    latent_size: int = 16,
    seed: int = 0,
    beta: float = 1.0,
    reduction: str = "sum",
    conditional: bool = True,
    width: int = 32,
    hidden: int = 128,
    batch_size: int = 64,
    lr: float = 3e-3,
    held_out: float = 0.1,
    name: str = "vae",
    on_epoch: Callable[[VAEEpoch], None] | None = None,
) -> VAEPrior:
    """Train a VAE on public images by the evidence lower bound.

    A random share of the images is held out: it picks the best epoch, says how much
    the decoder misses, and is what the likelihoods are measured on. The weight of the
    divergence rises linearly over the first fifth of the steps, so that the latents
    come into use. At the end the codes of each class get their own mean and covariance
    (``fit_code_law``). Where the images fill a linear subspace only, as enlarged ones
    do, the decoder's images are kept to it. The same call gives the same weights.

    Args:
        images: Public images; use the ``train`` split, victims come from ``test``.
        epochs: Passes over the images that are not held out.
        latent_size: Latents per image.
        seed: Seed of the weights, of the order and of the images held out.
        beta: Weight of the divergence; 1 for the bound.
        reduction: ``sum``, or the mistake ``mean``; see ``vae_loss``.
        conditional: Whether encoder and decoder are told the class.
        width: Channels of the first convolution.
        hidden: Units of the fully connected layers.
        batch_size: Images per step.
        lr: Largest step size of Adam; it falls to zero along a cosine.
        held_out: Share of the images held out, above 0 and below 1.
        name: What the prior is called in reports.
        on_epoch: Called after every epoch, for a progress bar.

    Returns:
        The prior of the best epoch, with ``about["history"]``. After Ctrl-C, the best
        so far.

    Raises:
        InputError: An argument is out of range, or the loss is not finite.

    Source: Kingma and Welling (2014); Bowman et al. (2016) for the rising weight.
    Taught in: notebooks/05_vae_prior.
    """
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_seed("seed", seed)
    check_number("beta", beta)
    check_number("lr", lr, exclusive=True)
    check_choice("reduction", reduction, REDUCTIONS)
    recipe = {
        "epochs": epochs,
        "seed": seed,
        "beta": beta,
        "reduction": reduction,
        "batch_size": batch_size,
        "lr": lr,
        "held_out": held_out,
    }
    chosen, kept = _split(len(images), held_out, seed)
    with private_randomness(seed, torch.device("cpu")):
        network = VAENetwork(
            images.shape,
            latent_size=latent_size,
            num_classes=images.num_classes if conditional else 0,
            width=width,
            hidden=hidden,
            span=span_of(images[chosen].pixels),
        )
        if network.span:
            network.keep_to_span(images[chosen].pixels)
        training = _Training(network, images[chosen], images[kept], recipe, on_epoch)
        interrupted = training.run()
    prior, measures = measured(training.prior(), images[chosen], images[kept], seed)
    about = {
        "training": {
            **recipe,
            "conditional": conditional,
            "best_epoch": training.best_epoch,
            "interrupted": interrupted,
        },
        "class_names": list(images.class_names),
        "train_indices": chosen.tolist(),
        "held_out_indices": kept.tolist(),
        "held_out": measures,
        "history": [asdict(epoch) for epoch in training.history],
    }
    return replace(prior, about=about, name=name)


class _Training:
    """One training: its network, its optimiser and the best weights so far."""

    def __init__(
        self,
        network: VAENetwork,
        images: Images,
        held_out: Images,
        recipe: dict[str, Any],
        on_epoch: Callable[[VAEEpoch], None] | None,
    ):
        self.network, self.recipe, self.on_epoch = network, recipe, on_epoch
        self.images, self.held_out = images, held_out
        seed = recipe["seed"]
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = math.ceil(len(images) / recipe["batch_size"])
        self.steps, self.done = recipe["epochs"] * self.batches, 0
        spread = network.log_variance
        weights = [w for w in network.parameters() if w is not spread]
        rates = [
            {"params": weights, "lr": recipe["lr"]},
            {"params": [spread], "lr": _VARIANCE_RATE * recipe["lr"]},
        ]
        self.optimiser = torch.optim.Adam(rates)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._rate)
        self.history: list[VAEEpoch] = []
        self.best, self.best_epoch, self.lowest = network.state_dict(), 0, math.inf

    def run(self) -> bool:
        """Train, and leave the best weights in the network; True after Ctrl-C."""
        interrupted = False
        work = 40 * self.images.pixels[0].numel() * self.recipe["batch_size"]
        with cpu_threads(work * self.network.width**2 // 100):
            try:
                for epoch in range(1, self.recipe["epochs"] + 1):
                    self._run_epoch(epoch)
            except KeyboardInterrupt:
                if not self.best_epoch:
                    raise
                interrupted = True
        self.network.load_state_dict(self.best)
        return interrupted

    def prior(self) -> VAEPrior:
        """The network with a residual that is yet to be measured."""
        channels, *sides = self.network.image_shape
        return VAEPrior(self.network, spectral(torch.ones(sides), torch.eye(channels)))

    def _run_epoch(self, epoch: int) -> None:
        order = torch.randperm(len(self.images), generator=self.generator)
        sums = torch.zeros(2)
        for batch in order.tensor_split(self.batches):
            terms = self._terms(self.images, batch)
            loss = self._loss(*terms, self._beta())
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            self.done += 1
            sums += torch.stack([term.detach().sum() for term in terms])
        with torch.no_grad():
            unseen = self._terms(self.held_out, torch.arange(len(self.held_out)))
            reached = float(self._loss(*unseen, self.recipe["beta"]))
        means = (sums / len(order)).tolist()
        if not all(map(math.isfinite, [reached, *means])):
            hint = "use a smaller lr, or look for NaN in the images"
            got = f"{reached} in epoch {epoch} with lr={self.recipe['lr']:g}"
            raise InputError("lr", "a finite training loss", got, hint)
        if reached < self.lowest:
            self.lowest, self.best_epoch = reached, epoch
            self.best = copy.deepcopy(self.network.state_dict())
        reconstruction, divergence = (float(term.mean()) for term in unseen)
        report = VAEEpoch(
            epoch=epoch,
            epochs=self.recipe["epochs"],
            reconstruction=means[0],
            divergence=means[1],
            beta=self._beta(),
            held_out_elbo=-reconstruction - divergence,
            held_out_divergence=divergence,
        )
        self.history.append(report)
        if self.on_epoch is not None:
            self.on_epoch(report)

    def _terms(self, images: Images, rows: Tensor) -> tuple[Tensor, Tensor]:
        network = self.network
        shape = (len(rows), network.latent_size)
        noise = torch.randn(shape, generator=self.generator)
        classes = torch.zeros(len(rows), 0)
        if network.num_classes:
            classes = F.one_hot(images.labels[rows], network.num_classes).float()
        return elbo_terms(network, images.pixels[rows], classes, noise)

    def _loss(self, reconstruction: Tensor, divergence: Tensor, beta: float) -> Tensor:
        reduction = self.recipe["reduction"]
        return vae_loss(
            self.network, reconstruction, divergence, beta=beta, reduction=reduction
        )

    def _beta(self) -> float:
        share = (self.done + 1) / max(1.0, _WARM_UP * self.steps)
        return float(self.recipe["beta"]) * min(1.0, share)

    def _rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1.0, _RISE * self.steps))
        return rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def fitted_residual(
    prior: VAEPrior,
    images: Images,
    held_out: Images,
    *,
    form: str = "spectrum",
    seed: int = 0,
) -> SpectrumPrior | CovariancePrior:
    """The Gaussian of x - D(z, y) over images and draws z of the encoder.

    Its shape comes from the training images, which are many; its scale from images
    that the training has not seen, whose residuals are larger. Both maximise the
    evidence lower bound of their images, decoder and encoder being fixed.

    Args:
        prior: The VAE.
        images: Labelled images that it was trained on.
        held_out: Labelled images that it was not trained on.
        form: ``spectrum`` or ``covariance``, as for ``fit_gaussian``.
        seed: Seed of the draws.

    Taught in: notebooks/05_vae_prior.
    """
    gaps = _drawn_gaps(prior, images, seed)
    shape = fit_gaussian(torch.cat([gaps, -gaps]), form=form)  # so its mean is 0
    unseen = _drawn_gaps(prior, held_out, seed).double()
    if isinstance(shape, CovariancePrior):
        shape = replace(shape, mean=torch.zeros_like(shape.mean))
        scale = shape.encode(unseen).square().mean().sqrt()
        shape = replace(shape, root=scale * shape.root, name="residuals")
    else:
        shape = spectral(shape.deviations, shape.colours)
        scale = shape.encode(unseen).square().mean().sqrt()
        shape = spectral(scale * shape.deviations, shape.colours)
    return shape.to(prior.network.log_variance)


def fitted_codes(prior: VAEPrior, images: Images) -> CodeLaw:
    """The law of the encoder's codes over labelled images, class by class.

    Taught in: notebooks/05_vae_prior.
    """
    network = prior.network
    classes = torch.zeros(len(images), 0)
    if network.num_classes:
        classes = F.one_hot(images.labels, network.num_classes).float()
    with torch.no_grad():
        means, log_variances = network.encode(images.pixels, classes)
    return fit_code_law(means, log_variances.exp(), classes)


def _drawn_gaps(prior: VAEPrior, images: Images, seed: int) -> Tensor:
    draws = prior.posterior_draws(images, samples=2, seed=seed)
    return torch.cat([(pixels - drawn).flatten(0, 1) for pixels, drawn, _ in draws])


def measured(
    prior: VAEPrior, images: Images, held_out: Images, seed: int = 0
) -> tuple[VAEPrior, dict[str, Any]]:
    """Fit the laws of codes and residual, and measure the prior on held-out images.

    The form of the residual's covariance is the one under which held-out images are
    more likely.

    Returns:
        The prior with both laws; likelihoods in nats per image, PSNRs in dB. Beside
        the bound stands ``standard_elbo``, that with codes of the law N(0, I).
    """
    plain = replace(prior, codes=None)
    standard = float(plain.elbo(held_out, samples=_DRAWS, seed=seed).mean())
    prior = replace(prior, codes=fitted_codes(prior, images))
    small = math.prod(prior.image_shape) <= _MOST_DENSE
    made = {
        form: replace(
            prior,
            residual=fitted_residual(prior, images, held_out, form=form, seed=seed),
        )
        for form in (("spectrum", "covariance") if small else ("spectrum",))
    }
    bounds = {
        form: float(one.soft().elbo(held_out, samples=_DRAWS, seed=seed).mean())
        for form, one in made.items()
    }
    form = max(bounds, key=lambda name: bounds[name])
    best = made[form]
    hard, soft = (
        float(one.log_likelihood(held_out, samples=_WEIGHTED_DRAWS, seed=seed).mean())
        for one in (best, best.soft())
    )
    rebuilt, pixels = prior.given(held_out.labels), held_out.pixels
    measures = {
        "images": len(held_out),
        "elbo": float(prior.elbo(held_out, samples=_DRAWS, seed=seed).mean()),
        "standard_elbo": standard,
        "log_likelihood": hard,
        "residual": form,
        "soft_elbo": bounds[form],
        "soft_log_likelihood": soft,
        "samples": _WEIGHTED_DRAWS,
        "noise_std": prior.noise_std,
        "reconstruction_psnr": _psnr(rebuilt.decode(rebuilt.encode(pixels)), pixels),
        "mean_image_psnr": _psnr(images.pixels.mean(0).expand_as(pixels), pixels),
    }
    return best, measures


def _psnr(found: Tensor, wanted: Tensor) -> float:
    """Mean PSNR in dB, 200 at most."""
    errors = (found - wanted).double().flatten(1).square().mean(1).clamp_min(1e-20)
    return float(-10 * errors.log10().mean())


def _split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted places of the images to train on, and of those held out."""
    check_number("held_out", share, exclusive=True)
    number = max(1, round(share * count))
    if share >= 1 or count - number < 2:
        expected = "a share that leaves two images to train on"
        raise InputError("held_out", expected, f"{share:g} of {count} images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[number:].sort().values, order[:number].sort().values
