"""The suite ``privacy``: its numbers hang together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradinv_helpers.bench import privacy
from gradinv_helpers.bench.suite import Record, Setting
from gradinv_helpers.errors import InputError
from gradinv_helpers.privacy import gaussian_epsilon


def setting(folder: Path, **more) -> Setting:
    usual = {
        "dataset": "digits",
        "data_root": None,
        "numbers": {"repeats": 1, "iterations": 2},
        "seed": 0,
        "device": torch.device("cpu"),
        "folder": folder,
        "quick": True,
    }
    return Setting(**usual | more)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[list[Record], Setting]:
    given = setting(tmp_path_factory.mktemp("privacy"))
    tasks = privacy.SUITE.tasks(given)
    return [{"key": task.key, **task.run()} for task in tasks], given


def test_tasks_are_distinct_and_the_same_for_every_repeat(tmp_path: Path) -> None:
    given = setting(tmp_path, quick=False, numbers={"repeats": 2, "iterations": 1})
    keys = [task.key for task in privacy.SUITE.tasks(given)]
    assert len(set(keys)) == len(keys)
    half = len(keys) // 2
    assert [key[: key.rindex(",")] for key in keys[:half]] == [
        key[: key.rindex(",")] for key in keys[half:]
    ]


def test_little_noise_leaks_and_much_noise_does_not(measured) -> None:
    records, given = measured
    summary = privacy.SUITE.report(records, given).summary
    little, much = summary["leak"]
    assert little["noise"] < much["noise"]
    assert little["bits_per_image"]["value"] > 10
    assert much["bits_per_image"]["value"] < 0.1
    loose, tight = summary["bound"]
    assert loose["informed"]["value"] == loose["bound"] == 1
    assert tight["guess"] <= tight["bound"] < 0.02
    assert tight["informed"]["value"] < 0.2
    assert loose["bound_of_candidates"] > 0.99
    assert tight["guess"] < tight["bound_of_candidates"] < 0.2


def test_epsilon_is_that_of_the_message(measured) -> None:
    records, given = measured
    low, high = privacy.SUITE.report(records, given).summary["price"]
    assert low["prv"] is None  # beyond its grid
    assert high["gaussian"] == gaussian_epsilon(1 / 3.0, delta=privacy.DELTA)
    assert high["gaussian"] <= high["prv"] <= high["rdp"]
    assert high["central"]["epsilon"] < high["local"]["epsilon"]


def test_all_methods_face_the_same_message(measured) -> None:
    records, _ = measured
    for record in records:
        if record["what"] == privacy.ATTACK:
            assert set(record["methods"]) == {
                privacy.CLASS_MEAN,
                privacy.GAUSSIAN,
                privacy.VAE,
                privacy.NAIVE,
            }
            count = record["images"]
            assert len(record["floor"]) == count
            guess = record["methods"][privacy.CLASS_MEAN]["psnr"]
            assert all(a >= b for a, b in zip(record["floor"], guess, strict=True))


def test_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dataset: expected 'digits'"):
        privacy.SUITE.tasks(setting(tmp_path, dataset="photos"))
