"""A search that is cut off goes on from its checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import gradinv_helpers as gi
from gradinv_helpers.attacks import search as module
from gradinv_helpers.attacks.problem import MatchingProblem


@pytest.fixture
def victim() -> gi.Images:
    return gi.load_images("digits", split="test")[[3]]


@pytest.fixture
def update(victim: gi.Images) -> gi.SharedUpdate:
    model = gi.build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    return gi.local_update(model, victim)


def cut_off(monkeypatch, after: int) -> None:
    """Press Ctrl-C at an evaluation."""
    original, count = MatchingProblem.evaluate, [0]

    def evaluate(self, points, clients):
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt
        return original(self, points, clients)

    monkeypatch.setattr(MatchingProblem, "evaluate", evaluate)


@pytest.mark.parametrize("optimiser", ["l-bfgs", "signed-adam"])
@pytest.mark.parametrize("after", [2, 60, 120])
def test_the_same_call_goes_on(
    monkeypatch, tmp_path: Path, victim, update, optimiser: str, after: int
) -> None:
    path = tmp_path / "attack.safetensors"
    settings = {
        "attack": "idlg",
        "optimiser": optimiser,
        "restarts": 2,
        "iterations": 30,
        "checkpoint": path,
    }
    whole = gi.invert(update, **settings | {"checkpoint": None})
    with monkeypatch.context() as patch:
        cut_off(patch, after)
        part = gi.invert(update, **settings)
    assert part.stopped == "interrupted"
    assert path.exists()
    before = max(trial.iterations for trial in part.trials)

    begun: list[int] = []
    found = gi.invert(
        update, **settings, on_step=lambda step: begun.append(step.iteration)
    )
    assert min(begun) >= (before - 1 if before > 1 else 0)
    assert not path.exists()
    assert found.stopped != "interrupted"
    assert len(found.trials) == len(whole.trials) == 2
    assert [t.seed for t in found.trials] == [t.seed for t in whole.trials]
    assert all(t.iterations <= 30 for t in found.trials)
    assert len(found.losses) == len(found.iterations)
    # L-BFGS begins its memory anew, so both ends are as good, not equal.
    floor = gi.score(found, victim).floors["constant"].psnr[0]
    gain = gi.score(whole, victim).psnr[0] - floor
    assert gi.score(found, victim).psnr[0] - floor > 0.7 * gain


def test_a_finished_group_is_not_searched_again(
    monkeypatch, tmp_path: Path, update
) -> None:
    """Finished restarts stay as they are; only the open one goes on."""
    path = tmp_path / "attack.safetensors"
    settings = {"attack": "idlg", "restarts": 2, "checkpoint": path, "iterations": 200}
    calls = {"n": 0}
    original = module.Search._reason

    def first_stops(self, slot, state, spent):
        calls["n"] += 1
        if slot.restart == 0 and len(state.trace) > 3:
            return "enough"
        return original(self, slot, state, spent)

    with monkeypatch.context() as patch:
        patch.setattr(module.Search, "_reason", first_stops)
        cut_off(patch, 200)
        gi.invert(update, **settings)
    seen: set[int] = set()
    found = gi.invert(update, **settings, on_step=lambda s: seen.add(s.restart))
    assert seen == {1}
    assert found.trials[0].stopped == "enough"


def test_the_state_is_written_on_the_way(monkeypatch, tmp_path: Path, update) -> None:
    path = tmp_path / "attack.safetensors"
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_SAVES", 0.0)
    there: list[bool] = []
    gi.invert(
        update,
        attack="idlg",
        iterations=3,
        restarts=1,
        checkpoint=path,
        on_step=lambda step: there.append(path.exists()),
    )
    assert there[0] is False and there[-1] is True
    assert not path.exists()


def test_another_attack_does_not_take_it_up(monkeypatch, tmp_path, update) -> None:
    path = tmp_path / "attack.safetensors"
    settings = {"attack": "idlg", "restarts": 1, "iterations": 20, "checkpoint": path}
    with monkeypatch.context() as patch:
        cut_off(patch, 60)
        gi.invert(update, **settings)
    content = path.read_bytes()
    for other in ({"seed": 1}, {"attack": "dlg"}, {"restarts": 2}):
        with pytest.raises(gi.InputError, match="checkpoint: expected the same"):
            gi.invert(update, **settings | other)
    noisy = dataclasses.replace(
        update, tensors={n: 2 * t for n, t in update.tensors.items()}
    )
    with pytest.raises(gi.InputError, match="checkpoint: expected the same"):
        gi.invert(noisy, **settings)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\0" * 100])
def test_a_damaged_file_is_refused(tmp_path: Path, update, content: bytes) -> None:
    path = tmp_path / "attack.safetensors"
    path.write_bytes(content)
    with pytest.raises(gi.InputError, match="checkpoint: expected a file that"):
        gi.invert(update, attack="idlg", iterations=1, checkpoint=path)
    assert path.read_bytes() == content


def test_a_file_of_other_tensors_is_refused(tmp_path: Path, update) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "attack.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(gi.InputError, match="checkpoint: expected a file that"):
        gi.invert(update, attack="idlg", iterations=1, checkpoint=path)
