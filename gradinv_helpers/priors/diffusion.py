r"""A diffusion model as a prior of images.

A network learns to remove noise: from
:math:`x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon` it predicts
the mean of all clean images :math:`x_0` that may lie behind :math:`x_t`. That is all a
reverse diffusion needs to turn pure noise into an image. Without fresh noise on the way
(DDIM) the image is a differentiable function of its first noise, which is standard
normal: a latent as any other prior has one, of the size of the image.

The network is the ``UNet2DModel`` of diffusers, and folders have its standard layout.
Images are in [0, 1] outside this module; the diffusion runs in [-1, 1].

Source: Ho et al. (2020); Song et al. (2021) for DDIM; Nichol and Dhariwal (2021) for
the cosine schedule; Salimans and Ho (2022) for the predicted velocity.
Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import copy
import json
import math
import re
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradinv_helpers.compute import cpu_threads, private_randomness
from gradinv_helpers.errors import InputError, check_count, check_number, check_seed
from gradinv_helpers.files import expand_home, prepare_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradinv_helpers.data import Images

PRETRAINED_DIFFUSION: tuple[str, ...] = ("diffusion-digits",)

_ABOUT = "prior.json"
_NOISE_LEVELS = 1000
_EMA = 0.999
_NO_CLASS_SHARE = 0.1  # of the training images, shown without their class
_GROUPS = 8
_DECODING_STEPS = 10
_INVERSION_PASSES = 3
_WORK_PER_PIXEL = 500_000  # multiplications of the small U-Net, roughly
_SMALLEST_SIGNAL = 1e-12


@dataclass(frozen=True)
class TrainingStep:
    """One step of training a diffusion prior.

    Attributes:
        step: Number of the step, from 1.
        steps: Number of steps in all.
        loss: Mean squared error of the predicted velocity over the batch.
    """

    step: int
    steps: int
    loss: float


@dataclass(frozen=True, eq=False)
class DiffusionPrior:
    """Images as a function of their first noise, by a learned denoiser.

    It is an ``ImagePrior``: the latents of an image are the noise from which a
    deterministic reverse diffusion of ``steps`` steps makes it. Few steps give a
    function that is cheap to differentiate; samples need more.

    Args:
        unet: A ``diffusers.UNet2DModel``.
        scheduler: A ``diffusers.DDIMScheduler`` with the noise levels of training.
        name: What the prior is called in reports.
        steps: Steps of ``decode`` and ``encode``.
        no_class: Class that stands for "not told" in a model that knows classes;
            ``None`` if it knows none or always wants one.
        labels: Class of every image (N,), see ``given``.
        about: How it was made, as kept beside the weights.

    Source: Song et al. (2021) for the deterministic reverse diffusion (DDIM).
    Taught in: notebooks/06_diffusion_prior.
    """

    unet: nn.Module
    scheduler: Any
    name: str = "diffusion"
    steps: int = _DECODING_STEPS
    no_class: int | None = None
    labels: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls, source: str | Path, *, steps: int = _DECODING_STEPS
    ) -> DiffusionPrior:
        """Read a diffusion model that ships, lies in a folder, or is on the hub.

        Weights in safetensors are preferred. A model that has only a ``.bin`` file
        is read by PyTorch's restricted reader, which takes tensors and refuses code.
        Custom code of a repository is never run.

        Args:
            source: ``diffusion-digits``, which ships; a folder in the layout of
                diffusers' pipelines (DDPM or DDIM, pixels, no text), such as
                ``save`` writes; or a name on the hub such as
                ``google/ddpm-cifar10-32``, downloaded once.
            steps: Steps of ``decode`` and ``encode``.

        Returns:
            The prior, float32, on the CPU.

        Raises:
            InputError: There is no such model, no network, or another kind of model.

        Taught in: notebooks/06_diffusion_prior.
        """
        check_count("steps", steps)
        folder = _find(source)
        unet, scheduler = _read(folder, source)
        if steps > scheduler.config.num_train_timesteps:
            levels = scheduler.config.num_train_timesteps
            raise InputError("steps", f"an integer of at most {levels}", steps)
        about = _read_about(folder)
        name = about.get("name", Path(str(source)).name)
        return cls(unet, scheduler, name, steps, about.get("no_class"), about=about)

    def save(self, folder: str | Path, *, half: bool = False) -> Path:
        """Write the standard folder of a diffusers pipeline, with safetensors.

        ``prior.json`` beside it keeps what only this package needs.

        Args:
            folder: Where to; made if missing.
            half: Whether to keep 16 bits of every weight, which halves the file.

        Returns:
            The folder.

        Raises:
            InputError: The folder cannot be written to.
        """
        diffusers = _diffusers()
        folder = prepare_folder(folder, "folder")
        kind = torch.float16 if half else torch.float32
        unet = _converted(self.unet, torch.empty(0, dtype=kind))
        with _quiet():
            pipeline: Any = diffusers.DDPMPipeline(unet=unet, scheduler=self.scheduler)
            pipeline.save_pretrained(folder, safe_serialization=True)
        config = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
        config.pop("_name_or_path", None)  # a folder of this machine
        write_json(folder / "unet" / "config.json", config)
        own = {"name": self.name, "no_class": self.no_class}
        write_json(folder / _ABOUT, {**self.about, **own})
        return folder

    # --- what the network knows -------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        config: Any = self.unet.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    @property
    def size(self) -> int:
        """Latents per image."""
        return math.prod(self.image_shape)

    @property
    def signal(self) -> Tensor:
        """Share of the image's variance in every noise level, (T,), falling to 0."""
        like = next(self.unet.parameters())
        return self.scheduler.alphas_cumprod.to(like)

    def levels(self, steps: int) -> list[int]:
        """Noise levels that a reverse diffusion of ``steps`` steps visits, falling."""
        total = len(self.scheduler.alphas_cumprod)
        check_count("steps", steps, maximum=total)
        return [round(total * (steps - k) / steps) - 1 for k in range(steps)]

    def predict(self, noisy: Tensor, level: int | Tensor) -> tuple[Tensor, Tensor]:
        """Split noisy images into clean ones and noise.

        Args:
            noisy: Shape (..., C, H, W), on the scale of the diffusion.
            level: Noise level, from 0 to T - 1; one for all images or one for each.

        Returns:
            The expected clean images in [-1, 1] up to errors, not clamped, and the
            noise; both of the shape of ``noisy``.
        """
        flat = noisy.reshape(-1, *self.image_shape)
        times = torch.as_tensor(level, device=flat.device).expand(noisy.shape[:-3])
        times = times.reshape(-1)
        weights = next(self.unet.parameters())
        output = self.unet(flat.to(weights), times, self._classes(noisy.shape[:-3]))
        output = output.sample[:, : self.image_shape[0]].to(flat)
        share = self.signal.to(flat)[times].clamp_min(_SMALLEST_SIGNAL)[
            :, None, None, None
        ]
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            clean = share.sqrt() * flat - (1 - share).sqrt() * output
        elif kind == "sample":
            clean = output
        else:
            clean = (flat - (1 - share).sqrt() * output) / share.sqrt()
        noise = (flat - share.sqrt() * clean) / (1 - share).sqrt()
        return clean.view(noisy.shape), noise.view(noisy.shape)

    def denoise(self, noisy: Tensor, level: int | Tensor) -> Tensor:
        """Expected clean images (..., C, H, W) in [0, 1], not clamped.

        Args:
            noisy: Shape (..., C, H, W), on the scale of the diffusion.
            level: Noise level, from 0 to T - 1.

        Source: Efron (2011) for the expectation, known as Tweedie's formula.
        Taught in: notebooks/06_diffusion_prior.
        """
        return self.predict(noisy, level)[0] / 2 + 0.5

    def denoising_loss(self, images: Images, *, draws: int = 8, seed: int = 0) -> float:
        """Mean squared error of the clean images, over all noise levels alike.

        Args:
            images: Images that the model has not seen, with their classes.
            draws: Noises per image; their levels are spread evenly.
            seed: Seed of the noises.

        Returns:
            The error per value, for images on the scale [-1, 1].
        """
        check_count("draws", draws)
        generator = torch.Generator().manual_seed(check_seed("seed", seed))
        like = next(self.unet.parameters())
        clean = (2 * images.pixels - 1).to(like)
        told = self.given(images.labels)
        total = len(self.scheduler.alphas_cumprod)
        spread = (torch.arange(draws * len(clean)) + 0.5) / (draws * len(clean))
        order = torch.randperm(len(spread), generator=generator)
        levels = (spread[order] * total).long().view(draws, -1).to(like.device)
        found = 0.0
        for row in levels:
            noise = torch.randn(clean.shape, generator=generator).to(like)
            with torch.no_grad():
                estimate = told.predict(self.add_noise(clean, noise, row), row)[0]
            found += float((estimate - clean).square().mean()) / draws
        return found

    def add_noise(self, clean: Tensor, noise: Tensor, level: int | Tensor) -> Tensor:
        """Noisy images of clean ones (..., C, H, W) on the scale [-1, 1]."""
        share = self.signal.to(clean)[level]
        share = share[..., None, None, None] if share.dim() else share
        return share.sqrt() * clean + (1 - share).sqrt() * noise

    # --- noise to image, and back -----------------------------------------------

    def noise_to_image(self, noise: Tensor, steps: int) -> Tensor:
        """Turn noise into images by a deterministic reverse diffusion.

        Args:
            noise: Standard normal, shape (..., C, H, W).
            steps: Evaluations of the network, from 1 to T.

        Returns:
            Images (..., C, H, W) in [0, 1] up to errors, not clamped; a smooth function
            of the noise.

        Source: Song et al. (2021), DDIM.
        Taught in: notebooks/06_diffusion_prior.
        """
        levels = self.levels(steps)
        for level, after in zip(levels, [*levels[1:], None], strict=True):
            clean, rest = self.predict(noise, level)
            noise = clean if after is None else self.add_noise(clean, rest, after)
        return noise / 2 + 0.5

    def sample(self, count: int, *, seed: int = 0, steps: int = 50) -> Tensor:
        """Draw images from the prior, before any update is seen.

        Args:
            count: How many.
            seed: Seed of the noise.
            steps: Steps of the reverse diffusion.

        Returns:
            Images (count, C, H, W) in [0, 1]; with classes given, (count, N, C, H, W).

        Taught in: notebooks/06_diffusion_prior.
        """
        check_count("count", count)
        generator = torch.Generator().manual_seed(check_seed("seed", seed))
        several = () if self.labels is None else (len(self.labels),)
        shape = (count, *several, *self.image_shape)
        noise = torch.randn(shape, generator=generator)
        with torch.no_grad():
            made = self.noise_to_image(noise.to(next(self.unet.parameters())), steps)
        return made.clamp(0, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (..., C, H, W) of latents (..., size)."""
        noise = latents.unflatten(-1, self.image_shape)
        if torch.is_grad_enabled() and latents.requires_grad:
            return self.noise_to_image(noise, self.steps)
        with torch.no_grad():
            return self.noise_to_image(noise, self.steps)

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        """Derivative (..., size) by the latents from that by the images."""
        with torch.enable_grad():
            free = latents.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.decode(free), free, slopes)
        return found

    def encode(self, images: Tensor) -> Tensor:
        """Latents (..., size) whose images come close to ``images``.

        The steps of ``decode`` are undone one by one, each by a few fixed-point
        iterations. Images far from what the model knows come back changed.
        """
        levels = self.levels(self.steps)
        point = 2 * images - 1
        share_after = torch.ones((), dtype=images.dtype, device=images.device)
        with torch.no_grad():
            for level in reversed(levels):
                share, before = self.signal.to(images)[level], point
                for _ in range(_INVERSION_PASSES):
                    _, noise = self.predict(point, level)
                    clean = (
                        before - (1 - share_after).sqrt() * noise
                    ) / share_after.sqrt()
                    point = share.sqrt() * clean + (1 - share).sqrt() * noise
                share_after = share
        return point.flatten(-3)

    def given(self, labels: Tensor) -> DiffusionPrior:
        """The same prior for images of these classes (N,), in this order."""
        if not self.knows_classes:
            return self
        known = self.num_classes
        if bool(((labels < 0) | (labels >= known)).any()):
            raise InputError(
                "labels", f"classes from 0 to {known - 1}", labels.tolist()
            )
        return replace(self, labels=labels.long())

    @property
    def knows_classes(self) -> bool:
        """Whether the network takes the class of an image."""
        config: Any = self.unet.config
        return bool(config.num_class_embeds)

    @property
    def num_classes(self) -> int:
        """Number of classes that the network takes, "not told" left aside."""
        config: Any = self.unet.config
        return (config.num_class_embeds or 0) - (self.no_class is not None)

    def to(self, like: Tensor) -> DiffusionPrior:
        """The same prior with the type and on the device of ``like``."""
        weights = next(self.unet.parameters())
        if weights.dtype == like.dtype and weights.device == like.device:
            return self
        return replace(self, unet=_converted(self.unet, like))

    def _classes(self, leading: Sequence[int]) -> Tensor | None:
        """Class of every image, as the network wants it."""
        if not self.knows_classes:
            return None
        device = next(self.unet.parameters()).device
        if self.labels is not None:
            return self.labels.to(device).expand(*leading).reshape(-1)
        if self.no_class is None:
            hint = "pass them with given(labels)"
            raise InputError("labels", "the classes of the images", None, hint)
        return torch.full((math.prod(leading),), self.no_class, device=device)


def train_diffusion(
    images: Images,
    *,
    steps: int = 4000,
    batch_size: int = 32,
    channels: Sequence[int] = (32, 64, 64),
    lr: float = 1e-3,
    seed: int = 0,
    class_conditional: bool = True,
    device: torch.device | str = "cpu",
    name: str = "diffusion",
    on_step: Callable[[TrainingStep], None] | None = None,
) -> DiffusionPrior:
    """Train a small U-Net to remove noise from images.

    The step size of Adam rises over the first twentieth of the steps and falls to zero
    along a cosine; the result has the exponential average of the weights. One training
    image in ten is shown without its class, so that one network serves with and without
    labels. The same call gives the same weights.

    Args:
        images: Public training images, none of which is under attack.
        steps: Updates of the weights.
        batch_size: Images per update.
        channels: Channels of every resolution; each halves the sides of the one before.
        lr: Largest step size.
        seed: Seed of the weights, the images' order and the noise.
        class_conditional: Whether the network is told the class.
        device: Where to train; the result is on the CPU.
        name: What the prior is called in reports.
        on_step: Called after every update, for a progress bar.

    Returns:
        The prior. After Ctrl-C, what was learned so far; ``about["steps"]`` says how
        many updates that were.

    Raises:
        InputError: A bad number, image sides that cannot be halved as often as wanted,
            or a loss that is not finite.

    Source: Ho et al. (2020), Algorithm 1; Salimans and Ho (2022) for the velocity.
    Taught in: notebooks/06_diffusion_prior.
    """
    for argument, value in (("steps", steps), ("batch_size", batch_size)):
        check_count(argument, value)
    check_number("lr", lr, exclusive=True)
    check_seed("seed", seed)
    _check_channels(channels, images.shape)
    where = torch.device(device)
    no_class = images.num_classes if class_conditional else None
    work = _WORK_PER_PIXEL * batch_size * images.pixels[0, 0].numel()
    with cpu_threads(work), private_randomness(seed, where):
        unet = _new_unet(images.shape, channels, no_class).to(where).train()
        averaged = copy.deepcopy(unet).eval().requires_grad_(False)
        prior = DiffusionPrior(unet, _new_scheduler(), no_class=no_class)
        optimiser = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: _warm_cosine(step, steps)
        )
        generator = torch.Generator().manual_seed(seed)
        done, losses = 0, []
        try:
            for step in range(1, steps + 1):
                loss = _velocity_loss(prior, images, batch_size, generator)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                _average(averaged, unet, min(_EMA, (1 + step) / (10 + step)))
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    got = f"{losses[-1]} in step {step} with lr={lr:g}"
                    raise InputError("lr", "a finite loss", got, "use a smaller lr")
                done = step
                if on_step is not None:
                    on_step(TrainingStep(step, steps, losses[-1]))
        except KeyboardInterrupt:
            if not done:
                raise
    about = {
        "kind": "diffusion",
        "class_names": list(images.class_names),
        "training_images": len(images),
        "steps": done,
        "batch_size": batch_size,
        "channels": list(channels),
        "lr": lr,
        "seed": seed,
        "training_loss": sum(losses[-100:]) / len(losses[-100:]),
    }
    return replace(prior, unet=averaged.cpu(), name=name, about=about)


def _velocity_loss(
    prior: DiffusionPrior, images: Images, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Squared error of the predicted velocity, for a random batch and noise levels."""
    device = next(prior.unet.parameters()).device
    total = len(prior.scheduler.alphas_cumprod)
    chosen = torch.randint(len(images), (batch_size,), generator=generator)
    # One level from each of as many equal parts: less noise in the loss.
    parts = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    levels = (parts / batch_size * total).long().to(device)
    clean = (2 * images.pixels[chosen] - 1).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    classes = images.labels[chosen].to(device)
    if prior.no_class is not None:
        hidden = torch.rand(batch_size, generator=generator) < _NO_CLASS_SHARE
        classes = classes.masked_fill(hidden.to(device), prior.no_class)
    noisy = prior.add_noise(clean, noise, levels)
    share = prior.signal[levels][:, None, None, None]
    velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
    told = classes if prior.no_class is not None else None
    return (prior.unet(noisy, levels, told).sample - velocity).square().mean()


@torch.no_grad()
def _average(averaged: nn.Module, unet: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the present ones."""
    pairs = zip(averaged.parameters(), unet.parameters(), strict=True)
    for kept, new in pairs:
        kept.lerp_(new, 1 - decay)


def _warm_cosine(step: int, steps: int) -> float:
    """Scale of the step size: a linear rise, then half a cosine down to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _new_unet(
    shape: tuple[int, int, int], channels: Sequence[int], no_class: int | None
) -> nn.Module:
    diffusers = _diffusers()

    count, height, width = shape
    return diffusers.UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=count,
        out_channels=count,
        layers_per_block=1,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=_GROUPS,
        num_class_embeds=None if no_class is None else no_class + 1,
    )


def _new_scheduler() -> Any:
    diffusers = _diffusers()

    return diffusers.DDIMScheduler(
        num_train_timesteps=_NOISE_LEVELS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def _check_channels(channels: Sequence[int], shape: tuple[int, int, int]) -> None:
    """Refuse what no U-Net can be built of."""
    for count in channels:
        check_count("channels", count)
        if count % _GROUPS:
            raise InputError("channels", f"multiples of {_GROUPS}", count)
    halvings = len(channels) - 1
    if halvings < 0 or any(side % 2**halvings for side in shape[1:]):
        expected = f"sides that are multiples of {2 ** max(0, halvings)}"
        raise InputError("images", expected, shape[1:], "use fewer channels")


# --- folders and the hub --------------------------------------------------------


def _find(source: str | Path) -> Path:
    """The folder of a model: shipped, given, or downloaded."""
    if str(source) in PRETRAINED_DIFFUSION:
        return Path(__file__).parent / "pretrained" / str(source)
    folder = expand_home(source)
    if folder.is_dir():
        return folder
    expected = "a shipped prior, a folder with a diffusers pipeline, or a hub name"
    known = f"shipped: {', '.join(PRETRAINED_DIFFUSION)}"
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise InputError("prior", expected, repr(str(source)), known)
    diffusers = _diffusers()

    try:
        with _quiet():
            return Path(diffusers.DDPMPipeline.download(str(source)))
    except (OSError, ValueError, RuntimeError) as error:
        got = f"{str(source)!r}, which is no folder and could not be downloaded"
        reason = _first_line(error)
        hint = f"check name and network, or download it elsewhere ({reason}); {known}"
        raise InputError("prior", expected, got, hint) from error


def _read(folder: Path, source: str | Path) -> tuple[nn.Module, Any]:
    """Network and noise levels of a pipeline folder, of the old flat layout too."""
    diffusers = _diffusers()

    parts = [folder / part if (folder / part).is_dir() else folder for part in _PARTS]
    expected = "a folder with a UNet2DModel and a DDPM or DDIM scheduler"
    try:
        with _quiet():
            scheduler = diffusers.DDIMScheduler.from_pretrained(parts[1])
            settings = {
                "clip_sample": False,
                "set_alpha_to_one": True,
                "timestep_spacing": "trailing",
            }
            scheduler = diffusers.DDIMScheduler.from_config(
                scheduler.config, **settings
            )
            unet = diffusers.UNet2DModel.from_pretrained(
                parts[0], low_cpu_mem_usage=False, torch_dtype=torch.float32
            )
    except Exception as error:
        reason = _first_line(error)
        hint = "unet/ needs config.json and weights, scheduler/ its configuration"
        got = f"{str(source)!r} ({reason})"
        raise InputError("prior", expected, got, hint) from error
    return unet.eval().requires_grad_(False), scheduler


_PARTS = ("unet", "scheduler")


def _first_line(error: Exception) -> str:
    """What an error says first, not too long."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten((lines or [type(error).__name__])[0], 100, placeholder=" …")


def _read_about(folder: Path) -> dict[str, Any]:
    """What ``save`` kept beside the weights; nothing for other models."""
    path = folder / _ABOUT
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("prior", "JSON in prior.json", str(path)) from error
    return about if isinstance(about, dict) else {}


def _diffusers() -> Any:
    """The library, loaded where it is first needed."""
    try:
        import diffusers
    except ImportError as error:
        hint = "install it with: pip install 'gradinv-helpers[diffusion]'"
        raise InputError("prior", "the package diffusers", "none", hint) from error
    return diffusers


def _converted(unet: nn.Module, like: Tensor) -> nn.Module:
    """A copy with the type and on the device of ``like``."""
    with _quiet():  # diffusers warns of any change of type
        return copy.deepcopy(unet).to(like.device, like.dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from writing bars and advice to the terminal."""
    logging = _diffusers().utils.logging
    before = logging.get_verbosity()
    # What it calls an error may be a detour; a true one is raised as well.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
