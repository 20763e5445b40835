"""The diffusion attack as a command: files, floors, labels, rounds, Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from gradinv_helpers import cli, diffusion_experiment
from gradinv_helpers.checkpoints import ModelInfo, save_checkpoint
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.diffusion_experiment import (
    ATTACKS,
    DiffusionOptions,
    prior_draws,
    prior_floor,
    run_diffusion_inversion,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.diffusion import DiffusionPrior, train_diffusion

pytest.importorskip("diffusers")

FILES = ("client_{}_round_{}.png", "loss_client_{}_round_{}.json")
FILES = (*FILES, "metrics_client_{}_round_{}.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Small images of three classes, and a small diffusion model of them."""
    folder = tmp_path_factory.mktemp("source")
    digits = load_images("digits", image_size=8)
    for split, numbers in (("train", range(60)), ("test", range(60, 84))):
        for number in numbers:
            image = digits[number]
            home = folder / f"few/{split}/{'abc'[int(image.labels) % 3]}"
            home.mkdir(parents=True, exist_ok=True)
            pixels = (255 * image.pixels[0, 0]).byte().numpy()
            Image.fromarray(pixels).save(home / f"{number}.png")
    images = load_images("folder", data_root=folder / "few", image_size=8)
    prior = train_diffusion(images, steps=30, batch_size=8, channels=(8, 16))
    prior.save(folder / "prior")
    dataclasses.replace(prior, about={"dataset": "folder", "split": "all"}).save(
        folder / "knowing"
    )
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder; and few, quick draws of the prior alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusion_experiment, "_PRIOR_DRAWS", 2)
    monkeypatch.setattr(diffusion_experiment, "_PRIOR_STEPS", 5)
    return tmp_path


def options(source: Path, **changes) -> DiffusionOptions:
    values = {
        "dataset": "folder",
        "data_root": str(source / "few"),
        "device": "cpu",
        "seed": 0,
        "output_dir": "out",
        "prior": str(source / "prior"),
        "steps": 4,
        "judge": False,
    }
    return DiffusionOptions(**values | changes)


def line(source: Path, *more: str) -> list[str]:
    few = ["--dataset", "folder", "--data-root", str(source / "few")]
    quick = ["--prior", str(source / "prior"), "--steps", "3", "--no-judge"]
    return ["diffusion-dlg", *few, *quick, "--output-dir", "out", *more]


