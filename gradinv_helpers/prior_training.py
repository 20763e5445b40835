"""Train a prior of images and save it: the work behind ``gradinv train-prior``."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradinv_helpers import plots
from gradinv_helpers.compute import resolve_device
from gradinv_helpers.data import Images, is_split, load_images
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.experiment import versions
from gradinv_helpers.files import expand_home, prepare_folder, write_bytes
from gradinv_helpers.priors.diffusion import DiffusionPrior, train_diffusion
from gradinv_helpers.priors.library import folder_kind
from gradinv_helpers.priors.vae import VAEPrior
from gradinv_helpers.priors.vae_training import train_vae

# What every kind can be told beside the images, with its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "vae": {
        "epochs": 50,
        "latent_size": 16,
        "width": 32,
        "hidden": 128,
        "batch_size": 64,
        "lr": 3e-3,
    },
    "diffusion": {"steps": 4000, "batch_size": 32, "lr": 1e-3, "half": False},
}
SIZES = {"digits": 16, "faces": 24}  # sides in pixels; other data sets keep theirs
_HELD_OUT, _MOST_HELD_OUT = 0.1, 500
_HALVINGS = 4  # sides of the diffusion model's images are multiples of it
_SHOWN = 8


@dataclass(frozen=True)
class PriorOptions:
    """Everything that ``gradinv train-prior`` can be told; see its ``--help``.

    What is ``None`` takes the default of the kind, see ``SETTINGS`` and ``SIZES``.

    Raises:
        InputError: A value is unknown, out of range, or means nothing to this kind.
    """

    kind: str
    dataset: str
    data_root: str | None
    device: str
    seed: int
    output_dir: str
    image_size: int | None = None
    epochs: int | None = None
    steps: int | None = None
    latent_size: int | None = None
    width: int | None = None
    hidden: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    half: bool | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, SETTINGS)
        check_seed("seed", self.seed)
        resolve_device(self.device)
        if self.image_size is not None:
            check_count("image_size", self.image_size)
        for name in dict.fromkeys(n for known in SETTINGS.values() for n in known):
            value = getattr(self, name)
            if name not in SETTINGS[self.kind]:
                if value is not None:
                    known = ", ".join(SETTINGS[self.kind])
                    got, hint = repr(value), f"it takes {known}"
                    raise InputError(name, f"nothing for kind {self.kind}", got, hint)
            elif name == "lr":
                check_number(name, self.settings[name], exclusive=True)
            elif name != "half":
                check_count(name, self.settings[name])

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the training, defaults filled in."""
        given = {name: getattr(self, name) for name in SETTINGS[self.kind]}
        defaults = SETTINGS[self.kind]
        return {k: defaults[k] if v is None else v for k, v in given.items()}

    @property
    def side(self) -> int | None:
        """Height and width of the images; ``None`` for those of the data set."""
        return self.image_size or SIZES.get(self.dataset)

    @property
    def name(self) -> str:
        """What the prior is called in reports."""
        return f"{self.kind}-{self.dataset}"

    @property
    def command(self) -> str:
        """The command line that trains the same prior again."""
        words = [f"gradinv train-prior {self.kind} --dataset {self.dataset}"]
        values = {"image_size": self.side, **self.settings, "seed": self.seed}
        for name, value in values.items():
            option = "--" + name.replace("_", "-")
            if value is True:
                words.append(option)
            elif value is not None and value is not False:
                words.append(f"{option} {value}")
        return " ".join([*words, "--output-dir FOLDER"])


@dataclass(frozen=True)
class PriorResult:
    """What ``run_prior_training`` made.

    Attributes:
        prior: The trained prior.
        folder: Where it lies; ``load_prior`` reads it.
        files: Files written, relative to the folder.
        measures: What the held-out images say of it.
        interrupted: Whether Ctrl-C cut the training short.
        split: Whether the data set has a test split, which the training never saw.
    """

    prior: VAEPrior | DiffusionPrior
    folder: Path
    files: tuple[Path, ...]
    measures: dict[str, Any]
    interrupted: bool
    split: bool

    @property
    def summary(self) -> str:
        """The measures in one line, each beside what a guess would reach."""
        found = self.measures
        if isinstance(self.prior, DiffusionPrior):
            text = (
                f"denoising error {found['denoising_loss']:.4f} (training images "
                f"{found['denoising_loss_of_training_images']:.4f}, the mean image "
                f"{found['loss_of_the_mean_image']:.4f})"
            )
        else:
            text = (
                f"log likelihood {found['log_likelihood']:.1f} nats per image, with "
                f"what the decoder misses {found['soft_log_likelihood']:.1f}; "
                f"rebuilt at {found['reconstruction_psnr']:.1f} dB (the mean image "
                f"{found['mean_image_psnr']:.1f} dB)"
            )
        return f"on {found['images']} held-out images: {text}"


