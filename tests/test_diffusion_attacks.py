"""Attacks with a diffusion prior: better than their floor, reproducible, never NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.diffusion_latent import diffusion_latent
from gradinv_helpers.attacks.diffusion_posterior import diffusion_posterior
from gradinv_helpers.attacks.gradinvdiff import aligned_noise, gradinvdiff
from gradinv_helpers.attacks.guidance import Guide, reverse_step, unit
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.diffusion import DiffusionPrior, train_diffusion
from gradinv_helpers.updates import SharedUpdate, local_update

pytest.importorskip("diffusers")

ATTACKS = {
    "diffusion-latent": diffusion_latent,
    "diffusion-posterior": diffusion_posterior,
    "gradinvdiff": gradinvdiff,
}
SHORT = {
    "diffusion-latent": {"steps": 3, "decoding_steps": 2, "restarts": 2},
    "diffusion-posterior": {"steps": 3, "draws": 2},
    "gradinvdiff": {"steps": 3, "inner_steps": 2, "restarts": 2},
}


def victims(count: int, side: int = 8, seed: int = 0) -> Images:
    pool = load_images("digits", split="test", image_size=side)
    generator = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(len(pool), generator=generator)[:count]]


def network(images: Images, name: str = "lenet") -> nn.Module:
    return build_model(
        name,
        in_channels=images.shape[0],
        image_size=images.shape[1],
        num_classes=images.num_classes,
    )


def sent(images: Images, name: str = "lenet", **more) -> SharedUpdate:
    return local_update(network(images, name), images, **more)


@pytest.fixture(scope="module")
def tiny() -> DiffusionPrior:
    images = load_images("digits", image_size=8)[:12]
    return train_diffusion(images, steps=2, batch_size=4, channels=(8, 16))


@pytest.fixture(scope="module")
def shipped() -> DiffusionPrior:
    return DiffusionPrior.load("diffusion-digits")


def psnr(images: Tensor, truth: Images) -> float:
    return float(-10 * (images - truth.pixels).square().mean().log10())


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_report_is_complete_and_reproducible(attack, tiny):
    images = victims(3)
    update = sent(images)
    told: list[Step] = []
    run = ATTACKS[attack]
    found = run(update, tiny, seed=4, on_step=told.append, client=7, **SHORT[attack])
    assert isinstance(found, Reconstruction) and found.attack == attack
    assert found.images.shape == (3, 1, 8, 8) and found.images.dtype == torch.float32
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    assert found.labels.tolist() == sorted(images.labels.tolist())
    assert found.label_source == "inferred (counts)"
    assert found.samples.shape == (2, 3, 1, 8, 8) and len(found.misfits) == 2
    best = min(range(2), key=found.misfits.__getitem__)
    assert torch.equal(found.images, found.samples[best])
    assert len(found.losses) == len(found.iterations) == 3
    assert found.losses[-1] == pytest.approx(min(found.misfits))
    assert [t.iteration for t in told] == [1, 2, 3, 3] and told[-1].finished
    assert all(t.client == 7 for t in told)
    again = run(update, tiny, seed=4, **SHORT[attack])
    assert torch.equal(found.samples, again.samples)
    other = run(update, tiny, seed=5, **SHORT[attack])
    assert not torch.equal(found.samples, other.samples)


@pytest.mark.parametrize("attack", ATTACKS)
def test_restarts_are_independent_of_each_other(attack, tiny):
    """The update that one restart sees does not leak into another one."""
    update = sent(victims(2))
    found = ATTACKS[attack](update, tiny, seed=1, **SHORT[attack])
    assert not torch.allclose(found.samples[0], found.samples[1])
    misfits = [own_misfit(update, found.labels, s) for s in found.samples]
    assert found.misfits == pytest.approx(misfits, rel=1e-3)


def own_misfit(update: SharedUpdate, labels: Tensor, images: Tensor) -> float:
    loss = nn.functional.cross_entropy(update.model(images), labels)
    found = torch.autograd.grad(loss, list(update.model.parameters()))
    target = list(update.tensors.values())
    gap = sum(float((a - b).square().sum()) for a, b in zip(found, target, strict=True))
    return gap / sum(float(b.square().sum()) for b in target)


@pytest.mark.parametrize("attack", ATTACKS)
def test_known_labels_are_kept_in_their_order(attack, tiny):
    update = sent(victims(2))
    labels = torch.tensor([9, 0])
    found = ATTACKS[attack](update, tiny, labels=labels, **SHORT[attack])
    assert found.labels.tolist() == [9, 0]
    assert found.label_source == "given (upper bound)"
    with pytest.raises(InputError, match="labels"):
        ATTACKS[attack](update, tiny, labels=labels[:1], **SHORT[attack])


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_slope_of_zero_gives_no_nan(attack, tiny, monkeypatch):
    monkeypatch.setattr(Guide, "_match", flat)
    found = ATTACKS[attack](sent(victims(2)), tiny, **SHORT[attack])
    assert bool(found.samples.isfinite().all())


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_slope_that_is_no_number_gives_no_nan(attack, tiny, monkeypatch):
    def broken(guide, images, level):
        energy, misfit, slopes = flat(guide, images, level)
        return energy * math.nan, misfit * math.nan, slopes * math.nan

    monkeypatch.setattr(Guide, "_match", broken)
    found = ATTACKS[attack](sent(victims(2)), tiny, **SHORT[attack])
    assert bool(found.samples.isfinite().all())


def flat(guide: Guide, images: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
    ones = torch.ones(len(images), dtype=torch.float64)
    return ones, ones, torch.zeros_like(images)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_interruption_keeps_the_latest_images(attack, tiny):
    def stop(step: Step) -> None:
        if step.iteration == 2:
            raise KeyboardInterrupt

    found = ATTACKS[attack](sent(victims(2)), tiny, on_step=stop, **SHORT[attack])
    assert found.stopped == "interrupted" and len(found.losses) == 2
    assert found.images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("attack", ATTACKS)
def test_relu_networks_and_weight_changes_work(attack, tiny):
    found = ATTACKS[attack](sent(victims(2), "mlp"), tiny, **SHORT[attack])
    assert all(math.isfinite(loss) for loss in found.losses)


@pytest.mark.parametrize("attack", ATTACKS)
def test_other_shapes_and_priors_are_refused(attack, tiny):
    with pytest.raises(InputError, match="prior: expected images of shape"):
        ATTACKS[attack](sent(victims(1, side=16)), tiny)
    with pytest.raises(InputError, match="prior: expected a DiffusionPrior"):
        ATTACKS[attack](sent(victims(1)), "spectrum")
    with pytest.raises(InputError, match="steps"):
        ATTACKS[attack](sent(victims(1)), tiny, steps=0)


def test_no_guidance_gives_the_prior_whatever_was_sent(tiny):
    found = [
        diffusion_posterior(
            sent(victims(2, seed=s)),
            tiny,
            labels=torch.tensor([1, 2]),
            guidance=0,
            steps=4,
            draws=2,
        ).samples
        for s in (0, 1)
    ]
    assert torch.equal(*found)


def test_the_energy_of_the_guide_has_the_right_slope(tiny):
    update = sent(victims(2))
    guide = Guide(update, tiny, None)
    guide.posterior = guide.posterior.double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 2, 1, 8, 8, generator=generator, dtype=torch.float64)
    along = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    _, _, slopes = guide.match(images, 1e-2)
    step = 1e-6
    ahead, behind = (guide.match(images + s * along, 1e-2)[0] for s in (step, -step))
    expected = float((ahead - behind)[0]) / (2 * step)
    assert float((slopes * along).sum()) == pytest.approx(expected, rel=1e-5)


def test_stated_noise_is_what_the_truth_leaves(tiny):
    """The expected energy is that of the true images under noise, within chance."""
    images = victims(2)
    clean = sent(images)
    size = max(float(t.abs().max()) for t in clean.tensors.values())
    generator = torch.Generator().manual_seed(0)
    noisy = {
        k: t + size * torch.randn(t.shape, generator=generator)
        for k, t in clean.tensors.items()
    }
    update = replace(clean, tensors=noisy, noise_std=size)
    guide = Guide(update, tiny, images.labels)
    energy = float(guide.match(images.pixels[None], 1e-3)[0][0])
    assert energy == pytest.approx(guide.expected_energy(1e-3), rel=0.1)


def test_an_update_that_is_all_noise_leaves_the_prior(tiny):
    """The uninformative limit: what stated noise explains does not guide."""
    clean = sent(victims(2))
    std = 1e3 * max(float(t.abs().max()) for t in clean.tensors.values())
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: std * torch.randn(t.shape, generator=generator)
        for name, t in clean.tensors.items()
    }
    update = replace(clean, tensors=noisy, noise_std=std)
    more = {"labels": torch.tensor([1, 2]), "steps": 4, "draws": 2, "level": 1e-3}
    found = diffusion_posterior(update, tiny, **more).samples
    alone = diffusion_posterior(update, tiny, guidance=0, **more).samples
    silent = replace(update, noise_std=0.0)
    misled = diffusion_posterior(silent, tiny, **more).samples
    assert float((found - alone).abs().mean()) < 0.1 * float(
        (misled - alone).abs().mean()
    )


def test_reverse_step_is_the_law_of_the_scheduler(tiny):
    """Against the scheduler of diffusers, whose eta = 1 is this law."""
    tiny.scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    noisy, output, fresh = torch.randn(3, 2, 1, 8, 8, generator=generator)
    level, after = 599, 499
    step = tiny.scheduler.step(output, level, noisy, eta=1.0, variance_noise=fresh)
    mean, deviation = reverse_step(tiny, noisy, step.pred_original_sample, level, after)
    torch.testing.assert_close(mean + deviation * fresh, step.prev_sample)
    last, none = reverse_step(tiny, noisy, output, 99, None)
    assert torch.equal(last, output) and none == 0


def test_unit_directions():
    found = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [math.nan, 2.0]]), (-1,))
    torch.testing.assert_close(
        found, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]])
    )


def test_aligned_noise_is_of_each_image_and_never_against_the_move():
    generator = torch.Generator().manual_seed(0)
    noise, move = torch.randn(2, 50, 3, 1, 4, 4, generator=generator)
    move[:, 2] = 0
    found = aligned_noise(noise, move)
    along = (found * move).sum((-3, -2, -1))
    assert bool((along[:, :2] > 0).all())
    # Parallel to the move of its own image, with the length of its own projection.
    own = (noise * move).sum((-3, -2, -1)).abs()
    torch.testing.assert_close(along[:, :2], own[:, :2])
    norms = found.norm(dim=(-2, -1)).squeeze(-1) * move.norm(dim=(-2, -1)).squeeze(-1)
    torch.testing.assert_close(along[:, :2], norms[:, :2])
    torch.testing.assert_close(found[:, 2], noise[:, 2])
    # Another image's move changes nothing.
    other = move.clone()
    other[:, 1] = -3 * other[:, 0]
    torch.testing.assert_close(aligned_noise(noise, other)[:, 0], found[:, 0])


def test_the_weight_of_the_typical_length_holds_the_latents(tiny):
    """A heavy weight keeps ||z|| at sqrt(d); without it the search leaves it."""
    from gradinv_helpers.attacks.diffusion_latent import _length_slope

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 64, generator=generator).double().requires_grad_()
    distance = (latents.norm(dim=-1) - 8).square().sum()
    (expected,) = torch.autograd.grad(distance, latents)
    torch.testing.assert_close(_length_slope(latents.detach()), expected)
    assert bool((_length_slope(torch.zeros(1, 64)) == 0).all())


# --- with the prior that ships ----------------------------------------------------

LONGER = {
    "diffusion-latent": {"steps": 30, "decoding_steps": 3},
    "diffusion-posterior": {"steps": 25, "draws": 2},
    "gradinvdiff": {"steps": 25, "restarts": 2},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_one_digit_beats_what_the_prior_alone_says(attack, shipped):
    image = victims(1, side=16, seed=3)
    found = ATTACKS[attack](sent(image), shipped, **LONGER[attack])
    alone = shipped.given(image.labels).sample(16, seed=1, steps=10)[:, 0]
    floor = max(psnr(one[None], image) for one in alone)
    mean = load_images("digits", image_size=16).pixels.mean(0, keepdim=True)
    floor = max(floor, psnr(mean, image))
    assert psnr(found.images, image) > floor + 1


def test_a_polish_is_reported_and_explains_the_update_better(shipped):
    images = victims(2, side=16)
    update = sent(images)
    more = {"steps": 10, "draws": 1}
    plain = diffusion_posterior(update, shipped, **more)
    polished = diffusion_posterior(update, shipped, polish=9, **more)
    assert "polish of 9" in polished.reason and "polish" not in plain.reason
    assert torch.equal(plain.samples, polished.samples)
    assert polished.loss < 0.5 * plain.loss
    ours, before = (sum(score(f, images).psnr) for f in (polished, plain))
    assert ours > before
