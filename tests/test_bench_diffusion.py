"""The suite ``diffusion``: one option at a time, on the same batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradinv_helpers as gi
from gradinv_helpers.bench import diffusion
from gradinv_helpers.bench.diffusion import Choice
from gradinv_helpers.bench.priors import common
from gradinv_helpers.bench.suite import Record, Setting
from gradinv_helpers.classifier import Classifier
from gradinv_helpers.errors import InputError


def setting(folder: Path, **more) -> Setting:
    usual = {
        "dataset": "digits",
        "data_root": None,
        "numbers": {"repeats": 2, "iterations": 1},
        "seed": 0,
        "device": torch.device("cpu"),
        "folder": folder,
        "quick": True,
    }
    return Setting(**usual | more)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> diffusion._Bench:
    """With a judge that has learned nothing."""
    train, test = (
        gi.load_images("digits", split=split, image_size=16)
        for split in ("train", "test")
    )
    given = setting(tmp_path_factory.mktemp("diffusion"))
    judge = gi.build_model("mlp", in_channels=1, image_size=16, num_classes=10)
    return diffusion._Bench(given, train, test, Classifier(judge))


# --- the grid -----------------------------------------------------------------------


@pytest.mark.parametrize("parts", [diffusion.PARTS, diffusion.QUICK_PARTS])
def test_one_option_changes_at_a_time(parts) -> None:
    for part in parts:
        names = [(choice.method, choice.setting) for choice in part.all]
        assert len(set(names)) == len(names)
        for attack in {choice.method for choice in part.choices}:
            first, *others = [c for c in part.choices if c.method == attack]
            for other in others:
                changed = {k for k in vars(first) if vars(first)[k] != vars(other)[k]}
                assert len(changed) == 1
                assert changed <= {"restarts", "lambda_prior", "labels", "prior"}


@pytest.mark.parametrize("attack", diffusion.ATTACKS)
def test_every_option_is_varied_and_no_value_is_the_default(attack: str) -> None:
    own = [c for c in diffusion.OPTIONS.choices if c.method == attack]
    usual = own[0].options(50).filled()
    counts = {c.restarts for c in own if c.restarts is not None} | {usual.restarts}
    assert counts == {1, 2, 4}
    assert {c.labels for c in own} == {"inferred", "given", "wrong"}
    weights = {c.lambda_prior for c in own if c.lambda_prior is not None}
    assert weights == ({0.0, 0.5, 8.0} if attack == "diffusion-latent" else set())
    assert usual.lambda_prior not in weights
    assert all(c.restarts != usual.restarts for c in own)
    compared = {c.prior for c in diffusion.PRIORS.choices if c.method == attack}
    assert compared == {diffusion.SAME, diffusion.OTHER, diffusion.PHOTOS}


def test_tasks_are_distinct_and_repeats_complete(bench, monkeypatch) -> None:
    monkeypatch.setattr(diffusion, "_bench", lambda given: bench)
    monkeypatch.setattr(diffusion._Bench, "prior", lambda self, name: None)
    keys = [task.key for task in diffusion.SUITE.tasks(bench.setting)]
    assert len(set(keys)) == len(keys)
    half = len(keys) // 2
    assert all("batch 0" in key for key in keys[:half])
    assert [k.replace("batch 1", "batch 0") for k in keys[half:]] == keys[:half]


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset: expected 'digits'.*got 'photos'"):
        diffusion.SUITE.tasks(setting(tmp_path, dataset="photos"))


# --- what the attacker has ----------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=9), seed=st.integers(0, 99)
)
def test_wrong_labels_are_of_no_victim(labels: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = diffusion.other_labels(torch.tensor(labels), 10, generator)
    assert len(found) == len(labels)
    assert not set(found.tolist()) & set(labels)
    assert 0 <= int(found.min()) <= int(found.max()) < 10


def test_every_absent_class_comes_up() -> None:
    generator = torch.Generator().manual_seed(0)
    found = diffusion.other_labels(torch.tensor([3, 7] * 250), 10, generator)
    counts = torch.bincount(found, minlength=10)
    assert counts[3] == counts[7] == 0
    assert int(counts[[0, 1, 2, 4, 5, 6, 8, 9]].min()) > 30


def test_priors_learn_from_equally_many_images_of_their_kind(bench) -> None:
    full = replace(bench, setting=setting(bench.setting.folder, quick=False))
    kinds = (diffusion.SAME, diffusion.OTHER, diffusion.PHOTOS)
    same, other, photos = (full.public(kind) for kind in kinds)
    assert len(same) == len(other) == len(photos) == 600
    assert set(same.labels.tolist()) == {5, 6, 7, 8, 9}
    assert set(other.labels.tolist()) == {0, 1, 2, 3, 4}
    assert same.shape == other.shape == photos.shape == (1, 16, 16)


def test_a_trained_prior_is_kept(bench, monkeypatch) -> None:
    seen = []

    def train(images, **more):
        seen.append(images)
        return gi.train_diffusion(images, **more, channels=(8,), batch_size=4)

    monkeypatch.setattr(diffusion, "train_diffusion", train)
    made = [replace(bench).prior(diffusion.OTHER) for _ in range(2)]
    assert len(seen) == 1
    assert not made[0].knows_classes
    draws = [prior.sample(2, steps=2) for prior in made]
    assert torch.equal(*draws)


def test_victims_and_labels_of_a_batch(bench) -> None:
    scene = bench.scene(0, 5, 8, 1)
    assert int(scene.truth.labels.min()) >= 5
    assert torch.equal(scene.labels["given"], scene.truth.labels)
    assert torch.equal(scene.labels["inferred"], scene.truth.labels)  # in this order
    assert common(scene.labels["wrong"], scene.truth.labels) == 0


def test_options_reach_the_attacks(bench, monkeypatch) -> None:
    """As the command would pass them on; inferred labels are left to the attack."""
    told: list[dict] = []

    def attack(update, prior, **how):
        told.append(how)
        labels = how["labels"] if how["labels"] is not None else scene.truth.labels
        return gi.diffusion_posterior(update, prior, labels=labels, steps=1, draws=1)

    scene = bench.scene(0, 0, 2, 0)
    for name in diffusion.ATTACKS:
        monkeypatch.setitem(diffusion._FUNCTIONS, name, attack)
    bench.make(scene, Choice("diffusion-latent", lambda_prior=0.5))
    bench.make(scene, Choice("diffusion-posterior", restarts=2))
    bench.make(scene, Choice("gradinvdiff", labels="wrong"))
    latent, posterior, optimised = told
    assert latent["prior_weight"] == 0.5 and latent["restarts"] == 1
    assert posterior["draws"] == 2 and "restarts" not in posterior
    assert latent["labels"] is posterior["labels"] is None
    assert torch.equal(optimised["labels"], scene.labels["wrong"])


def test_floors_see_labels_only(bench) -> None:
    """Another update, the same labels: the same guess."""
    scene = bench.scene(0, 0, 2, 0)
    other = replace(scene, update=bench.scene(0, 0, 4, 1).update)
    for method in diffusion.GUESSES:
        made = [bench.make(s, Choice(method)) for s in (scene, other)]
        assert made[0]["psnr"] == made[1]["psnr"]


# --- numbers ------------------------------------------------------------------------


def records(bases: dict[Choice, tuple[float, float]]) -> list[Record]:
    """Two batches of two images, of which the second is 10 dB better throughout."""
    return [
        {
            "part": diffusion.OPTIONS.name,
            "epochs": 0,
            "first_class": 0,
            "images": 2,
            **vars(choice),
            "setting": choice.setting,
            "number": number,
            "labels_right": 2,
            "psnr": [base, base + 10],
            "mse": [0.1, 0.2],
            "feature_similarity": [0.5, 0.7],
            "identified": 1,
            "candidates": 50,
            "class_right": 2,
            "cpu_seconds": 1.0,
            **({"floor": [12.0, 3.0]} if choice.method != diffusion.ALONE else {}),
            **({"misfit": 0.5} if choice.method in diffusion.ATTACKS else {}),
        }
        for choice, values in bases.items()
        for number, base in enumerate(values)
    ]


def test_differences_are_of_the_same_batches(tmp_path: Path) -> None:
    found = records(
        {
            Choice(diffusion.CLASS_MEAN): (0.0, 0.0),
            Choice(diffusion.ALONE): (1.0, 1.0),
            Choice("diffusion-latent"): (20.0, 60.0),
            Choice("diffusion-latent", restarts=2): (23.0, 63.0),
        }
    )
    report = diffusion.SUITE.report(found, setting(tmp_path))
    cases = {(c["method"], c["setting"]): c for c in report.summary["cases"]}
    first = cases["diffusion-latent", "default"]
    two = cases["diffusion-latent", "--restarts 2"]
    assert first["difference"] is None
    gap = two["difference"]
    assert (gap["low"], gap["value"], gap["high"]) == pytest.approx((3, 3, 3))
    assert gap["pairs"] == 2
    assert two["psnr"]["value"] == pytest.approx(48)  # images of 23, 33, 63 and 73
    assert two["floor"] == pytest.approx((12 + 11) / 2)  # of a pixel, and of a draw
    assert two["gain"]["value"] == pytest.approx(48 - 11.5)
    assert two["identified"] == 0.5
    assert two["identified_by_chance"] == 0.02
    assert two["mse"] == pytest.approx(0.15)
    tables = report.table.split("### ")
    assert [t.splitlines()[0] for t in tables[1:]] == ["Beside the attacks", "Restarts"]
    assert tables[2].count("diffusion-latent |") == 2