def content(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def read(kind: str, client: int = 0, number: int = 0, folder: str = "out") -> dict:
    path = Path(folder) / f"{kind}_client_{client}_round_{number}.json"
    return json.loads(path.read_text())


# --- files and scores -------------------------------------------------------------


def test_command_writes_the_promised_files(source, elsewhere, capsys) -> None:
    more = ["--num-clients", "2", "--samples-per-client", "2", "--judge"]
    assert cli.run(line(source, *more)) == 0
    out, err = capsys.readouterr()
    names = {file.format(k, 0) for k in range(2) for file in FILES} | {"run.json"}
    assert content(elsewhere) == {f"out/{name}" for name in names}
    assert all(name in out for name in names) and "wrote to out:" in out
    assert "client 0, round 0" in out and "client 1, round 0" in out
    assert "prior_alone" in out and "upper bound" not in out
    assert err.splitlines()[-1] == "inverting the update of client 1"
    record = json.loads((elsewhere / "out/run.json").read_text())
    assert record["command"] == "gradinv diffusion-dlg"
    assert record["options"]["steps"] == 3 and record["options"]["lambda_prior"] == 2
    assert record["interrupted"] is False
    assert list(record["results"]) == ["client_0", "client_1"]
    assert set(record["files"]) == names - {"run.json"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_scored_beside_its_floors(attack: str, source) -> None:
    chosen = options(source, attack=attack, samples_per_client=3, judge=True)
    run_diffusion_inversion(chosen)
    found = read("metrics")
    assert found["attack"] == attack
    assert (found["client"], found["round"]) == (0, 0)
    assert found["indices"] == [0, 1, 2]
    pool = load_images("folder", data_root=source / "few", split="test", image_size=8)
    assert found["true_labels"] == pool.labels[:3].tolist()
    for name in ("mse", "psnr", "feature_similarity", "class_correct"):
        assert len(found["per_image"][name]) == 3
        for floor in ("constant", "random_image", "batch_mean", "prior_alone"):
            assert len(found["floors"][floor][name]) == 3
    summary = found["summary"]
    best = max(means["psnr"] for means in summary["floors"].values())
    assert summary["gains"]["psnr"] == pytest.approx(
        summary["psnr"]["mean"] - best, abs=1e-3
    )


def test_floor_of_the_prior_is_the_mean_over_its_draws(source) -> None:
    prior = DiffusionPrior.load(source / "prior")
    pool = load_images("folder", data_root=source / "few", split="test", image_size=8)
    truth = pool[[5]]
    draws = prior_draws(prior, truth.labels, 3, seed=7)
    assert draws.shape == (3, 1, 3, 8, 8)
    assert torch.equal(draws, prior_draws(prior, truth.labels, 3, seed=7))
    assert not torch.equal(draws, prior_draws(prior, truth.labels, 3, seed=8))
    floor = prior_floor(draws, torch.tensor([0]), truth)
    errors = (draws - truth.pixels).square().mean((1, 2, 3, 4)).double()
    assert floor.mse[0] == pytest.approx(float(errors.mean()), rel=1e-5)
    decibels = (-10 * errors.log10()).tolist()
    assert [d[0] for d in floor.psnr_draws] == pytest.approx(decibels, rel=1e-5)
    assert floor.label_correct == (float(truth.labels[0] == 0),)
    assert floor.class_correct is None


def test_floor_of_the_prior_pairs_images_before_it_scores(source) -> None:
    """A prior that draws the batch in another order has drawn the batch."""
    pool = load_images("folder", data_root=source / "few", split="test", image_size=8)
    truth = pool[[0, 9, 18]]
    mixed = truth.pixels[[2, 0, 1]][None]
    floor = prior_floor(mixed, truth.labels[[2, 0, 1]], truth, others=pool)
    assert floor.mse == (0.0, 0.0, 0.0)
    assert floor.label_correct == (1.0, 1.0, 1.0)
    assert floor.identified == (1.0, 1.0, 1.0)


def test_a_prior_without_classes_draws_too() -> None:
    images = load_images("digits", image_size=8)[:8]
    prior = train_diffusion(
        images, steps=1, batch_size=2, channels=(8, 16), class_conditional=False
    )
    draws = prior_draws(prior, torch.tensor([4, 4, 7]), 2)
    assert draws.shape == (2, 3, 1, 8, 8)
    assert not torch.equal(draws[0, 0], draws[0, 1])


# --- options ----------------------------------------------------------------------


def test_labels_are_inferred_unless_they_are_given(source, capsys) -> None:
    """Only --fix-labels hands labels over; then everything says "upper bound"."""
    original = diffusion_experiment._ATTACKS["diffusion-latent"]
    given: list[object] = []

    def noting(*arguments, labels, **settings):
        given.append(labels)
        return original.run(*arguments, labels=labels, **settings)

    attacks = diffusion_experiment._ATTACKS
    attacks["diffusion-latent"] = dataclasses.replace(original, run=noting)
    try:
        assert cli.run(line(source)) == 0
        assert given == [None]
        found, out = read("metrics"), capsys.readouterr().out
        assert found["label_source"] == "inferred (counts)"
        assert found["upper_bound"] == [] and "upper bound" not in out
        assert cli.run(line(source, "--fix-labels")) == 0
    finally:
        attacks["diffusion-latent"] = original
    found, out = read("metrics"), capsys.readouterr().out
    assert given[1].tolist() == found["true_labels"]  # type: ignore[attr-defined]
    assert found["label_source"] == "given (upper bound)"
    assert found["upper_bound"] == ["the attacker was given the true labels"]
    assert "upper bound: the attacker was given the true labels" in out


def test_weight_and_step_size_reach_the_attack(source) -> None:
    def loss(**changes) -> list[float]:
        run_diffusion_inversion(options(source, log_every=1, **changes))
        return read("loss")["loss"]

    plain = loss()
    assert loss(lambda_prior=2.0, lr=0.1) == plain
    assert loss(lambda_prior=0.0) != plain
    assert loss(lr=0.01) != plain
    aligned = loss(attack="gradinvdiff")
    assert loss(attack="gradinvdiff", lr=0.01) != aligned


@pytest.mark.parametrize("attack", ATTACKS)
def test_restarts_and_steps(attack: str, source) -> None:
    run_diffusion_inversion(options(source, attack=attack, restarts=2, log_every=3))
    found = read("loss")
    assert found["steps"] == [3, 4]
    assert len(found["loss"]) == 2 and len(found["trials"]) == 2
    assert found["loss"][-1] == min(trial["loss"] for trial in found["trials"])


def test_one_client_of_several(source, elsewhere) -> None:
    several = {"num_clients": 2, "samples_per_client": 2}
    run_diffusion_inversion(options(source, **several, output_dir="all"))
    run_diffusion_inversion(options(source, **several, client_id=1))
    assert content(elsewhere / "out") == {
        *(file.format(1, 0) for file in FILES),
        "run.json",
    }
    assert read("metrics", 1)["indices"] == [2, 3]
    for file in FILES:
        name = file.format(1, 0)
        one, among = (elsewhere / f / name for f in ("out", "all"))
        assert one.read_bytes() == among.read_bytes()


def test_same_seed_gives_the_same_bytes(source, elsewhere) -> None:
    def files(folder: str, seed: int) -> dict[str, bytes]:
        run_diffusion_inversion(options(source, output_dir=folder, seed=seed))
        names = [file.format(0, 0) for file in FILES]
        return {name: (elsewhere / folder / name).read_bytes() for name in names}

    first = files("a", 3)
    assert files("b", 3) == first
    other = files("c", 4)
    assert all(other[name] != first[name] for name in first)


def test_a_round_is_a_number_of_epochs(source, elsewhere) -> None:
    losses, records = [], []
    for number in (0, 1, 2):
        run_diffusion_inversion(options(source, round_id=number, log_every=1))
        losses.append(read("loss", number=number)["loss"])
        records.append(json.loads((elsewhere / "out/run.json").read_text()))
        assert read("metrics", number=number)["round"] == number
    assert losses[0] != losses[1] != losses[2]
    assert [r["model"]["epochs"] for r in records] == [0, 1, 2]
    assert all(0 <= r["model"]["test_accuracy"] <= 1 for r in records)
    names = {file.format(0, r) for r in range(3) for file in FILES}
    assert content(elsewhere / "out") == names | {"run.json"}


def test_a_checkpoint_is_attacked_as_it_is(source, elsewhere) -> None:
    shape = {"in_channels": 3, "image_size": 8, "num_classes": 3}
    model = build_model("lenet", **shape, seed=0)
    save_checkpoint("same.pth", model, ModelInfo("lenet", **shape))
    save_checkpoint("mlp.pth", build_model("mlp", **shape), ModelInfo("mlp", **shape))

    def loss(**changes) -> list[float]:
        run_diffusion_inversion(options(source, log_every=1, **changes))
        return read("loss", number=changes.get("round_id", 0))["loss"]

    new = loss()
    assert loss(model_checkpoint="same.pth", round_id=7) == new
    assert loss(model_checkpoint="mlp.pth") != new
    record = json.loads((elsewhere / "out/run.json").read_text())
    assert record["model"]["name"] == "mlp" and record["model"]["source"] == "mlp.pth"


def test_a_prior_that_may_know_the_victims_is_an_upper_bound(source, capsys) -> None:
    assert cli.run(line(source, "--prior", str(source / "knowing"))) == 0
    reason = "the prior may have been trained on the victims"
    assert read("metrics")["upper_bound"] == [reason]
    assert f"upper bound: {reason}" in capsys.readouterr().out


def test_images_without_splits_keep_victims_from_the_judge(
    source, monkeypatch, elsewhere
) -> None:
    seen: list[Images] = []
    original = diffusion_experiment.train_classifier

    def noting(images, **settings):
        seen.append(images)
        return original(images, **settings | {"epochs": 1})

    monkeypatch.setattr(diffusion_experiment, "train_classifier", noting)
    root = str(source / "few/test")
    chosen = options(source, data_root=root, num_clients=2, round_id=1, judge=True)
    run_diffusion_inversion(chosen)
    pool = load_images("folder", data_root=root, image_size=8)
    assert [len(images) for images in seen] == [len(pool) - 2] * 2
    assert all(torch.equal(images.pixels, pool.pixels[2:]) for images in seen)


# --- Ctrl-C -----------------------------------------------------------------------


def test_interrupt_keeps_what_there_is(source, elsewhere, monkeypatch, capsys) -> None:
    original = diffusion_experiment.run_diffusion_inversion

    def stop(step) -> None:
        if (step.client, step.iteration) == (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(
        diffusion_experiment,
        "run_diffusion_inversion",
        lambda given, *, on_step, **more: original(given, on_step=stop, **more),
    )
    assert cli.run(line(source, "--num-clients", "3")) == 130
    out, err = capsys.readouterr()
    last = "gradinv: interrupted; the best so far was scored and written"
    assert err.splitlines()[-1] == last and "Traceback" not in err
    names = {file.format(k, 0) for k in range(2) for file in FILES}
    assert content(elsewhere / "out") == names | {"run.json"}
    assert "client 1, round 0" in out
    assert read("metrics", 0)["stopped"] == "all steps done"
    assert read("metrics", 1)["stopped"] == "interrupted"
    assert json.loads((elsewhere / "out/run.json").read_text())["interrupted"] is True


@pytest.mark.parametrize("client", [0, 1])
def test_interrupt_between_clients(client: int, source, elsewhere) -> None:
    def stop(text: str) -> None:
        if text.endswith(f"client {client}"):
            raise KeyboardInterrupt

    chosen = options(source, num_clients=3)
    if client == 0:
        with pytest.raises(KeyboardInterrupt):
            run_diffusion_inversion(chosen, on_stage=stop)
        assert content(elsewhere) == set()
        return
    result = run_diffusion_inversion(chosen, on_stage=stop)
    assert result.interrupted and list(result.scores) == [0]
    assert content(elsewhere / "out") == {
        *(file.format(0, 0) for file in FILES),
        "run.json",
    }


# --- bad input --------------------------------------------------------------------


def refused(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    return err.strip().removeprefix("gradinv: ")


@pytest.mark.parametrize(
    ("more", "start"),
    [
        (["--steps", "0"], "--steps: expected an integer of at least 1"),
        (["--restarts", "0"], "--restarts: expected an integer of at least 1"),
        (["--log-every", "0"], "--log-every: expected an integer of at least 1"),
        (["--num-clients", "0"], "--num-clients: expected an integer of at least 1"),
        (["--num-clients", "25"], "--num-clients: expected at most 24 images in all"),
        (["--samples-per-client", "0"], "--samples-per-client: expected an integer"),
        (["--client-id", "-1"], "--client-id: expected an integer of at least 0"),
        (["--client-id", "1"], "--client-id: expected an integer of at most 0, got 1"),
        (["--round-id", "-1"], "--round-id: expected an integer of at least 0"),
        (["--lambda-prior", "-1"], "--lambda-prior: expected a finite number >= 0"),
        (["--lambda-prior", "nan"], "--lambda-prior: expected a finite number >= 0"),
        (["--lr", "0"], "--lr: expected a finite number > 0"),
        (["--seed", "-1"], "--seed: expected an integer of at least 0"),
        (["--device", "abacus"], "--device: expected one of auto"),
        (["--attack", "dlg"], "--attack: expected one of diffusion-latent, diffusion"),
        (
            ["--attack", "gradinvdiff", "--lambda-prior", "1"],
            "--lambda-prior: expected nothing for gradinvdiff, got 1.0; it belongs to "
            "diffusion-latent",
        ),
        (
            ["--attack", "diffusion-posterior", "--lr", "1"],
            "--lr: expected nothing for diffusion-posterior, got 1.0; it belongs to "
            "diffusion-latent and gradinvdiff",
        ),
        (["--prior", "vae-digits"], "--prior: expected a diffusion model, got 'vae-di"),
        (["--prior", "diffusion-digit"], "--prior: .*did you mean 'diffusion-digits'"),
        (
            ["--prior", "diffusion-digits"],
            "--prior: expected a model of images with 3 channels, as folder, got 'dif",
        ),
        (["--prior", "spectrum"], "--prior: expected a diffusion model, got 'spectr"),
        (["--model-checkpoint", "no.pth"], "checkpoint: expected an existing file"),
        (["--model-checkpoint", "big.pth"], "--model-checkpoint: .* 3 x 8 x 8 images"),
        (["--data-root", "no"], "--data-root: expected a folder"),
        (["--dataset", "digit"], "--dataset: expected one of"),
        (["--output-dir", "file/x"], "--output-dir: expected a folder that can be wr"),
        (["--steps", "x"], "Invalid value for '--steps'"),
    ],
)
def test_bad_input(more: list[str], start: str, source, elsewhere, capsys) -> None:
    shape = {"in_channels": 3, "image_size": 16, "num_classes": 3}
    model = build_model("lenet", **shape)
    save_checkpoint("big.pth", model, ModelInfo("lenet", **shape))
    (elsewhere / "file").write_text("x")
    found = refused(line(source, *more), capsys)
    assert re.match(start, found), found
    assert content(elsewhere) == {"big.pth", "file"}


def test_a_data_set_with_more_classes_than_the_prior_knows(source, capsys) -> None:
    images = load_images("digits", image_size=8)
    few = Images(images.pixels[:6], images.labels[:6] % 2, ("even", "odd"))
    train_diffusion(few, steps=1, batch_size=2, channels=(8, 16)).save("two")
    with pytest.raises(InputError, match=r"^prior: .*10 classes, as digits.* with 2"):
        run_diffusion_inversion(
            options(source, dataset="digits", data_root=None, prior="two")
        )


def test_every_option_of_the_design_is_there() -> None:
    params = typer.main.get_command(cli.app).commands["diffusion-dlg"].params
    found = {option for param in params for option in param.opts}
    wanted = """--steps --num-clients --samples-per-client --log-every --lambda-prior
    --client-id --round-id --model-checkpoint --fix-labels --lr --restarts --prior
    --attack --config --dataset --data-root --device --seed --output-dir"""
    assert set(wanted.split()) <= found
    assert all(param.help for param in params)


def test_help_says_what_a_round_is(capsys) -> None:
    assert cli.run(["diffusion-dlg", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "trained for r epochs on the train split" in text
