"""The work behind ``gradinv train-global``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gradinv_helpers.checkpoints import load_checkpoint
from gradinv_helpers.classifier import accuracy
from gradinv_helpers.data import load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.training import TrainingOptions, run_training


def options(folder: Path, **changes) -> TrainingOptions:
    values = {
        "dataset": "digits",
        "data_root": None,
        "device": "cpu",
        "seed": 0,
        "output": str(folder / "global.pth"),
        "epochs": 2,
        "batch_size": 64,
        "lr": 0.01,
        "model": "mlp",
    }
    return TrainingOptions(**values | changes)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoint_and_accuracy(tmp_path: Path, suffix: str) -> None:
    chosen = options(tmp_path, output=str(tmp_path / f"deep/model{suffix}"))
    epochs = []
    result = run_training(chosen, on_epoch=epochs.append)
    assert [report.epoch for report in epochs] == [1, 2]
    assert [p.name for p in result.files] == [f"model{suffix}", "model.json"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == sorted(
        p.name for p in result.files
    )
    model, info = load_checkpoint(result.files[0])
    assert info is not None
    assert dataclasses.astuple(info) == ("mlp", 1, 8, 10, None, None)
    for split, stated in (
        ("train", result.train_accuracy),
        ("test", result.test_accuracy),
    ):
        assert accuracy(model, load_images("digits", split=split)) == stated
    assert result.test_accuracy > 0.7
    record = json.loads(result.files[1].read_text())
    assert record["command"] == "gradinv train-global"
    assert record["options"] == dataclasses.asdict(chosen)
    assert record["accuracy"] == {
        "train": result.train_accuracy,
        "test": result.test_accuracy,
    }
    assert [e["epoch"] for e in record["epochs"]] == [1, 2]
    assert record["epochs"][1]["loss"] < record["epochs"][0]["loss"]
    assert torch.__version__.startswith(record["versions"]["torch"])


def test_same_seed_same_weights(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        chosen = options(
            tmp_path, seed=seed, epochs=1, output=str(tmp_path / f"{name}.pth")
        )
        model, _ = load_checkpoint(run_training(chosen).files[0])
        return model[1].weight.detach()

    first = weights("a", 0)
    assert torch.equal(first, weights("b", 0))
    assert not torch.equal(first, weights("c", 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"batch_size": -2}, "batch_size: expected an integer of at least 1"),
        ({"lr": 0.0}, "lr: expected a finite number > 0"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"seed": 2**40}, "seed: expected an integer of at most"),
        ({"model": "lent"}, "model: .*did you mean 'lenet'"),
        ({"device": "tpu"}, "device: expected one of"),
        ({"output": "global.bin"}, "checkpoint: expected a file name ending in"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(tmp_path, **changes)


def test_bad_data_set_leaves_no_folder(tmp_path: Path) -> None:
    chosen = options(
        tmp_path, dataset="folder", output=str(tmp_path / "new/global.pth")
    )
    with pytest.raises(InputError, match="data_root: expected a folder"):
        run_training(chosen)
    assert list(tmp_path.iterdir()) == []


def test_bad_folder_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chosen = options(tmp_path, output=str(tmp_path / "file/global.pth"))
    seen = []
    with pytest.raises(InputError, match="output: .*Not a directory|output: .*exists"):
        run_training(chosen, on_epoch=seen.append)
    assert seen == []


def test_interrupted_training_leaves_no_file(tmp_path: Path) -> None:
    def stop(_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(options(tmp_path), on_epoch=stop)
    assert list(tmp_path.iterdir()) == []
