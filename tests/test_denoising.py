"""Attacks on a client that trains a diffusion model."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.denoising import (
    DenoisingMap,
    DenoisingUpdate,
    denoising_update,
)
from gradinv_helpers.attacks.denoising_search import _scan, invert_denoising
from gradinv_helpers.attacks.denoising_steps import assignments, infer_timestep
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import spectrum_prior

STEPS = 40
SCHEDULE = torch.cumprod(1 - torch.linspace(1e-3, 0.15, STEPS), 0)
SHAPE = (1, 6, 6)


def embed(steps: Tensor, size: int) -> Tensor:
    rates = torch.exp(-math.log(1000) * torch.arange(size // 2) / (size // 2))
    angles = steps[:, None].float() * rates.to(steps.device)
    return torch.cat([angles.sin(), angles.cos()], 1)


class Denoiser(nn.Module):
    """Two convolutions, with the step as a bias between them."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Linear(8, width)
        self.after = nn.Linear(width, width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        told = self.after(F.silu(self.time(embed(steps, 8).to(x))))
        return self.last(F.silu(self.first(x) + told[:, :, None, None]))


class Plain(nn.Module):
    """The step is a constant second channel: no layer sees it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 1, 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        told = (steps.to(x) / STEPS)[:, None, None, None].expand_as(x)
        return self.last(F.silu(self.first(torch.cat([x, 2 * told], 1))))


def denoiser(kind: type[nn.Module] = Denoiser, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )


def victims(count: int = 1, seed: int = 0, side: int = 6) -> tuple[Tensor, Tensor]:
    """Smooth images in [0, 1], and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    images = F.interpolate(coarse, (side, side), mode="bilinear")
    return images, torch.randn(images.shape, generator=generator)


def psnr(found: Tensor, true: Tensor) -> float:
    return float(-10 * torch.log10((found - true).square().mean()))


def floor(true: Tensor) -> float:
    """The best constant image, which an attacker does not even know."""
    return psnr(true.mean().expand_as(true), true)


def plain_gradients(
    model: nn.Module, images: Tensor, noise: Tensor, steps: list[int], kind: str
) -> dict[str, Tensor]:
    """The denoising loss written out image by image."""
    total = torch.zeros(())
    for x, e, t in zip(images, noise, steps, strict=True):
        share = SCHEDULE[t]
        noisy = share.sqrt() * (2 * x - 1) + (1 - share).sqrt() * e
        target = e
        if kind == "v_prediction":
            target = share.sqrt() * e - (1 - share).sqrt() * (2 * x - 1)
        answer = model(noisy[None], torch.tensor([t]))
        answer = answer if isinstance(answer, Tensor) else answer.sample
        total = total + (answer[0] - target).square().sum()
    loss = total / images.numel()
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


# --- the client -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("make", [denoiser, unet])
def test_update_is_the_gradient_of_the_denoising_loss(make, kind):
    model = make()
    images, noise = victims(3, side=8)
    steps = [0, 17, STEPS - 1]
    update = denoising_update(
        model,
        images,
        schedule=SCHEDULE,
        timesteps=steps,
        noise=noise,
        prediction=kind,
    )
    expected = plain_gradients(model, images, noise, steps, kind)
    assert list(update.tensors) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            update.tensors[name], gradient, rtol=1e-4, atol=1e-6, msg=name
        )


def test_update_takes_a_scheduler():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=30)
    update = denoising_update(denoiser(), victims()[0], schedule=scheduler)
    torch.testing.assert_close(update.alphas_cumprod, scheduler.alphas_cumprod.double())


def test_update_holds_no_secret():
    images, noise = victims(2)
    update = denoising_update(
        denoiser(), images, schedule=SCHEDULE, timesteps=[3, 9], noise=noise
    )
    names = {field.name for field in dataclasses.fields(DenoisingUpdate)}
    assert names == {
        "model",
        "tensors",
        "num_samples",
        "image_shape",
        "alphas_cumprod",
        "prediction",
    }
    held = [*update.tensors.values(), *update.model.state_dict().values()]
    assert all(t.shape != images.shape for t in [*held, update.alphas_cumprod])
    with pytest.raises(dataclasses.FrozenInstanceError):
        update.noise = noise


