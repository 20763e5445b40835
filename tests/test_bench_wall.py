"""The suite ``wall`` on its smallest cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gradinv_helpers as gi
from gradinv_helpers.attacks.jacobian import jacobian_rank
from gradinv_helpers.bench import wall
from gradinv_helpers.bench.suite import Record, Setting, rounded


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(
        dataset="digits",
        data_root=None,
        numbers={"images": 2, "repeats": 1, "iterations": 1},
        seed=0,
        device=torch.device("cpu"),
        folder=tmp_path_factory.mktemp("wall"),
        quick=True,
    )


@pytest.fixture(scope="module")
def records(setting: Setting) -> list[Record]:
    return [{"key": task.key, **task.run()} for task in wall.SUITE.tasks(setting)]


def test_every_case_is_measured_once(records: list[Record]) -> None:
    assert len({record["key"] for record in records}) == len(records)
    ranks = [r for r in records if r["what"] == wall.RANK]
    assert len(ranks) == 2 * 2 * 2 * 2  # networks, initialisations, stages, sizes
    for record in ranks:
        assert 0 < record["rank"] <= record["unknowns"] == 256 * record["batch_size"]
        assert 0 < record["counted"] <= record["unknowns"]
    smooth = [r for r in ranks if r["architecture"] == "lenet"]
    assert all(r["counted"] == r["rank"] for r in smooth)


def test_a_rank_is_that_of_the_images(setting: Setting, records: list[Record]) -> None:
    bench = wall._bench(setting, wall.SIZE)
    case = ("kernel 3, relu", "pytorch", "untrained")
    model, _ = bench.network(*case)
    images, targets = bench.batch(2, 0)
    expected = jacobian_rank(model, images, targets).rank
    found = next(r for r in records if r["key"] == f"rank, {', '.join(case)}, 2, 0")
    assert found["rank"] == pytest.approx(expected, abs=2)


def test_coarser_numbers_give_less(records: list[Record]) -> None:
    bits = {r["format"]: r["bits"] for r in records if r["what"] == wall.ROUNDING}
    assert set(bits) == {"float32", "bfloat16"}
    pixels = 256
    # 16 bits fewer in the mantissa of every entry are 16 fewer in every direction
    assert bits["float32"] - bits["bfloat16"] == pytest.approx(16 * pixels, rel=0.05)


def test_the_report_holds_everything(setting: Setting, records: list[Record]) -> None:
    report = wall.SUITE.report(records, setting)
    summary = json.loads(json.dumps(rounded(dict(report.summary))))
    assert len(summary["cases"]) == 16
    assert summary["large_images"] == []
    exact = {(e["kind"], e["stage"]): e["exact"] for e in summary["rule"]}
    assert exact["smooth", "untrained"] == 4
    assert report.table.count("| --- |") == 6
    assert "lenet, uniform, 1 epoch" in report.table
    assert len(report.figure.axes) == 4
    setting.folder.joinpath("figure.png").write_bytes(b"")
    report.figure.savefig(Path(setting.folder) / "figure.png")


def test_the_first_architecture_is_lenet() -> None:
    reference = gi.build_model("lenet", in_channels=3, image_size=32, num_classes=10)
    ours = wall.ARCHITECTURES["lenet"].build(3, 32, 10)
    assert str(ours) == str(reference)


@pytest.mark.parametrize("name", list(wall.ARCHITECTURES))
def test_architectures_take_any_size(name: str) -> None:
    architecture = wall.ARCHITECTURES[name]
    for channels, side in ((1, 8), (3, 15)):
        torch.manual_seed(0)
        model = architecture.build(channels, side, 4).eval()
        assert model(torch.rand(2, channels, side, side)).shape == (2, 4)
        kinks = any(isinstance(m, nn.ReLU) for m in model.modules())
        kinks |= name.startswith("resnet")
        assert kinks != architecture.smooth


def test_later_stages_are_trained(setting: Setting) -> None:
    bench = wall._bench(setting, wall.SIZE)
    first, _ = bench.network("kernel 3, relu", "pytorch", "untrained")
    later, _ = bench.network("kernel 3, relu", "pytorch", "1 epoch")
    pairs = zip(first.parameters(), later.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
