"""Training a prior: what it learns from, what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from gradinv_helpers import cli, prior_training
from gradinv_helpers.data import load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.prior_training import (
    SETTINGS,
    PriorOptions,
    run_prior_training,
)
from gradinv_helpers.priors.diffusion import DiffusionPrior
from gradinv_helpers.priors.library import load_prior
from gradinv_helpers.priors.vae import VAEPrior

pytest.importorskip("diffusers")

VAE_FILES = {"config.json", "model.safetensors", "samples.png"}
DIFFUSION_FILES = {
    "model_index.json",
    "prior.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
QUICK = {
    "vae": ["--epochs", "1", "--width", "4", "--hidden", "8", "--latent-size", "3"],
    "diffusion": ["--steps", "2", "--batch-size", "2"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder with small images of two classes in train/ and test/."""
    digits = load_images("digits", image_size=8)
    for split, numbers in (("train", range(40)), ("test", range(40, 48))):
        for number in numbers:
            image = digits[number]
            folder = tmp_path / f"few/{split}/{'odd' if image.labels % 2 else 'even'}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (255 * image.pixels[0, 0]).byte().numpy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(kind: str, *more: str) -> list[str]:
    few = ["--dataset", "folder", "--data-root", "few", "--image-size", "8"]
    return ["train-prior", kind, *few, *QUICK[kind], "--output-dir", "made", *more]


def options(kind: str, **changes) -> PriorOptions:
    values = {
        "kind": kind,
        "dataset": "folder",
        "data_root": "few",
        "device": "cpu",
        "seed": 0,
        "output_dir": "made",
        "image_size": 8,
    }
    quick = {
        "vae": {"epochs": 2, "width": 4, "hidden": 8, "latent_size": 3},
        "diffusion": {"steps": 3, "batch_size": 2},
    }
    return PriorOptions(**values | quick[kind] | changes)


