"""Priors are found by name, in folders and on the hub, and checked against images."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradinv_helpers
from gradinv_helpers.data import load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.diffusion import (
    PRETRAINED_DIFFUSION,
    DiffusionPrior,
    train_diffusion,
)
from gradinv_helpers.priors.gaussian import SpectrumPrior, spectrum_prior
from gradinv_helpers.priors.library import PRIORS, folder_kind, load_prior
from gradinv_helpers.priors.vae import VAEPrior
from gradinv_helpers.priors.vae_files import PRETRAINED

diffusers = pytest.importorskip("diffusers")

SHIPPED = Path(gradinv_helpers.__file__).parent / "priors/pretrained"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small() -> DiffusionPrior:
    images = load_images("digits", image_size=8)[:8]
    return train_diffusion(images, steps=1, batch_size=2, channels=(8, 16))


@pytest.fixture
def no_hub(monkeypatch) -> list[str]:
    """Names asked of the hub, which cannot be reached."""
    asked: list[str] = []

    def fail(name, *_, **__):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(diffusers.DDPMPipeline, "download", fail)
    return asked


def test_every_shipped_prior_has_its_name() -> None:
    assert set(PRIORS) == {"spectrum", *PRETRAINED, *PRETRAINED_DIFFUSION}
    assert {p.name for p in SHIPPED.iterdir()} == set(PRIORS) - {"spectrum"}


@pytest.mark.parametrize("name", sorted(set(PRIORS) - {"spectrum"}))
def test_shipped_priors_by_name_and_as_folders(name: str) -> None:
    expected = VAEPrior if name.startswith("vae") else DiffusionPrior
    dataset, side = {"digits": ("digits", 16), "photos": ("photos", 32)}[
        name.split("-")[1]
    ]
    shape = load_images(dataset, split="test", image_size=side).shape
    by_name, by_folder = load_prior(name, shape), load_prior(SHIPPED / name)
    assert type(by_name) is type(by_folder) is expected
    assert by_name.image_shape == shape
    labels = torch.tensor([3])
    latents = torch.linspace(-1, 1, by_name.size).view(1, -1)
    images = [p.given(labels).decode(latents) for p in (by_name, by_folder)]
    assert torch.equal(*images)


def test_spectrum_takes_any_shape_and_needs_one() -> None:
    found = load_prior("spectrum", (3, 12, 20))
    assert isinstance(found, SpectrumPrior)
    expected = spectrum_prior((3, 12, 20))
    assert torch.equal(found.deviations, expected.deviations)
    with pytest.raises(InputError, match=r"^image_shape: .*\(C, H, W\).*None"):
        load_prior("spectrum")


@pytest.mark.parametrize("name", ["vae-digits", "diffusion-digits"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 8), (1, 16)])
def test_images_of_another_shape(name: str, shape) -> None:
    with pytest.raises(InputError) as stop:
        load_prior(name, shape)
    line = str(stop.value)
    assert line.startswith("image_shape: expected (1, 16, 16), the images that")
    assert str(shape) in line and name in line
    assert "image_size=16" in line and "train-prior" in line and "'spectrum'" in line


def test_folders_are_told_apart_by_their_files(small, elsewhere: Path) -> None:
    VAEPrior.load("vae-digits").save("mine/vae")
    small.save("mine/diffusion")
    assert isinstance(load_prior("mine/vae"), VAEPrior)
    assert isinstance(load_prior(elsewhere / "mine/vae", (1, 16, 16)), VAEPrior)
    found = load_prior("mine/diffusion", [1, 8, 8])
    assert isinstance(found, DiffusionPrior)
    assert found.name == small.name
    assert folder_kind(elsewhere / "mine") is None


def test_pipelines_of_diffusers(small, no_hub, elsewhere: Path) -> None:
    """The layout of a whole pipeline, and the old one of a model alone."""
    small.save("whole")
    (elsewhere / "whole/prior.json").unlink()
    flat = elsewhere / "flat"
    flat.mkdir()
    for part in ("unet", "scheduler"):
        for file in (elsewhere / "whole" / part).iterdir():
            shutil.copy(file, flat)
    for name in ("whole", "flat", "./whole"):
        prior = load_prior(name, (1, 8, 8))
        assert isinstance(prior, DiffusionPrior)
        noise = torch.ones(1, prior.size)
        labels = torch.tensor([2])
        found, expected = (p.given(labels).decode(noise) for p in (prior, small))
        torch.testing.assert_close(found, expected)
    assert no_hub == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vae-digit", ["did you mean 'vae-digits'", *PRIORS]),
        ("gaussian", [*PRIORS, "train-prior", "owner/model"]),
        ("a/b/c", PRIORS),
        ("./a/b", PRIORS),
        ("/a/b", PRIORS),
        ("hf:a/b", PRIORS),
        ("../b", PRIORS),
    ],
)
def test_unknown_names(name: str, words, no_hub) -> None:
    with pytest.raises(InputError) as stop:
        load_prior(name)
    line = str(stop.value)
    assert line.startswith("prior: expected ") and repr(name) in line
    assert all(word in line for word in words), line
    assert no_hub == []


def test_only_owner_and_model_asks_the_hub(no_hub, small, elsewhere: Path) -> None:
    with pytest.raises(InputError, match="^prior: .*could not be downloaded"):
        load_prior("google/ddpm-cifar10-32")
    assert no_hub == ["google/ddpm-cifar10-32"]
    small.save("google/ddpm-cifar10-32")
    assert isinstance(load_prior("google/ddpm-cifar10-32"), DiffusionPrior)
    assert len(no_hub) == 1


@pytest.mark.parametrize("name", ["empty", "some/folder", ""])
def test_folders_without_a_prior(name: str, no_hub, elsewhere: Path) -> None:
    (elsewhere / name).mkdir(parents=True, exist_ok=True)
    (elsewhere / name / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"^prior: .*model\.safetensors.*unet/"):
        load_prior(name)
    assert no_hub == []


def test_damaged_folders(elsewhere: Path) -> None:
    VAEPrior.load("vae-digits").save("mine")
    (elsewhere / "mine/config.json").unlink()
    with pytest.raises(InputError, match=r"^prior: .*config\.json"):
        load_prior("mine")
    (elsewhere / "other").mkdir()
    (elsewhere / "other/model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"^prior: .*unet"):
        load_prior("other")


def test_light_priors_do_not_load_the_library_of_diffusion_models() -> None:
    code = (
        "import sys; from gradinv_helpers.priors.library import load_prior; "
        "assert 'torch' not in sys.modules; "
        "load_prior('spectrum', (1, 4, 4)); load_prior('vae-digits'); "
        "assert 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
