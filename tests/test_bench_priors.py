"""The suite ``priors``: its cases, its guesses, its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradinv_helpers as gi
from gradinv_helpers.bench import priors
from gradinv_helpers.bench.priors import Case, Priors, Scene
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
def bench(tmp_path_factory) -> priors._Bench:
    """Without its priors, and with a judge that has learned nothing."""
    train, test = (
        gi.load_images("digits", split=split, image_size=16)
        for split in ("train", "test")
    )
    given = setting(tmp_path_factory.mktemp("priors"))
    judge = gi.build_model("mlp", in_channels=1, image_size=16, num_classes=10)
    return priors._Bench(given, test, Priors(given, train[:100]), Classifier(judge))


# --- cases ------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_distinct_and_their_methods_exist(quick: bool) -> None:
    found = list(priors.cases(quick))
    keys = [str(case) for case, _ in found]
    assert len(set(keys)) == len(keys)
    for case, methods in found:
        assert len(set(methods)) == len(methods)
        assert set(methods) <= set(priors.METHODS) - set(priors.GUESSES)
        assert case.stage in priors.EPOCHS
        if case.images > 8:
            assert not {priors.LATENT, priors.OPTIMISED} & set(methods)


def test_all_sizes_meet_both_kinds_of_gradient() -> None:
    met = {
        (c.model, c.images, c.noise)
        for c, _ in priors.cases()
        if c.what == priors.MAIN and c.stage == "untrained"
    }
    for size in (1, 4, 8, 16, 32):
        assert {("lenet", size, 0.0), ("lenet", size, priors.NOISE)} <= met


def test_repeats_are_complete_one_after_the_other(bench, monkeypatch) -> None:
    monkeypatch.setattr(priors, "_bench", lambda given: bench)
    keys = [task.key for task in priors.SUITE.tasks(bench.setting)]
    assert len(set(keys)) == len(keys)
    half = len(keys) // 2
    assert all("batch 0" in key for key in keys[:half])
    assert [k.replace("batch 1", "batch 0") for k in keys[half:]] == keys[:half]


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset: expected 'digits'.*got 'photos'"):
        priors.SUITE.tasks(setting(tmp_path, dataset="photos"))


# --- what the attacker has ----------------------------------------------------------


def test_noise_is_stated_and_as_large_as_said(bench) -> None:
    clean = Case(priors.MAIN, "lenet", "untrained", 4, 0.0)
    noisy = Case(priors.MAIN, "lenet", "untrained", 4, priors.NOISE)
    tensors = [bench.scene(case, 1).update.tensors for case in (clean, noisy)]
    sent, spoilt = (torch.cat([t.flatten() for t in one.values()]) for one in tensors)
    share = float((spoilt - sent).norm() / sent.norm())
    assert share == pytest.approx(priors.NOISE, rel=0.1)
    stated = bench.scene(noisy, 1).update.noise_std
    assert stated == pytest.approx(float((spoilt - sent).std()), rel=0.1)
    assert bench.scene(clean, 1).update.noise_std == 0


def test_labels_are_inferred_unless_given(bench, monkeypatch) -> None:
    wrong = torch.zeros(4, dtype=torch.long)
    monkeypatch.setattr(priors, "infer_labels", lambda update: wrong)
    inferred = Case(priors.LABELS, "lenet", "untrained", 4, 0.0)
    known = Case(priors.LABELS, "lenet", "untrained", 4, 0.0, labels=priors.GIVEN)
    assert torch.equal(bench.scene(inferred, 2).labels, wrong)
    assert torch.equal(bench.scene(known, 2).labels, bench.truth(known, 2).labels)


def test_victims_of_the_wanted_classes(bench) -> None:
    case = Case(priors.CLASSES, "lenet", "untrained", 8, 0.0, first_class=5)
    drawn = [bench.truth(case, number) for number in (0, 1)]
    assert all(int(images.labels.min()) >= 5 for images in drawn)
    assert not torch.equal(drawn[0].pixels, drawn[1].pixels)
    anyone = bench.truth(Case(priors.MAIN, "mlp", "untrained", 32, 0.0), 0)
    assert len(anyone.labels.unique()) > 5


def test_a_vae_of_half_the_classes_is_kept(bench, monkeypatch) -> None:
    seen = []

    def train(images, **more):
        seen.append(images)
        return gi.train_vae(images, **more, width=4, hidden=8, latent_size=2)

    monkeypatch.setattr(priors, "train_vae", train)
    made = [Priors(bench.setting, bench.priors.train).half(5) for _ in range(2)]
    assert len(seen) == 1
    assert set(seen[0].labels.tolist()) == {5, 6, 7, 8, 9}
    assert made[0].num_classes == 0  # never told which
    latents = torch.ones(3, made[0].size)
    assert torch.equal(made[0].decode(latents), made[1].decode(latents))


# --- methods and guesses ------------------------------------------------------------


def scene_of(bench, labels: torch.Tensor) -> Scene:
    truth = bench.test[list(range(len(labels)))]
    update = gi.local_update(bench.model("mlp", "untrained", 0), truth)
    return Scene(update, labels, bench.priors, 1, 0)


def test_guesses_see_labels_only(bench) -> None:
    """Another update, the same labels: the same guess; and every class its own."""
    labels = torch.tensor([3, 3, 8])
    one = scene_of(bench, labels)
    other = Scene(
        bench.scene(Case(priors.MAIN, "lenet", "untrained", 8, 0.0), 3).update,
        *(labels, bench.priors, 1, 0),
    )
    for name in priors.GUESSES:
        images = priors.METHODS[name](one).images
        assert images.shape == (3, 1, 16, 16)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert torch.equal(images, priors.METHODS[name](other).images)
        assert not torch.allclose(images[0], images[2])


def test_class_mean(bench) -> None:
    train = bench.priors.train
    expected = train.pixels[train.labels == 8].double().mean(0).float()
    found = priors.METHODS[priors.CLASS_MEAN](scene_of(bench, torch.tensor([3, 8])))
    assert torch.allclose(found.images[1], expected, atol=1e-6)


def test_a_record_of_an_exact_attack(bench) -> None:
    case = Case(priors.MAIN, "mlp", "untrained", 4, 0.0)
    record = bench.measure(case, priors.EXACT, 0)
    assert min(record["psnr"]) > 60
    assert record["identified"] == record["labels_right"] == 4
    assert record["candidates"] == len(bench.test)
    assert {len(values) for values in record["floors"].values()} == {4}
    seen = Classifier(bench.judge.model).predict(bench.truth(case, 0))
    right = (seen == bench.truth(case, 0).labels).sum()
    assert record["class_right"] == int(right)


def test_a_search_says_that_it_would_have_gone_on(bench) -> None:
    case = Case(priors.MAIN, "lenet", "untrained", 1, priors.NOISE)
    for method in (priors.PIXELS, priors.SPECTRUM):
        assert bench.measure(case, method, 0)["out_of_iterations"] is True
    scene = dataclasses.replace(bench.scene(case, 0), iterations=100)
    made = priors.METHODS[priors.SPECTRUM](scene)
    assert made.facts["out_of_iterations"] is False


# --- numbers ------------------------------------------------------------------------


_LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(st.data())
def test_common_labels_do_not_depend_on_order(data: st.DataObject) -> None:
    labels = data.draw(_LABELS)
    here = torch.tensor(labels)
    there = torch.tensor(data.draw(st.permutations(labels)))
    assert priors.common(here, there) == len(labels)
    other = here.clone()
    other[0] = 10
    assert priors.common(here, other) == priors.common(other, here) == len(labels) - 1


def records(gains: dict[str, tuple[float, float]]) -> list[Record]:
    """Two batches of two images, of which the second is 10 dB better throughout."""
    case = Case(priors.MAIN, "lenet", "untrained", 2, 0.0)
    return [
        {
            **case.facts,
            "method": method,
            "number": number,
            "psnr": [base, base + 10],
            "floors": {"constant": [12.0, 1.0], "batch_mean": [3.0, 2.0]},
            "identified": 1,
            "candidates": 50,
            "class_right": 2,
            "labels_right": 1 + number,
            "seconds": 1.0,
            "cpu_seconds": 1.0,
        }
        for method, bases in gains.items()
        for number, base in enumerate(bases)
    ]


def test_floor_is_the_best_guess_of_every_image() -> None:
    found = records({priors.CLASS_MEAN: (0.0, 0.0), priors.SOFT: (90.0, 90.0)})
    assert priors.floor_of(found[:1] + found[2:3]) == [12.0, 10.0]
    assert priors.floor_of(found[2:3]) == [12.0, 2.0]  # no method is a guess


def test_differences_are_of_the_same_batches(tmp_path: Path) -> None:
    bases = {
        priors.CLASS_MEAN: (0.0, 0.0),
        priors.SPECTRUM: (20.0, 60.0),
        priors.SOFT: (23.0, 63.0),
    }
    report = priors.SUITE.report(records(bases), setting(tmp_path))
    cases = {case["method"]: case for case in report.summary["cases"]}
    soft = cases[priors.SOFT]
    assert soft["psnr"]["value"] == pytest.approx(48)  # images of 23, 33, 63 and 73
    over = soft["gain_over_spectrum"]
    assert (over["low"], over["value"], over["high"]) == pytest.approx((3, 3, 3))
    assert soft["floor"] == pytest.approx(11)
    assert soft["gain"]["value"] == pytest.approx(48 - 11)
    assert soft["identified"] == 0.5
    assert soft["identified_by_chance"] == 0.02
    assert soft["out_of_iterations"] is None
    assert "Labels right: 3 of 4." in report.table
