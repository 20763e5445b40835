"""Groups of clients side by side: the same findings, one end for all."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

import gradinv_helpers.attacks.invert as module
from gradinv_helpers.attacks.groups import side_by_side
from gradinv_helpers.attacks.invert import invert_clients
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step
from gradinv_helpers.data import load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import SharedUpdate, local_update

CLIENTS, MOST = 6, 2


@pytest.fixture(scope="module")
def updates() -> list[SharedUpdate]:
    images = load_images("digits", split="test")[:CLIENTS]
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    return [local_update(model, images[[k]]) for k in range(CLIENTS)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def attack(updates: Sequence[SharedUpdate], **more) -> list[Reconstruction]:
    return invert_clients(updates, attack="idlg", restarts=1, iterations=3, **more)


def test_the_number_of_threads_changes_nothing(updates, threads, monkeypatch) -> None:
    monkeypatch.setattr(module, "_TRIALS_CPU", MOST)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(attack(updates))
        assert torch.get_num_threads() == count
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one.images, same.images)
            assert one.losses == same.losses


def test_two_searches_run_at_once(updates, threads, monkeypatch) -> None:
    monkeypatch.setattr(module, "_TRIALS_CPU", MOST)
    threads(2)
    together = threading.Barrier(2, timeout=60)
    seen: dict[int, int] = {}
    original = module.Search.run

    def run(self):
        if self.numbers[0] < 2 * MOST:  # the first two groups wait for each other
            together.wait()
        seen[self.numbers[0]] = threading.get_ident()
        return original(self)

    monkeypatch.setattr(module.Search, "run", run)
    attack(updates)
    assert len({seen[0], seen[MOST]}) == 2


def test_ctrl_c_ends_all_searches(updates, threads, monkeypatch) -> None:
    """Groups that had begun keep their best, others are missing."""
    monkeypatch.setattr(module, "_TRIALS_CPU", 1)
    threads(2)
    begun = threading.Barrier(2, timeout=60)
    original = module.Search.run

    def run(self):
        begun.wait()
        return original(self)

    monkeypatch.setattr(module.Search, "run", run)

    def stop(step: Step) -> None:
        if step.client == 1 and step.iteration == 1:
            raise KeyboardInterrupt

    found = attack(updates, on_step=stop)
    assert len(found) == 2
    assert found[1].stopped == "interrupted"


def test_an_error_of_one_group_reaches_the_caller(
    updates, threads, monkeypatch
) -> None:
    monkeypatch.setattr(module, "_TRIALS_CPU", MOST)
    threads(2)

    def fail(step: Step) -> None:
        if step.client == 3:
            raise InputError("update", "something else", "this")

    with pytest.raises(InputError, match="something else"):
        attack(updates, on_step=fail)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("work", "expected"), [(1, 3), (10**12, 1)])
def test_large_work_is_not_divided(threads, work: int, expected: int) -> None:
    threads(3)
    available = side_by_side(work, torch.zeros(1))
    # On one core, large work runs on one thread, and then searches may be two.
    assert available == expected or torch.get_num_threads() == available
