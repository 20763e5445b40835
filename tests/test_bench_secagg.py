"""The suite ``secagg`` on its smallest cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradinv_helpers as gi
from gradinv_helpers.bench import secagg
from gradinv_helpers.bench.suite import Record, Setting
from gradinv_helpers.federated.aggregation import aggregate


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(
        dataset="digits",
        data_root=None,
        numbers={"repeats": 1, "iterations": 1},
        seed=0,
        device=torch.device("cpu"),
        folder=tmp_path_factory.mktemp("secagg"),
        quick=True,
    )


@pytest.fixture(scope="module")
def records(setting: Setting) -> list[Record]:
    return [{"key": task.key, **task.run()} for task in secagg.SUITE.tasks(setting)]


def of(records: list[Record], what: str) -> list[Record]:
    return [record for record in records if record["what"] == what]


def test_every_case_is_measured_once(records: list[Record]) -> None:
    assert len({record["key"] for record in records}) == len(records)
    assert len(of(records, secagg.COST)) == 2 * secagg._COST_REPEATS
    assert [r["clients"] for r in of(records, secagg.LEAK)] == [1, 2]


def test_cost_counts_exact_sums_and_all_bytes(records: list[Record]) -> None:
    for record in of(records, secagg.COST):
        assert record["exact"] is True
        assert record["seconds"] > 0
        total = record["bytes_sent"] + record["bytes_received"]
        # Tags, digests and numbers of clients come on top of the paper's count.
        assert 1 < total / record["paper_bytes"] < 1.1


def test_an_inexact_sum_would_show(setting: Setting, monkeypatch) -> None:
    honest = secagg.secure_sum

    def off_by_one(*arguments, **more):
        found = honest(*arguments, **more)
        found.residues[0] += np.uint32(1)
        return found

    monkeypatch.setattr(secagg, "secure_sum", off_by_one)
    assert not secagg.measure_cost(setting, 4, 10, 0.0, 0)["exact"]


@pytest.mark.parametrize(("clients", "least"), [(10, 7), (30, 20), (100, 67), (4, 3)])
def test_threshold_is_two_thirds(clients: int, least: int) -> None:
    assert secagg.protocol_threshold(clients) == least


def test_dropouts_leave_enough_clients() -> None:
    for clients in secagg.CLIENTS:
        for share in secagg.DROPPED:
            left = clients - round(share * clients)
            assert left >= secagg.protocol_threshold(clients)


def test_cohort_holds_one_image_per_client(setting: Setting) -> None:
    pool = gi.load_images("digits", split="test", image_size=16)
    bench = secagg._Bench(setting, pool)
    updates, truth = bench.cohort(3, 1)
    together = gi.local_update(updates[0].model, truth)
    for name, mean in aggregate(updates).tensors.items():
        assert torch.allclose(mean, together.tensors[name], atol=1e-6)
    again, same = bench.cohort(3, 1)
    assert torch.equal(same.pixels, truth.pixels)
    other, _ = bench.cohort(3, 2)
    name = next(iter(again[0].tensors))
    assert torch.equal(again[0].tensors[name], updates[0].tensors[name])
    assert not torch.equal(other[0].tensors[name], updates[0].tensors[name])


def test_difference_is_the_update_of_the_first_client(records: list[Record]) -> None:
    """It comes back exactly, whatever the sum hides."""
    for record in of(records, secagg.LEAK):
        assert record["difference"]["psnr"][0] > 60
        assert record["difference"]["identified"] == [True]
        assert len(record["sum"]["psnr"]) == record["clients"]
        assert 0 < record["noise_std"] < 1e-7


def test_only_noise_of_no_consequence_is_left_out(setting: Setting) -> None:
    pool = gi.load_images("digits", split="test", image_size=16)
    (update,), _ = secagg._Bench(setting, pool).cohort(1, 0)
    size = secagg._typical(update)
    entries = torch.cat([t.flatten() for t in update.tensors.values()])
    assert size == pytest.approx(float(entries.norm()) / len(entries) ** 0.5, rel=1e-5)
    for share, kept in ((1e-8, False), (1e-4, True)):
        noisy = update.replace_tensors(update.tensors, noise_std=share * size)
        found = secagg.without_negligible_noise(noisy)
        assert found.noise_std == (noisy.noise_std if kept else 0)


def test_more_clients_leave_fewer_bits_per_pixel(records: list[Record]) -> None:
    one, two = (record["bits"] for record in of(records, secagg.LEAK))
    assert 10 < two < one < 32


def test_report(records: list[Record], setting: Setting) -> None:
    report = secagg.SUITE.report(records, setting)
    costs, leaks = report.summary["costs"], report.summary["leaks"]
    assert [case["exact"] for case in costs] == [3, 3]
    assert [case["clients"] for case in leaks] == [1, 2]
    for case in leaks:
        gain = case["psnr"]["value"] - case["floor"]["value"]
        assert case["gain"]["value"] == pytest.approx(gain, abs=1e-6)
    assert report.table.count("| --- |") == 2
    assert len(report.figure.axes) == 2