def run_prior_training(
    options: PriorOptions,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> PriorResult:
    """Train on the train split, measure on a held-out part of it, write the folder.

    The folder appears whole or not at all. After Ctrl-C it holds what was learned so
    far; where nothing was learned yet, ``KeyboardInterrupt`` goes on to the caller.

    Args:
        options: What to train, and on what.
        on_progress: Called with the epochs or steps done, and their number.
        on_stage: Called with a line before each stage.

    Raises:
        InputError: An option does not fit, or the folder cannot be written to.
    """
    images = load_images(
        options.dataset, data_root=options.data_root, image_size=options.side
    )
    split = is_split(options.dataset, options.data_root)
    _check_images(options, images)
    folder = _usable_folder(options.output_dir)
    tell = on_progress or (lambda done, total: None)
    stage = on_stage or (lambda text: None)
    train = _train_vae if options.kind == "vae" else _train_diffusion
    stage(f"training on {len(images)} images of {options.dataset}")
    prior, measures, interrupted = train(options, images, tell, stage)
    source = {
        "command": options.command,
        "dataset": options.dataset,
        "split": "train" if split else "all",
        "image_size": images.shape[1],
        "interrupted": interrupted,
        "versions": versions(),
    }
    prior = replace(prior, about={**source, **prior.about})
    held_out = images[prior.about["held_out_indices"][:_SHOWN]]
    picture = _picture(prior, held_out, options.seed)

    def fill(fresh: Path) -> None:
        if isinstance(prior, DiffusionPrior):
            prior.save(fresh, half=options.settings["half"])
        else:
            prior.save(fresh)
        write_bytes(fresh / "samples.png", picture)

    _replace_folder(folder, fill)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return PriorResult(prior, folder, tuple(files), measures, interrupted, split)


# --- the two kinds --------------------------------------------------------------


def _train_vae(
    options: PriorOptions,
    images: Images,
    tell: Callable[[int, int], None],
    stage: Callable[[str], None],
) -> tuple[VAEPrior, dict[str, Any], bool]:
    prior = train_vae(
        images,
        **options.settings,
        seed=options.seed,
        held_out=_HELD_OUT,
        name=options.name,
        on_epoch=lambda epoch: tell(epoch.epoch, epoch.epochs),
    )
    return prior, prior.about["held_out"], prior.about["training"]["interrupted"]


def _train_diffusion(
    options: PriorOptions,
    images: Images,
    tell: Callable[[int, int], None],
    stage: Callable[[str], None],
) -> tuple[DiffusionPrior, dict[str, Any], bool]:
    settings = {k: v for k, v in options.settings.items() if k != "half"}
    chosen, kept = _held_out(len(images), options.seed)
    prior = train_diffusion(
        images[chosen],
        **settings,
        seed=options.seed,
        device=resolve_device(options.device),
        name=options.name,
        on_step=lambda step: tell(step.step, step.steps),
    )
    stage("measuring the prior on held-out images")
    mean = images[chosen].pixels.mean(0)
    measures = {
        "images": len(kept),
        "denoising_loss": prior.denoising_loss(images[kept]),
        "denoising_loss_of_training_images": prior.denoising_loss(
            images[chosen[: len(kept)]]
        ),
        "loss_of_the_mean_image": float(
            (2 * (images[kept].pixels - mean)).square().mean()
        ),
    }
    about = {
        **prior.about,
        "planned_steps": options.settings["steps"],
        "train_indices": chosen.tolist(),
        "held_out_indices": kept.tolist(),
        "held_out": measures,
    }
    interrupted = prior.about["steps"] < options.settings["steps"]
    return replace(prior, about=about), measures, interrupted


def _held_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted places of the images to train on, and of those held out."""
    number = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[number:].sort().values, order[:number].sort().values


def _check_images(options: PriorOptions, images: Images) -> None:
    """Refuse images that this kind cannot be trained on."""
    side = images.shape[1]
    if len(images) < 3:
        raise InputError("dataset", "at least 3 training images", len(images))
    if options.kind == "diffusion" and side % _HALVINGS:
        near = max(_HALVINGS, round(side / _HALVINGS) * _HALVINGS)
        expected = f"a multiple of {_HALVINGS} for a diffusion model"
        raise InputError("image_size", expected, side, f"try --image-size {near}")


def _picture(prior: VAEPrior | DiffusionPrior, images: Images, seed: int) -> bytes:
    """Real images over draws of the same classes, as a PNG."""
    told = prior.given(images.labels)
    if isinstance(told, DiffusionPrior):
        drawn = told.sample(1, seed=seed)[0]
    else:
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(len(images), prior.size, generator=generator)
        with torch.no_grad():
            drawn = told.decode(latents).clamp(0, 1)
    return plots.to_png(plots.image_grid({"held out": images, "drawn": drawn}))


# --- the folder -----------------------------------------------------------------


def _usable_folder(path: str) -> Path:
    """The folder to write, if it is new, empty, or holds an earlier prior only."""
    folder = expand_home(path).absolute()
    prepare_folder(folder.parent)
    expected = "a new folder, or one that train-prior wrote"
    hint = "choose another --output-dir"
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise InputError("output_dir", expected, f"{path!r}, where you are", hint)
    if folder.exists() and not folder.is_dir():
        raise InputError("output_dir", expected, f"the file {path!r}", hint)
    inside = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    known = {"vae": {"config.json", "model.safetensors", "samples.png"}}
    known["diffusion"] = {"model_index.json", "prior.json", "samples.png"}
    known["diffusion"] |= {"unet", "scheduler"}
    own = known.get(folder_kind(folder) or "", set())
    foreign = [name for name in inside if name not in own]
    if not foreign and "unet" in inside and "prior.json" not in inside:
        foreign = ["unet"]  # a pipeline from elsewhere
    if foreign:
        got = f"{path!r}, which holds {foreign[0]!r}"
        raise InputError("output_dir", expected, got, hint)
    return folder


def _replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a new folder, then give it its name in one step.

    After any failure the folder is what it was.
    """
    token = secrets.token_hex(4)
    fresh = folder.with_name(f".{folder.name}-{token}-new")
    old = folder.with_name(f".{folder.name}-{token}-old")
    try:
        fresh.mkdir()
        fill(fresh)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(fresh, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
    except OSError as error:
        expected = "a folder that can be written to"
        got = f"{str(folder)!r} ({error.strerror or type(error).__name__})"
        hint = "free some space or choose another folder"
        raise InputError("output_dir", expected, got, hint) from error
    finally:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