def test_update_leaves_the_model_and_is_seeded():
    model = denoiser()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, _ = victims(2)
    first, same, other = (
        denoising_update(model, images, schedule=SCHEDULE, seed=seed)
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(first.tensors[k], same.tensors[k]) for k in first.tensors)
    assert not torch.equal(first.tensors["last.bias"], other.tensors["last.bias"])
    with torch.no_grad():
        model.last.bias.add_(1)
    assert torch.equal(first.model.last.bias, before["last.bias"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_pullback_is_the_derivative(kind):
    model = denoiser().double()
    images, noise = (part.double()[None] for part in victims(2))
    mapped = DenoisingMap(model, torch.tensor([5, 30]), SCHEDULE, kind)
    gradients, pullback = mapped(images, noise)
    generator = torch.Generator().manual_seed(3)
    slopes = [
        torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients
    ]
    to_images, to_noise = pullback(slopes)
    for which, slope in enumerate((to_images, to_noise)):
        way = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        ends = []
        for sign in (1, -1):
            moved = [images, noise]
            moved[which] = moved[which] + sign * 1e-5 * way
            found, _ = mapped(*moved)
            ends.append(sum((g * s).sum() for g, s in zip(found, slopes, strict=True)))
        assert float((slope * way).sum()) == pytest.approx(
            float(ends[0] - ends[1]) / 2e-5, rel=1e-5
        )


def test_gradient_determines_image_and_noise():
    # 2 x pixels unknowns: the noisy image and the residual are both determined.
    model = denoiser().double()
    images, noise = (part.double()[None] for part in victims())
    mapped = DenoisingMap(model, torch.tensor([12]), SCHEDULE, "epsilon")
    pixels = images.numel()
    columns = []
    for place in range(2 * pixels):
        ends = []
        for sign in (1, -1):
            moved = torch.cat([images.flatten(), noise.flatten()])
            moved[place] += sign * 1e-5
            found, _ = mapped(
                moved[:pixels].view_as(images), moved[pixels:].view_as(noise)
            )
            ends.append(torch.cat([g.flatten() for g in found]))
        columns.append((ends[0] - ends[1]) / 2e-5)
    values = torch.linalg.svdvals(torch.stack(columns, 1))
    assert int((values > 1e-7 * values[0]).sum()) == 2 * pixels


# --- the steps --------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=4), st.integers(0, 99))
def test_steps_are_read_exactly(steps, seed):
    images, noise = victims(len(steps), seed)
    update = denoising_update(
        denoiser(seed=seed), images, schedule=SCHEDULE, timesteps=steps, noise=noise
    )
    found = infer_timestep(update)
    assert found.steps == tuple(sorted(set(steps)))
    assert found.layer == "time"
    assert found.distances.shape == (STEPS,)


def test_steps_of_a_unet_with_a_long_schedule():
    schedule = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 300), 0)
    images, noise = victims(3, side=8)
    update = denoising_update(
        unet(), images, schedule=schedule, timesteps=[3, 4, 250], noise=noise
    )
    found = infer_timestep(update)
    assert found.steps == (3, 4, 250)
    assert found.layer == "time_embedding.linear_1"


def test_too_many_or_noisy_steps_are_refused():
    images, noise = victims(12)
    many = denoising_update(
        denoiser(), images, schedule=SCHEDULE, timesteps=range(12), noise=noise
    )
    with pytest.raises(InputError, match="fewer different steps"):
        infer_timestep(many)
    one = denoising_update(
        denoiser(), images[:1], schedule=SCHEDULE, timesteps=[20], noise=noise[:1]
    )
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: t + torch.randn(t.shape, generator=generator)
        for name, t in one.tensors.items()
    }
    with pytest.raises(InputError, match="give timesteps"):
        infer_timestep(dataclasses.replace(one, tensors=noisy))
    zero = {name: torch.zeros_like(t) for name, t in one.tensors.items()}
    with pytest.raises(InputError, match="all zeros"):
        infer_timestep(dataclasses.replace(one, tensors=zero))


def test_a_model_without_a_time_layer_is_named():
    update = denoising_update(denoiser(Plain), victims()[0], schedule=SCHEDULE)
    with pytest.raises(InputError, match="fed by the step alone"):
        infer_timestep(update)


def test_assignments_of_steps():
    assert assignments((4,), 3, ordered=False) == [(4, 4, 4)]
    assert assignments((1, 2), 3, ordered=False) == [(1, 1, 2), (1, 2, 2)]
    assert assignments((1, 2), 2, ordered=True) == [(1, 2), (2, 1)]
    with pytest.raises(InputError, match="ways to assign"):
        assignments((1, 2, 3, 4, 5), 5, ordered=True)