def content(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def refused(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    return err.strip().removeprefix("gradinv: ")


@pytest.mark.parametrize(
    ("kind", "files", "kept"),
    [
        ("vae", VAE_FILES, "config.json"),
        ("diffusion", DIFFUSION_FILES, "prior.json"),
    ],
)
def test_command_writes_a_prior_that_loads(
    kind: str, files: set[str], kept: str, elsewhere: Path, capsys
) -> None:
    assert cli.run(line(kind)) == 0
    out, err = capsys.readouterr()
    assert content(elsewhere / "made") == files
    assert all(name in out for name in files) and "wrote to made:" in out
    assert re.search(r"on 4 held-out images: .*the mean image", out)
    assert err.splitlines()[0] == "training on 40 images of folder"
    prior = load_prior("made", (3, 8, 8))
    assert isinstance(prior, VAEPrior if kind == "vae" else DiffusionPrior)
    assert prior.name == f"{kind}-folder"
    about = json.loads((elsewhere / "made" / kept).read_text())
    assert about["split"] == "train" and about["interrupted"] is False
    assert about["held_out"]["images"] == 4
    with Image.open(elsewhere / "made/samples.png") as picture:
        assert picture.width > 100 and picture.height > 50


@pytest.mark.parametrize("kind", ["vae", "diffusion"])
def test_the_folder_holds_what_was_trained(kind: str) -> None:
    result = run_prior_training(options(kind))
    loaded = load_prior(result.folder)
    labels = torch.tensor([1, 0])
    latents = torch.linspace(-1, 1, 2 * loaded.size).view(2, -1)
    found = loaded.given(labels).decode(latents)
    torch.testing.assert_close(found, result.prior.given(labels).decode(latents))


@pytest.mark.parametrize("kind", ["vae", "diffusion"])
def test_training_and_held_out_images_are_the_train_split(kind: str) -> None:
    about = run_prior_training(options(kind, seed=4)).prior.about
    trained, kept = about["train_indices"], about["held_out_indices"]
    assert len(kept) == 4
    assert sorted([*trained, *kept]) == list(range(40))
    other = run_prior_training(options(kind, seed=5)).prior.about
    assert other["held_out_indices"] != kept


@pytest.mark.parametrize("kind", ["vae", "diffusion"])
def test_the_test_split_changes_no_weight(kind: str, elsewhere: Path) -> None:
    """The test split, where victims come from, reaches no weight."""

    def weights() -> bytes:
        run_prior_training(options(kind, epochs=1) if kind == "vae" else options(kind))
        name = {"vae": "model", "diffusion": "unet/diffusion_pytorch_model"}[kind]
        return (elsewhere / f"made/{name}.safetensors").read_bytes()

    first = weights()
    for path in (elsewhere / "few/test").rglob("*.png"):
        Image.new("L", (8, 8), 77).save(path)
    assert weights() == first
    for path in (elsewhere / "few/train").rglob("*.png"):
        Image.new("L", (8, 8), 77).save(path)
    assert weights() != first


def test_held_out_numbers_of_a_diffusion_model() -> None:
    result = run_prior_training(options("diffusion"))
    images = load_images("folder", data_root="few", image_size=8)
    about = result.prior.about
    trained, kept = images[about["train_indices"]], images[about["held_out_indices"]]
    gap = 2 * (kept.pixels - trained.pixels.mean(0))
    assert result.measures["loss_of_the_mean_image"] == pytest.approx(
        float((gap**2).mean()), rel=1e-5
    )
    assert result.measures["denoising_loss"] == pytest.approx(
        load_prior("made").denoising_loss(kept), rel=1e-4
    )
    assert about["held_out"] == result.measures


def test_half_the_bits() -> None:
    sizes = {}
    for half in (False, True):
        folder = run_prior_training(options("diffusion", half=half)).folder
        weights = folder / "unet/diffusion_pytorch_model.safetensors"
        sizes[half] = weights.stat().st_size
    assert 0.45 < sizes[True] / sizes[False] < 0.6


def test_same_seed_gives_the_same_bytes(elsewhere: Path) -> None:
    def files(folder: str, seed: int) -> dict[str, bytes]:
        run_prior_training(options("vae", output_dir=folder, seed=seed))
        paths = (elsewhere / folder).iterdir()
        return {p.name: p.read_bytes() for p in paths}

    first = files("a", 1)
    assert files("b", 1) == first
    assert files("c", 2)["model.safetensors"] != first["model.safetensors"]


def test_the_command_in_the_file_is_the_one_that_was_run(monkeypatch) -> None:
    chosen = options("diffusion", dataset="digits", half=True, image_size=None)
    words = chosen.command.split()
    assert words[0] == "gradinv" and "--image-size 16" in chosen.command
    seen = []

    def note(given, **_):
        seen.append(given)
        raise InputError("dataset", "an end", "here")

    monkeypatch.setattr(prior_training, "run_prior_training", note)
    assert cli.run(words[1:]) == 2
    (given,) = seen
    assert given.output_dir == "FOLDER" and given.side == 16
    assert given.settings == chosen.settings and given.seed == chosen.seed


def test_defaults() -> None:
    digits = options("vae", dataset="digits", image_size=None, latent_size=None)
    assert digits.side == 16 and digits.settings["latent_size"] == 16
    assert options("vae", dataset="photos", image_size=None).side is None
    assert "lr 0.003" in digits.command
    for kind, known in SETTINGS.items():
        group = typer.main.get_command(cli.app).commands["train-prior"]
        found = {o for p in group.params for o in p.opts}
        assert {"--" + name.replace("_", "-") for name in known} <= found, kind


# --- the folder -------------------------------------------------------------------


def test_an_earlier_prior_is_replaced_whole(elsewhere: Path) -> None:
    assert cli.run(line("diffusion")) == 0
    assert cli.run(line("vae")) == 0
    assert content(elsewhere / "made") == VAE_FILES
    assert isinstance(load_prior("made"), VAEPrior)
    (elsewhere / "empty").mkdir()
    assert cli.run(line("vae", "--output-dir", "empty")) == 0
    assert content(elsewhere / "empty") == VAE_FILES


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "unet/config.json"])
def test_a_folder_with_other_files_is_left_alone(
    name: str, elsewhere: Path, capsys
) -> None:
    file = elsewhere / "made" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    found = refused(line("vae"), capsys)
    first = name.split("/")[0]
    assert found.startswith("--output-dir: expected a new folder, or one that train-")
    assert first in found and "choose another" in found
    assert content(elsewhere / "made") == {name}


def test_folders_that_cannot_be_used(elsewhere: Path, capsys) -> None:
    (elsewhere / "file").write_text("x")
    before = content(elsewhere)
    for name in ("file", "file/below", ".", ".."):
        assert refused(line("vae", "--output-dir", name), capsys).startswith(
            "--output-dir: expected a"
        )
    assert content(elsewhere) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, InputError])
@pytest.mark.parametrize("when", ["filling", "renaming"])
def test_a_failure_leaves_the_earlier_folder(
    stop, when: str, elsewhere: Path, monkeypatch
) -> None:
    folder = elsewhere / "made"
    folder.mkdir()
    (folder / "a").write_text("old")
    before = content(elsewhere)
    error = InputError("a", "b", "c") if stop is InputError else stop(28, "full")
    original = os.replace

    def replace(source, target) -> None:
        if Path(target) == folder and "-new" in str(source):
            raise error
        original(source, target)

    def fill(fresh: Path) -> None:
        (fresh / "a").write_text("new")
        if when == "filling":
            raise error

    if when == "renaming":
        monkeypatch.setattr(os, "replace", replace)
    expected = InputError if stop is OSError else stop
    with pytest.raises(expected):
        prior_training._replace_folder(folder, fill)
    assert content(elsewhere) == before
    assert (folder / "a").read_text() == "old"
    assert not [p for p in elsewhere.iterdir() if p.name.startswith(".")]


