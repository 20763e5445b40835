"""Devices by name, and threads by the size of the work."""

from __future__ import annotations

import pytest
import torch

from gradinv_helpers import compute
from gradinv_helpers.compute import cpu_threads, resolve_device
from gradinv_helpers.errors import InputError


@pytest.fixture
def threads(monkeypatch):
    """A machine with eight threads; the calls are recorded, not made."""
    state = {"now": 8}
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["now"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(now=n))
    monkeypatch.setattr(compute.os, "cpu_count", lambda: 8)
    return state


def machine(monkeypatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [
        (True, True, "cuda"),
        (True, False, "cuda"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ],
)
def test_auto_takes_the_best_device(monkeypatch, cuda, mps, expected) -> None:
    machine(monkeypatch, cuda=cuda, mps=mps)
    assert resolve_device() == torch.device(expected)
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(monkeypatch, name: str) -> None:
    machine(monkeypatch, cuda=False, mps=False)
    message = f"device: expected a device of this machine, got '{name}'; use 'auto'"
    with pytest.raises(InputError, match=message):
        resolve_device(name)
    machine(monkeypatch, cuda=True, mps=True)
    assert resolve_device(name).type == name


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:0", "", None])
def test_unknown_device(name) -> None:
    with pytest.raises(
        InputError, match="device: expected one of auto, cpu, cuda, mps"
    ):
        resolve_device(name)


def test_small_work_runs_on_one_thread(threads) -> None:
    with cpu_threads(1_000_000) as used:
        assert used == threads["now"] == 1
    assert threads["now"] == 8


def test_large_work_keeps_its_threads(threads) -> None:
    with cpu_threads(10**12) as used:
        assert used == threads["now"] == 8


def test_a_smaller_setting_of_the_user_is_kept(threads) -> None:
    threads["now"] = 3
    with cpu_threads(10**12) as used:
        assert used == 3
    assert threads["now"] == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_threads_come_back_after_an_error(threads, error) -> None:
    with pytest.raises(error), cpu_threads(10):
        raise error
    assert threads["now"] == 8


def test_blocks_can_be_nested(threads) -> None:
    with cpu_threads(10**12):
        with cpu_threads(1):
            assert threads["now"] == 1
        assert threads["now"] == 8