# --- the attacks ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "kind"), [(0, "epsilon"), (30, "epsilon"), (12, "v_prediction")]
)
def test_known_noise_gives_the_image(step, kind):
    images, noise = victims()
    update = denoising_update(
        denoiser(),
        images,
        schedule=SCHEDULE,
        timesteps=[step],
        noise=noise,
        prediction=kind,
    )
    found = invert_denoising(update, noise=noise, timesteps=[step], iterations=8)
    assert psnr(found.reconstruction.images, images) > floor(images) + 15
    assert found.noise_known and found.step_source == "given"
    assert torch.equal(found.noise, noise)


def test_unknown_noise_and_step():
    images, noise = victims(seed=1)
    update = denoising_update(
        denoiser(),
        images,
        schedule=SCHEDULE,
        timesteps=[12],
        noise=noise,
    )
    found = invert_denoising(update, iterations=24, restarts=8, seed=2)
    assert found.timesteps.tolist() == [12]
    assert found.step_source == "time embedding" and not found.noise_known
    assert psnr(found.reconstruction.images, images) > floor(images) + 10
    assert float((found.noise - noise).square().mean()) < 0.05


def test_two_images_with_known_noise_in_any_order_of_steps():
    images, noise = victims(2, seed=2)
    update = denoising_update(
        denoiser(), images, schedule=SCHEDULE, timesteps=[20, 5], noise=noise
    )
    found = invert_denoising(update, noise=noise, iterations=16)
    assert found.timesteps.tolist() == [20, 5]
    assert [steps for steps, _ in found.scanned] == [(5, 20), (20, 5)]
    for mine, true in zip(found.reconstruction.images, images, strict=True):
        assert psnr(mine, true) > floor(true) + 10


def test_unet_with_known_noise():
    images, noise = victims(side=8)
    update = denoising_update(
        unet(), images, schedule=SCHEDULE, timesteps=[10], noise=noise
    )
    found = invert_denoising(update, noise=noise, iterations=2, restarts=1)
    assert found.timesteps.tolist() == [10]
    assert psnr(found.reconstruction.images, images) > floor(images) + 6


def test_steps_are_scanned_where_they_cannot_be_read():
    images, noise = victims(seed=3)
    update = denoising_update(
        denoiser(Plain), images, schedule=SCHEDULE[::4], timesteps=[6], noise=noise
    )
    found = invert_denoising(update, noise=noise, iterations=4, restarts=1)
    assert found.step_source == "scan" and len(found.scanned) == STEPS // 4
    assert found.timesteps.tolist() == [6]
    energies = dict(found.scanned)
    assert energies[(6,)] == min(energies.values())
    pair = denoising_update(denoiser(Plain), victims(2)[0], schedule=SCHEDULE)
    with pytest.raises(InputError, match="give timesteps"):
        invert_denoising(pair)


def test_the_attack_is_given_no_truth():
    given_to = set(inspect.signature(invert_denoising).parameters)
    assert given_to == {
        "update",
        "noise",
        "timesteps",
        "prior",
        "refine",
        "distance",
        "optimiser",
        "iterations",
        "restarts",
        "seed",
        "on_step",
    }
    assert "images" not in inspect.signature(_scan).parameters


def test_unknown_noise_starts_at_the_attackers_own_draw():
    # The first noise is the same for two victims, so it holds nothing of either.
    starts = []
    for seed in (0, 1):
        images, noise = victims(seed=seed)
        update = denoising_update(
            denoiser(), images, schedule=SCHEDULE, timesteps=[12], noise=noise
        )
        seen: list[Tensor] = []
        kept = DenoisingMap.__call__

        def watch(self, images, noise, seen=seen, kept=kept):
            seen.append(noise.detach().clone())
            return kept(self, images, noise)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DenoisingMap, "__call__", watch)
            invert_denoising(update, iterations=1, restarts=1, seed=9)
        starts.append(seen[0])
        assert float((seen[0][0] - noise).square().mean()) > 0.8
    assert torch.equal(*starts)


def test_same_call_same_result_other_seed_other_start():
    images, noise = victims()
    update = denoising_update(
        denoiser(), images, schedule=SCHEDULE, timesteps=[12], noise=noise
    )
    first, same, other = (
        invert_denoising(update, iterations=2, restarts=1, seed=seed)
        for seed in (4, 4, 5)
    )
    assert torch.equal(first.reconstruction.images, same.reconstruction.images)
    assert torch.equal(first.noise, same.noise)
    assert not torch.equal(first.noise, other.noise)