# --- Ctrl-C -----------------------------------------------------------------------


def stop_at(number: int):
    def tell(done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize(
    ("kind", "more"), [("vae", {"epochs": 50}), ("diffusion", {"steps": 50})]
)
def test_interrupt_keeps_what_was_learned(kind: str, more, elsewhere: Path) -> None:
    result = run_prior_training(options(kind, **more), on_progress=stop_at(2))
    assert result.interrupted
    about = load_prior("made").about
    assert about["interrupted"] is True
    if kind == "vae":
        assert len(about["history"]) == 2
    else:
        assert (about["steps"], about["planned_steps"]) == (2, 50)
    assert "samples.png" in content(elsewhere / "made")


def test_interrupted_command_says_so(monkeypatch, capsys) -> None:
    original = prior_training.run_prior_training
    monkeypatch.setattr(
        prior_training,
        "run_prior_training",
        lambda given, **_: original(given, on_progress=stop_at(1)),
    )
    assert cli.run(line("diffusion", "--steps", "9")) == 130
    out, err = capsys.readouterr()
    assert "model_index.json" in out
    assert err == (
        "gradinv: interrupted; what was learned so far was measured and written\n"
    )


def test_interrupt_before_anything_was_learned(elsewhere, monkeypatch, capsys) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prior_training, "train_vae", stop)
    before = content(elsewhere)
    assert cli.run(line("vae")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "gradinv: interrupted"
    assert content(elsewhere) == before and not (elsewhere / "made").exists()


# --- bad input --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "start"),
    [
        ("vae", ["--epochs", "0"], "--epochs: expected an integer of at least 1"),
        ("vae", ["--steps", "5"], "--steps: expected nothing for kind vae, got 5"),
        ("vae", ["--half"], "--half: expected nothing for kind vae"),
        ("vae", ["--latent-size", "0"], "--latent-size: expected an integer"),
        ("vae", ["--lr", "0"], "--lr: expected a finite number > 0"),
        ("vae", ["--lr", "nan"], "--lr: expected a finite number > 0"),
        ("vae", ["--image-size", "0"], "--image-size: expected an integer of at lea"),
        ("vae", ["--seed", "-1"], "--seed: expected an integer of at least 0"),
        ("vae", ["--device", "abacus"], "--device: expected one of auto"),
        ("vae", ["--dataset", "digit"], "--dataset: expected one of .*'digits'"),
        ("vae", ["--data-root", "no"], "--data-root: expected a folder"),
        ("diffusion", ["--epochs", "2"], "--epochs: .* it takes steps, batch_size"),
        ("diffusion", ["--latent-size", "2"], "--latent-size: expected nothing"),
        ("diffusion", ["--steps", "-1"], "--steps: expected an integer"),
        ("diffusion", ["--batch-size", "0"], "--batch-size: expected an integer"),
        ("diffusion", ["--image-size", "10"], "--image-size: expected a multiple of 4"),
        ("diffusion", ["--config", "none.json"], "--config: expected a JSON file"),
        ("diffusion", ["--steps", "many"], "Invalid value for '--steps'"),
    ],
)
def test_bad_input(kind: str, more, start: str, elsewhere, capsys) -> None:
    before = content(elsewhere)
    found = refused(line(kind, *more), capsys)
    assert re.match(start, found), found
    assert content(elsewhere) == before and not (elsewhere / "made").exists()


def test_unknown_kind(capsys) -> None:
    found = refused(["train-prior", "gan"], capsys)
    assert found == "kind: expected one of vae, diffusion, got 'gan'"
    assert "vae|diffusion" in refused(["train-prior"], capsys)


def test_a_data_set_without_splits_says_so(elsewhere: Path, capsys) -> None:
    (elsewhere / "few/test").rename(elsewhere / "rest")
    arguments = line("vae", "--data-root", "few/train")
    assert cli.run(arguments) == 0
    assert "the prior has seen all of its images" in capsys.readouterr().out
    about = json.loads((elsewhere / "made/config.json").read_text())
    assert about["split"] == "all"


def test_every_option_of_the_design_is_there() -> None:
    params = typer.main.get_command(cli.app).commands["train-prior"].params
    found = {option for param in params for option in param.opts}
    common = "--config --dataset --data-root --device --seed --output-dir"
    wanted = f"kind --epochs --steps --latent-size --batch-size --lr {common}"
    assert set(wanted.split()) <= found
    assert all(p.help for p in params if p.param_type_name == "option")
