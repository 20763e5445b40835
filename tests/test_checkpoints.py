"""Weights on disk come back exactly, and a hostile file is refused, not run."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradinv_helpers.checkpoints import (
    ModelInfo,
    check_checkpoint_name,
    load_checkpoint,
    save_checkpoint,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import MODELS, build_model

INFO = ModelInfo("lenet", in_channels=1, image_size=8, num_classes=4)
SUFFIXES = [".safetensors", ".pth", ".pt"]


def model_of(info: ModelInfo = INFO, seed: int = 3) -> nn.Module:
    return build_model(
        info.name,
        in_channels=info.in_channels,
        image_size=info.image_size,
        num_classes=info.num_classes,
        seed=seed,
    )


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path: Path, suffix: str, name: str) -> None:
    info = ModelInfo(name, in_channels=1, image_size=8, num_classes=4)
    model = model_of(info).train()
    path = save_checkpoint(tmp_path / f"new/folder/global{suffix}", model, info)
    assert path.is_file()
    assert model.training
    found, about = load_checkpoint(path)
    assert about == info
    assert not found.training
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    for key, value in found.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert value.dtype == state[key].dtype
    assert all(p.requires_grad for p in found.parameters())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_loaded_model_can_be_trained_and_differs_from_another(
    tmp_path: Path, suffix: str
) -> None:
    path = save_checkpoint(tmp_path / f"a{suffix}", model_of(seed=1), INFO)
    one, _ = load_checkpoint(path)
    two, _ = load_checkpoint(path)
    with torch.no_grad():
        one[0].weight.zero_()
    assert not torch.equal(one[0].weight, two[0].weight)


def test_safetensors_are_the_public_format(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = save_checkpoint(tmp_path / "a.safetensors", model_of(), INFO)
    assert torch.equal(load_file(path)["0.weight"], model_of()[0].weight)


def test_views_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model[7].weight.data = torch.rand(48, 4).mT  # not contiguous
    for suffix in SUFFIXES:
        path = save_checkpoint(tmp_path / f"a{suffix}", model, INFO)
        assert torch.equal(load_checkpoint(path)[0][7].weight, model[7].weight)


def test_an_existing_file_is_replaced_whole(tmp_path: Path, monkeypatch) -> None:
    path = save_checkpoint(tmp_path / "a.pth", model_of(seed=1), INFO)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_checkpoint(path, model_of(seed=2), INFO)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_state_dict_into_a_model_of_ones_own(tmp_path: Path, suffix: str) -> None:
    source = nn.Linear(3, 2)
    path = tmp_path / f"bare{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    target = nn.Linear(3, 2)
    found, about = load_checkpoint(path, model=target)
    assert found is target
    assert about is None
    assert torch.equal(target.weight, source.weight)
    with pytest.raises(InputError, match="which model it holds.*bare tensors.*model="):
        load_checkpoint(path)


# --- hostile and damaged files ----------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_the_bomb_works(tmp_path: Path) -> None:
    """The test below can fail."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["pickle", "torch", "inside", "as description"])
def test_code_in_a_file_is_not_run(tmp_path: Path, suffix: str, how: str) -> None:
    path, marker = tmp_path / f"hostile{suffix}", tmp_path / "marker"
    bomb = Bomb(marker)
    state = model_of().state_dict()
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif how == "torch":
        torch.save(bomb, path)
    elif how == "inside":
        torch.save({"state_dict": {**state, "0.bias": bomb}}, path)
    else:
        torch.save({"state_dict": state, "gradinv": bomb}, path)
    with pytest.raises(InputError, match="^checkpoint: expected") as error:
        load_checkpoint(path)
    text = one_line(error)
    if suffix != ".safetensors" and how != "pickle":
        assert "can run code, so it was not opened" in text
    assert not marker.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.pth"
    torch.save(model_of(), path)
    with pytest.raises(InputError, match="a file of tensors only") as error:
        load_checkpoint(path)
    one_line(error)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    path = save_checkpoint(tmp_path / f"a{suffix}", model_of(), INFO)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="^checkpoint: expected a") as error:
        load_checkpoint(path)
    assert path.name in one_line(error)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"hello", b"\0" * 1000, b"{}", b"\x80\x02K\x01."])