@pytest.mark.parametrize("optimiser", ["lbfgs", "adam"])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_choices_lower_the_misfit(optimiser, distance):
    images, noise = victims()
    update = denoising_update(
        denoiser(), images, schedule=SCHEDULE, timesteps=[12], noise=noise
    )
    told = []
    found = invert_denoising(
        update,
        noise=noise,
        timesteps=[12],
        distance=distance,
        optimiser=optimiser,
        iterations=6,
        restarts=1,
        on_step=told.append,
    )
    report = found.reconstruction
    assert psnr(report.images, images) > floor(images) + 3
    assert told[-1].finished and not told[0].finished
    assert len(report.losses) == len(report.iterations) == len(told) - 1
    assert len(report.snapshots) == len(report.snapshot_iterations)
    assert report.labels.tolist() == [-1] and report.attack == "gidm"


class Coarse:
    """A generator that can only make images of one grey."""

    name, image_shape, size = "grey", SHAPE, 1

    def decode(self, latents: Tensor) -> Tensor:
        return (0.5 + 0.2 * latents)[..., None, None].expand(
            *latents.shape[:-1], *SHAPE
        )

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        return 0.2 * slopes.flatten(-3).sum(-1, keepdim=True)

    def to(self, like: Tensor) -> Coarse:
        return self


def test_refining_goes_beyond_a_poor_generator():
    images, noise = victims(seed=4)
    update = denoising_update(
        denoiser(), images, schedule=SCHEDULE, timesteps=[12], noise=noise
    )
    latent, refined = (
        invert_denoising(
            update,
            noise=noise,
            timesteps=[12],
            prior=Coarse(),
            refine=refine,
            iterations=8,
            restarts=1,
        ).reconstruction
        for refine in (False, True)
    )
    assert float(latent.images.std()) < 1e-5
    assert psnr(latent.images, images) > floor(images) - 3
    assert psnr(refined.images, images) > floor(images) + 10


def test_restarts_and_interruption():
    update = denoising_update(denoiser(), victims()[0], schedule=SCHEDULE, seed=1)
    several = invert_denoising(update, iterations=1, restarts=2).reconstruction
    assert [trial.seed for trial in several.trials] == [0, 1]

    def stop(step):
        if step.iteration == 2 and not step.finished:
            raise KeyboardInterrupt

    stopped = invert_denoising(update, iterations=8, on_step=stop).reconstruction
    assert stopped.stopped == "interrupted" and len(stopped.losses) == 2


# --- bad input --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [STEPS]}, "timesteps: expected steps from 0 to 39"),
        ({"timesteps": [1, 2]}, "timesteps: expected 1 integers"),
        ({"noise": torch.zeros(1, 1, 5, 5)}, "noise: expected a tensor of shape"),
        ({"noise": torch.full((1, 1, 6, 6), math.nan)}, "noise: expected finite"),
        ({"schedule": torch.tensor([0.5, 0.9])}, "schedule: expected numbers that"),
        ({"schedule": 1000}, "schedule: expected alphas_cumprod"),
        ({"prediction": "sample"}, "prediction: expected one of"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"images": torch.zeros(6, 6)}, "images: expected a tensor of shape"),
    ],
)
def test_bad_client_arguments(changes, message):
    arguments = {"images": victims()[0], "schedule": SCHEDULE} | changes
    with pytest.raises(InputError, match=message):
        denoising_update(denoiser(), arguments.pop("images"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": torch.zeros(2, 1, 6, 6)}, "noise: expected a tensor of shape"),
        ({"timesteps": [-1]}, "timesteps: expected steps from 0"),
        ({"timesteps": [0.5]}, "timesteps: expected 1 integers"),
        ({"prior": spectrum_prior((1, 8, 8))}, "prior: expected images of shape"),
        ({"distance": "l1"}, "distance: expected one of"),
        ({"optimiser": "sgd"}, "optimiser: expected one of"),
        ({"iterations": 0}, "iterations: expected an integer"),
        ({"restarts": 0}, "restarts: expected an integer"),
        ({"seed": 2**32}, "seed: expected an integer"),
    ],
)
def test_bad_attack_arguments(changes, message):
    update = denoising_update(denoiser(), victims()[0], schedule=SCHEDULE)
    with pytest.raises(InputError, match=message):
        invert_denoising(update, **changes)


def test_bad_update():
    update = denoising_update(denoiser(), victims()[0], schedule=SCHEDULE)
    with pytest.raises(InputError, match="model: expected a torch.nn.Module"):
        dataclasses.replace(update, model=None)
    with pytest.raises(InputError, match="tensors"):
        dataclasses.replace(update, tensors={})
    with pytest.raises(InputError, match="image_shape"):
        dataclasses.replace(update, image_shape=(1, 6))
    assert "epsilon gradient of 1 samples" in repr(update)
