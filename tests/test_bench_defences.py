"""The suite ``defences`` on its smallest cases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gradinv_helpers.bench import defences
from gradinv_helpers.bench.suite import Record, Report, Setting, rounded
from gradinv_helpers.data import load_images
from gradinv_helpers.models import build_model


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(
        dataset="digits",
        data_root=None,
        numbers={"repeats": 1, "iterations": 1},
        seed=0,
        device=torch.device("cpu"),
        folder=tmp_path_factory.mktemp("defences"),
        quick=True,
    )


@pytest.fixture(scope="module")
def records(setting: Setting) -> list[Record]:
    tasks = defences.SUITE.tasks(setting)
    return [rounded({"key": task.key, **task.run()}) for task in tasks]


@pytest.fixture(scope="module")
def report(records: list[Record], setting: Setting) -> Report:
    return defences.SUITE.report(records, setting)


def test_every_defence_has_its_adaptive_attack(records: list[Record]) -> None:
    assert len({record["key"] for record in records}) == len(records)
    attacked = {
        (r["defence"], r["images"], r["attack"])
        for r in records
        if r["what"] == "attack"
    }
    for case in defences.QUICK_CASES:
        for count in defences.QUICK_BATCHES:
            possible = count >= case.smallest
            name = (case.name, count)
            assert ((*name, defences.ADAPTIVE) in attacked) == possible
            naive = possible and case.name != "none"
            assert ((*name, defences.NAIVE) in attacked) == naive
    trained = [r["defence"] for r in records if r["what"] == "training"]
    assert trained == [case.name for case in defences.QUICK_CASES]


def test_a_record(records: list[Record]) -> None:
    for record in records:
        if record["what"] == "training":
            assert 0 <= record["accuracy"] <= 1
            continue
        count = record["images"]
        assert len(record["psnr"]) == count
        assert all(len(values) == count for values in record["floors"].values())
        assert 0 <= record["identified"] <= count
        assert (record["bits"] or 1) > 0
    single = [r for r in records if r.get("images") == 1]
    adaptive = [r for r in single if r["attack"] == defences.ADAPTIVE]
    known = {r["defence"]: r["bits"] is not None for r in adaptive}
    assert known == {"none": True, "signs": False}
    sizes = {r["defence"]: r["bytes"] for r in single}
    assert sizes["none"] / 33 < sizes["signs"] < sizes["none"] / 30


def test_the_table(report: Report) -> None:
    cases = {(c["defence"], c["images"]): c for c in report.summary["cases"]}
    assert set(cases) == {
        ("none", 1),
        ("none", 2),
        ("signs", 1),
        ("signs", 2),
        ("mixup, alpha 1", 2),
    }
    signs = cases["signs", 1]["attacks"]
    assert signs["adaptive"]["gain"]["value"] > signs["naive"]["gain"]["value"]
    lines = report.table.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(cases)
    assert lines[2].split("|")[3].strip() == "–"  # nothing to be naive about
    assert "identified by chance: 0.28%" in report.table


@pytest.mark.parametrize("case", defences.CASES, ids=lambda case: case.name)
def test_what_an_attacker_is_naive_about(case: defences.Case) -> None:
    images = load_images("digits", split="test")[[0, 1]]
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    update = case.compute(model, images, torch.Generator().manual_seed(0))
    assert update.num_samples == 2
    if case.face_value is None:
        assert update.encoding is None and update.noise_std == 0
        return
    naive = case.face_value(update)
    assert naive.encoding is None
    assert naive.noise_std == 0
    assert naive.training.num_steps(2) == 1
    for name, tensor in naive.tensors.items():
        assert torch.equal(tensor, update.tensors[name])
    public = [update.encoding, update.noise_std or None]
    steps = update.training.num_steps(2)
    assert any(public) or steps == 4
    if steps == 4:  # the same distance in one step
        assert math.isclose(naive.training.lr, 4 * update.training.lr)


def test_the_picture(report: Report, tmp_path: Path) -> None:
    left, right = report.figure.axes
    assert [len(axes.patches) for axes in (left, right)] == [3, 5]
    report.figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