def test_not_a_checkpoint(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="^checkpoint: expected a") as error:
        load_checkpoint(path)
    one_line(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "not a mapping from names to tensors"),
        ({"state_dict": [torch.ones(1)]}, "not a mapping from names to tensors"),
        ({"a": 1}, "not a mapping from names to tensors"),
        ({1: torch.ones(1)}, "not a mapping from names to tensors"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a has NaN or infinite values"),
        ({"a": torch.tensor([float("-inf")])}, "a has NaN or infinite values"),
        ({"state_dict": {}, "gradinv": [1]}, "description of the model is not ours"),
        ({"state_dict": {}, "gradinv": {"x": 1}}, "description of the model is not"),
    ],
)
def test_wrong_content(tmp_path: Path, content, reason: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=reason) as error:
        load_checkpoint(path)
    one_line(error)


def test_nan_in_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a has NaN or infinite values"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[1]", '"lenet"', '{"name": "lenet"}', "3"])
def test_wrong_description_in_safetensors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(model_of().state_dict(), path, metadata={"gradinv": text})
    with pytest.raises(InputError, match="^checkpoint: expected an undamaged") as error:
        load_checkpoint(path)
    one_line(error)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 5},
        {"image_size": 32},
        {"in_channels": 3},
        {"name": "mlp"},
        {"image_size": 10**7},  # would need petabytes
        {"num_classes": 10**12},
    ],
)
def test_description_that_does_not_fit(
    tmp_path: Path, suffix: str, changes: dict
) -> None:
    path = tmp_path / f"a{suffix}"
    about = vars(INFO) | changes
    state = model_of().state_dict()
    if suffix == ".pth":
        torch.save({"state_dict": state, "gradinv": about}, path)
    else:
        save_file(state, path, metadata={"gradinv": json.dumps(about)})
    message = "^checkpoint: expected tensors with the names and shapes of the model"
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    one_line(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "vgg"},
        {"name": None},
        {"image_size": "8"},
        {"image_size": 0},
        {"num_classes": -1},
        {"in_channels": 1.5},
    ],
)
def test_description_of_no_model(tmp_path: Path, changes: dict) -> None:
    path = tmp_path / "a.pth"
    state = model_of().state_dict()
    torch.save({"state_dict": state, "gradinv": vars(INFO) | changes}, path)
    with pytest.raises(InputError, match="^checkpoint: .*description") as error:
        load_checkpoint(path)
    one_line(error)


def test_wrong_shapes_leave_the_model_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(5)}, path)
    target = nn.Linear(3, 2)
    before = target.weight.detach().clone()
    with pytest.raises(InputError, match="size mismatch for bias") as error:
        load_checkpoint(path, model=target)
    one_line(error)
    assert torch.equal(target.weight, before)


@pytest.mark.parametrize(
    "state", [{"weight": torch.ones(2, 3)}, {"w": torch.ones(1), "bias": torch.ones(2)}]
)
def test_missing_and_unknown_names(tmp_path: Path, state: dict) -> None:
    path = tmp_path / "a.pth"
    torch.save(state, path)
    with pytest.raises(InputError, match="names and shapes of the model") as error:
        load_checkpoint(path, model=nn.Linear(3, 2))
    one_line(error)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path / "folder.pth"):
        with pytest.raises(InputError, match="checkpoint: expected an existing file"):
            load_checkpoint(path)
        path.mkdir(exist_ok=True)


@pytest.mark.parametrize("name", ["a", "a.bin", "a.pth.zip", ".pth", "a.PTH", "a.ckpt"])
def test_unknown_suffix(name: str, tmp_path: Path) -> None:
    message = r"checkpoint: expected a file name ending in .safetensors, .pth, .pt, got"
    for call in (
        lambda: check_checkpoint_name(tmp_path / name),
        lambda: save_checkpoint(tmp_path / name, model_of(), INFO),
        lambda: load_checkpoint(tmp_path / name),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_input_statistics_come_back(tmp_path: Path, suffix: str, name: str) -> None:
    info = ModelInfo(name, 3, 16, 5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    model = build_model(
        name, in_channels=3, image_size=16, num_classes=5, mean=info.mean, std=info.std
    )
    path = save_checkpoint(tmp_path / f"model{suffix}", model, info)
    loaded, found = load_checkpoint(path)
    assert found == info
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("mean", ["none", [[1.0]], ["a"], 3])
def test_statistics_that_are_none_are_damage(tmp_path: Path, mean: object) -> None:
    path = tmp_path / "model.pth"
    save_checkpoint(path, model_of(INFO), INFO)
    content = torch.load(path, weights_only=True)
    key = next(k for k in content if k != "state_dict")
    content[key]["mean"] = mean
    torch.save(content, path)
    with pytest.raises(InputError, match="checkpoint: expected an undamaged file"):
        load_checkpoint(path)
