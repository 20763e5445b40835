"""An annealing that was cut off goes on from its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gradinv_helpers as gi
from gradinv_helpers.attacks.saved_stages import SavedStages
from gradinv_helpers.errors import InputError


def update_of(training: gi.LocalTraining | None = None) -> gi.SharedUpdate:
    images = gi.load_images("photos", split="test", image_size=16)[[0, 1, 2]]
    model = gi.build_model("lenet", in_channels=3, image_size=16, num_classes=10)
    return gi.local_update(model, images, training, seed=3)


DELTA = gi.LocalTraining(sends="delta", lr=0.01, batch_size=2)


@pytest.mark.parametrize("training", [None, DELTA], ids=["gradient", "delta"])
def test_an_interrupted_annealing_goes_on(training, tmp_path: Path) -> None:
    update, path = update_of(training), tmp_path / "kept.safetensors"
    settings = {"iterations": 12, "restarts": 1, "last_level": 1e-3}
    whole = gi.map_estimate(update, **settings)
    told = []

    def stop(step: gi.Step) -> None:
        told.append(step)
        if len(told) == 8:
            raise KeyboardInterrupt

    cut = gi.map_estimate(update, **settings, on_step=stop, checkpoint=path)
    assert cut.reconstruction.stopped == "interrupted"
    assert 0 < len(cut.stages) < len(whole.stages)
    assert path.exists()
    again = gi.map_estimate(update, **settings, checkpoint=path)
    assert not path.exists()
    assert [s.level for s in again.stages] == [s.level for s in whole.stages]
    assert again.stages[-1].misfit == pytest.approx(whole.stages[-1].misfit, rel=0.05)
    assert torch.equal(again.stages[0].images, cut.stages[0].images)
    assert torch.equal(again.reconstruction.labels, whole.reconstruction.labels)


def test_a_finished_annealing_says_so() -> None:
    told: list[gi.Step] = []
    gi.map_estimate(update_of(), iterations=1, restarts=1, on_step=told.append)
    assert [step.finished for step in told].count(True) == 1
    assert told[-1].finished


def test_a_file_of_another_attack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    SavedStages(path, "another").save({"point": torch.zeros(1)}, {"done": 0})
    before = path.read_bytes()
    with pytest.raises(InputError, match="the same update, prior, labels"):
        gi.map_estimate(update_of(), iterations=1, checkpoint=path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match="a file that this attack has written"):
        gi.map_estimate(update_of(), iterations=1, checkpoint=path)
    assert path.read_bytes() == b"no such thing"
