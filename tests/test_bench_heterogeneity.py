"""The suite ``heterogeneity`` on its smallest cases."""

from __future__ import annotations

import json

import pytest
import torch

from gradinv_helpers.bench import heterogeneity
from gradinv_helpers.bench.suite import Record, Setting, chosen, rounded
from gradinv_helpers.federated.heterogeneity import label_histograms


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(
        dataset="digits",
        data_root=None,
        numbers={"repeats": 1, "images": 2},
        seed=0,
        device=torch.device("cpu"),
        folder=tmp_path_factory.mktemp("heterogeneity"),
        quick=True,
    )


@pytest.fixture(scope="module")
def records(setting: Setting) -> list[Record]:
    tasks = heterogeneity.SUITE.tasks(setting)
    return [{"key": task.key, **task.run()} for task in tasks]


def test_public_private_and_held_out_images_are_apart(setting: Setting) -> None:
    bench = heterogeneity._bench(setting)
    assert bench.public.labels.bincount().tolist() == [10] * 10
    sets = [
        {image.numpy().tobytes() for image in images.pixels}
        for images in (bench.private, bench.public)
    ]
    assert len(bench.private) + len(bench.public) == 1437
    assert not sets[0] & sets[1]
    for scheme in heterogeneity.schemes():
        clients = bench.clients(scheme, 0, heterogeneity.FEDAVG)
        held = label_histograms(clients).sum(0)
        assert torch.equal(held, bench.private.labels.bincount())
        assert len(clients) == (1 if scheme == heterogeneity.CENTRAL else 10)


def test_every_case_is_measured_once(records: list[Record]) -> None:
    assert len({record["key"] for record in records}) == len(records)
    runs = chosen(records, what=heterogeneity.RUN)
    assert [r["scheme"] for r in runs] == ["centralised", "iid", "alpha 0.1"]
    for record in runs:
        assert len(record["accuracy"]) == 2
        assert all(0 <= value <= 1 for value in record["accuracy"])
        looks = 0 if record["scheme"] == "centralised" else 1
        assert len(record["distances"]) == looks
    accuracies = {r["scheme"]: r["accuracy"][-1] for r in runs}
    assert accuracies["centralised"] > accuracies["alpha 0.1"]
    images = chosen(records, what=heterogeneity.IMAGE)
    assert len(images) == 4
    assert all(len(r["psnr"]) == 2 for r in images)


def test_an_uneven_client_gives_its_mix_away(records: list[Record]) -> None:
    one = chosen(records, recipe="one gradient")[0]
    for distance in one["distances"]:
        assert distance["examples"] < 0.2 < distance["guess"]
    run = chosen(records, scheme="alpha 0.1")[0]
    errors = {
        name: sum(d[name] for d in run["distances"]) for name in ("examples", "guess")
    }
    assert errors["examples"] < errors["guess"]


def test_the_report_holds_everything(setting: Setting, records: list[Record]) -> None:
    report = heterogeneity.SUITE.report(records, setting)
    summary = json.loads(json.dumps(rounded(dict(report.summary))))
    assert [case["scheme"] for case in summary["accuracy"]][:2] == [
        "centralised",
        "iid",
    ]
    weights = 256 * 256 + 256 + 256 * 10 + 10
    sizes = [case["bytes_per_round"] for case in summary["accuracy"]]
    assert sizes == [8 * weights, 80 * weights, 80 * weights]
    for case in summary["proportions"] + summary["recipes"]:
        gain = case["guess"]["value"] - case["examples"]["value"]
        assert case["gain"]["value"] == pytest.approx(gain, abs=1e-5)
    assert len(summary["images"]) == 4
    failed = {"what": "image", "kind": "x", "mix": "y", "stage": "z", "failed": "why"}
    assert "0 of 1 attacks" in heterogeneity._images([failed])[1][0][0]
    assert "alpha 0.1" in report.table and "one gradient" in report.table
    assert len(report.figure.axes) == 2  # accuracy, and one look
