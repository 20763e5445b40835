"""Every option of an experiment does what its name says, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from gradinv_helpers import experiment
from gradinv_helpers.checkpoints import ModelInfo, save_checkpoint
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.experiment import (
    InversionOptions,
    choose_victims,
    run_inversion,
)
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import local_update

PER_UPDATE = ("{}.png", "{}.gif", "{}_loss.json", "{}_metrics.json")


def options(**changes) -> InversionOptions:
    values = {
        "dataset": "digits",
        "data_root": None,
        "device": "cpu",
        "seed": 0,
        "output_dir": "unused",
        "num_clients": 2,
        "samples_per_client": 1,
        "client_indices": None,
        "iterations": 2,
        "log_every": 1,
        "reconstruct_mode": "per-client",
        "restarts": 1,
        "dummy_seed": 0,
        "normalize_gradients": False,
        "tv_weight": 0.0,
        "init_scale": 0.05,
        "apply_agg_step": False,
        "agg_lr": 0.1,
        "model": "lenet",
        "model_checkpoint": None,
        "attack": "auto",
        "judge": False,
    }
    return InversionOptions(**values | changes)


def pool() -> Images:
    return load_images("digits", split="test")


def clients_of(chosen: InversionOptions) -> list[Images]:
    size = chosen.samples_per_client
    return [
        pool()[list(range(k * size, (k + 1) * size))] for k in range(chosen.num_clients)
    ]


def spied(monkeypatch) -> dict[str, list]:
    """Record the updates that are attacked and the settings of the attacks."""
    calls: dict[str, list] = {"invert": [], "invert_clients": []}
    for name in calls:
        original = getattr(experiment, name)

        def wrapped(updates, *, name=name, original=original, **settings):
            calls[name].append((updates, settings))
            return original(updates, **settings)

        monkeypatch.setattr(experiment, name, wrapped)
    return calls


def norm(update) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in update.tensors.values()))


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- options ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clients": 0}, "num_clients: expected an integer of at least 1, got 0"),
        ({"samples_per_client": -1}, "samples_per_client: .* at least 1, got -1"),
        ({"iterations": 0}, "iterations: expected an integer of at least 1"),
        ({"log_every": 0}, "log_every: expected an integer of at least 1"),
        ({"restarts": 0}, "restarts: expected an integer of at least 1"),
        ({"restarts": 2.5}, "restarts: expected an integer"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"seed": 2**32}, "seed: expected an integer of at most 4294967295"),
        ({"dummy_seed": -1}, "dummy_seed: expected an integer of at least 0"),
        ({"tv_weight": -0.1}, "tv_weight: expected a finite number >= 0"),
        ({"tv_weight": math.nan}, "tv_weight: expected a finite number >= 0, got nan"),
        ({"init_scale": math.inf}, "init_scale: expected a finite number >= 0"),
        ({"agg_lr": 0.0}, "agg_lr: expected a finite number > 0"),
        ({"reconstruct_mode": "all"}, "reconstruct_mode: .*per-client, aggregated, bo"),
        ({"model": "lenett"}, "model: .*did you mean 'lenet'"),
        ({"attack": "idgl"}, "attack: expected one of .*did you mean 'idlg'"),
        ({"device": "gpu"}, "device: expected one of auto, cpu, cuda, mps"),
    ],
)
def test_bad_options(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**changes)


def test_victims() -> None:
    assert choose_victims(options(num_clients=3), 360) == (0, 1, 2)
    assert choose_victims(options(samples_per_client=2), 4) == (0, 1, 2, 3)
    named = options(client_indices=(5, 42))
    assert choose_victims(named, 43) == (5, 42)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clients": 6}, "num_clients: expected at most 5 images.*6 clients x 1"),
        (
            {"samples_per_client": 3},
            "num_clients: expected at most 5 images in all .*2 clients x 3 samples; lo",
        ),
        ({"client_indices": (1,)}, "client_indices: expected 2 indices .* got 1;"),
        ({"client_indices": (0, 1, 2)}, "client_indices: expected 2 indices .* got 3"),
        ({"client_indices": ()}, "client_indices: expected 2 indices .* got 0"),
        ({"client_indices": (3, 3)}, r"client_indices: .*different .*got \[3\] twice"),
        ({"client_indices": (0, 5)}, r"indices from 0 to 4, got \[5\]"),
        ({"client_indices": (-1, 2)}, r"indices from 0 to 4, got \[-1\]"),
    ],
)
def test_bad_victims(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_victims(options(**changes), 5)


# --- what the options do to the updates -------------------------------------------


def test_updates_are_those_of_the_named_images(tmp_path: Path, monkeypatch) -> None:
    calls = spied(monkeypatch)
    chosen = options(
        output_dir=str(tmp_path), client_indices=(7, 3), seed=5, iterations=1
    )
    run_inversion(chosen)
    ((updates, _),) = calls["invert_clients"]
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10, seed=5)
    for update, index in zip(updates, (7, 3), strict=True):
        expected = local_update(model, pool()[[index]])
        for name, tensor in expected.tensors.items():
            assert torch.equal(update.tensors[name], tensor)


def test_plain_aggregate_is_the_gradient_of_all_images(monkeypatch, tmp_path) -> None:
    calls = spied(monkeypatch)
    chosen = options(
        reconstruct_mode="aggregated",
        samples_per_client=2,
        iterations=1,
        output_dir=str(tmp_path),
    )
    run_inversion(chosen)
    assert calls["invert_clients"] == []
    ((aggregate, _),) = calls["invert"]
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    expected = local_update(model, pool()[[0, 1, 2, 3]])
    assert aggregate.num_samples == 4
    assert not aggregate.normalized
    for name, tensor in expected.tensors.items():
        assert torch.allclose(aggregate.tensors[name], tensor, atol=1e-6)


def test_normalize_gradients(monkeypatch, tmp_path: Path) -> None:
    """Clients keep their own gradients; only the aggregate is of unit vectors."""
    calls = spied(monkeypatch)
    chosen = options(
        reconstruct_mode="both",
        normalize_gradients=True,
        iterations=1,
        output_dir=str(tmp_path),
    )
    run_inversion(chosen)
    ((updates, _),) = calls["invert_clients"]
    ((aggregate, _),) = calls["invert"]
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    plain = [local_update(model, images) for images in clients_of(chosen)]
    for update, expected in zip(updates, plain, strict=True):
        assert not update.normalized
        assert norm(update) == pytest.approx(norm(expected))
        assert norm(expected) != pytest.approx(1, rel=0.05)
    assert aggregate.normalized
    for name, tensor in aggregate.tensors.items():
        expected = sum(u.tensors[name] / norm(u) for u in plain) / 2
        assert torch.allclose(tensor, expected, atol=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
def test_apply_agg_step(monkeypatch, tmp_path: Path, normalised: bool) -> None:
    """The server's model moves by lr times the aggregate, then clients compute anew."""
    calls = spied(monkeypatch)
    chosen = options(
        apply_agg_step=True,
        agg_lr=0.7,
        normalize_gradients=normalised,
        samples_per_client=2,
        iterations=1,
        output_dir=str(tmp_path),
    )
    run_inversion(chosen)
    ((updates, _),) = calls["invert_clients"]
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    first = [local_update(model, images) for images in clients_of(chosen)]
    lengths = [norm(update) if normalised else 1.0 for update in first]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = [
                u.tensors[name] / size for u, size in zip(first, lengths, strict=True)
            ]
            parameter -= 0.7 * sum(parts) / 2
    for update, images in zip(updates, clients_of(chosen), strict=True):
        for name, parameter in model.named_parameters():
            sent = dict(update.model.named_parameters())[name]
            assert torch.allclose(sent, parameter, atol=1e-6)
        expected = local_update(model, images)
        for name, tensor in expected.tensors.items():
            assert torch.allclose(update.tensors[name], tensor, atol=1e-5)


def test_settings_reach_the_attack(monkeypatch, tmp_path: Path) -> None:
    calls = spied(monkeypatch)
    chosen = options(
        reconstruct_mode="both",
        output_dir=str(tmp_path),
        iterations=2,
        log_every=2,
        restarts=2,
        dummy_seed=9,
        init_scale=0.2,
        tv_weight=1e-3,
        attack="dlg",
    )
    run_inversion(chosen)
    for name in ("invert", "invert_clients"):
        ((_, settings),) = calls[name]
        settings.pop("on_step")
        stem = "aggregate" if name == "invert" else "clients"
        path = tmp_path / f"{stem}.checkpoint.safetensors"
        assert settings.pop("checkpoint") == path
        assert settings == {
            "attack": "dlg",
            "iterations": 2,
            "restarts": 2,
            "seed": 9,
            "init_scale": 0.2,
            "tv_weight": 1e-3,
            "log_every": 2,
        }


def test_model_of_a_checkpoint(monkeypatch, tmp_path: Path) -> None:
    calls = spied(monkeypatch)
    info = ModelInfo("mlp", in_channels=1, image_size=8, num_classes=10)
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=10, seed=77)
    for suffix in (".pth", ".safetensors"):
        path = save_checkpoint(tmp_path / f"global{suffix}", model, info)
        run_inversion(
            options(model_checkpoint=str(path), output_dir=str(tmp_path), iterations=1)
        )
        updates, _ = calls["invert_clients"][-1]
        assert torch.equal(updates[0].model[1].weight, model[1].weight)


@pytest.mark.parametrize(
    "info",
    [
        ModelInfo("mlp", in_channels=3, image_size=8, num_classes=10),
        ModelInfo("mlp", in_channels=1, image_size=16, num_classes=10),
    ],
)
def test_checkpoint_for_other_images(tmp_path: Path, info: ModelInfo) -> None:
    model = build_model(**dataclasses.asdict(info))
    path = save_checkpoint(tmp_path / "global.pth", model, info)
    target = tmp_path / "new"
    with pytest.raises(InputError, match="model_checkpoint: .*1 x 8 x 8 images") as err:
        run_inversion(options(model_checkpoint=str(path), output_dir=str(target)))
    assert "\n" not in str(err.value)
    assert not target.exists()


def test_checkpoint_with_too_few_classes(tmp_path: Path) -> None:
    info = ModelInfo("mlp", in_channels=1, image_size=8, num_classes=2)
    model = build_model(**dataclasses.asdict(info))
    path = save_checkpoint(tmp_path / "global.pth", model, info)
    with pytest.raises(InputError, match="labels below the model's 2 classes"):
        run_inversion(
            options(model_checkpoint=str(path), num_clients=8, output_dir=str(tmp_path))
        )


# --- what is written --------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("per-client", ["client_0", "client_1"]),
        ("aggregated", ["aggregate"]),
        ("both", ["client_0", "client_1", "aggregate"]),
    ],
)
def test_files_of_every_mode(tmp_path: Path, mode: str, names: list[str]) -> None:
    stages, steps = [], []
    chosen = options(reconstruct_mode=mode, output_dir=str(tmp_path / "deep/out"))
    result = run_inversion(chosen, on_stage=stages.append, on_step=steps.append)
    folder = tmp_path / "deep/out"
    expected = {pattern.format(name) for name in names for pattern in PER_UPDATE}
    assert content(folder) == expected | {"summary.png", "run.json"}
    assert [path.name for path in result.files][-1] == "run.json"
    assert {path.name for path in result.files} == content(folder)
    assert list(result.scores) == names
    assert not result.interrupted
    assert len(stages) == (2 if mode == "both" else 1)
    assert steps
    record = json.loads((folder / "run.json").read_text())
    assert record["command"] == "gradinv invert"
    asked = json.loads(json.dumps(dataclasses.asdict(chosen)))
    assert record["options"] == asked
    assert list(record["results"]) == names
    assert record["indices"] == [0, 1]
    assert record["interrupted"] is False
    assert set(record["files"]) == content(folder) - {"run.json"}
    assert record["versions"]["python"]
    assert record["seconds"] > 0


def test_json_of_one_update(tmp_path: Path) -> None:
    from PIL import Image

    chosen = options(
        output_dir=str(tmp_path),
        samples_per_client=2,
        client_indices=(4, 8, 15, 16),
        restarts=2,
        iterations=3,
    )
    result = run_inversion(chosen)
    metrics = json.loads((tmp_path / "client_1_metrics.json").read_text())
    assert metrics["indices"] == [15, 16]
    assert metrics["true_labels"] == pool()[[15, 16]].labels.tolist()
    assert len(metrics["labels"]) == 2
    assert metrics["attack"] == "dlg"
    assert metrics["label_source"] == "inferred (last layer taken apart)"
    assert sorted(metrics["assignment"]) == [0, 1]
    assert metrics["summary"] == result.scores["client_1"].to_dict()["summary"]
    assert metrics["floors"]
    loss = json.loads((tmp_path / "client_1_loss.json").read_text())
    assert loss["iterations"] == list(range(len(loss["loss"])))
    assert len(loss["trials"]) >= 2
    assert {"seed", "loss", "iterations", "stopped", "replaced"} <= set(
        loss["trials"][0]
    )
    with Image.open(tmp_path / "client_1.gif") as film:
        assert film.n_frames >= 2
    with Image.open(tmp_path / "summary.png") as picture:
        assert min(picture.size) > 50


def test_labels_are_paired_with_their_images(tmp_path: Path) -> None:
    """`labels` in the JSON stand in the order of the true ones."""
    chosen = options(
        output_dir=str(tmp_path),
        num_clients=1,
        samples_per_client=2,
        iterations=40,
        restarts=2,
    )
    run_inversion(chosen)
    metrics = json.loads((tmp_path / "client_0_metrics.json").read_text())
    assert min(metrics["per_image"]["psnr"]) > 30
    assert metrics["labels"] == metrics["true_labels"]


def test_judge_has_never_seen_a_victim(monkeypatch, tmp_path: Path) -> None:
    seen = []

    def train(images, **_):
        seen.append(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train_classifier", train)
    with pytest.raises(KeyboardInterrupt):
        run_inversion(options(judge=True, output_dir=str(tmp_path)))
    victims = pool()[[0, 1]].pixels.flatten(1)
    assert float(torch.cdist(seen[0].pixels.flatten(1), victims).min()) > 0
    assert content(tmp_path) == set()


def test_a_nan_loss_is_written_as_null(monkeypatch, tmp_path: Path) -> None:
    original = experiment.invert_clients

    def with_nan(updates, **settings):
        found = original(updates, **settings)
        broken = dataclasses.replace(
            found[0].trials[0], loss=math.nan, stopped="broke", replaced=True
        )
        return [
            dataclasses.replace(found[0], trials=(broken, *found[0].trials)),
            found[1],
        ]

    monkeypatch.setattr(experiment, "invert_clients", with_nan)
    run_inversion(options(output_dir=str(tmp_path)))
    loss = json.loads((tmp_path / "client_0_loss.json").read_text())
    assert loss["trials"][0]["loss"] is None
    assert loss["trials"][0]["stopped"] == "broke"


# --- interruptions ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["per-client", "both", "aggregated"])
def test_ctrl_c_during_the_attack_keeps_the_best_so_far(tmp_path: Path, mode) -> None:
    def stop(step) -> None:
        if step.iteration >= 1:
            raise KeyboardInterrupt

    chosen = options(reconstruct_mode=mode, iterations=50, output_dir=str(tmp_path))
    result = run_inversion(chosen, on_step=stop)
    assert result.interrupted
    names = ["aggregate"] if mode == "aggregated" else ["client_0", "client_1"]
    assert list(result.scores) == names
    expected = {pattern.format(name) for name in names for pattern in PER_UPDATE}
    stem = "aggregate" if mode == "aggregated" else "clients"
    expected |= {"summary.png", "run.json", f"{stem}.checkpoint.safetensors"}
    assert content(tmp_path) == expected
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["interrupted"] is True
    assert record["results"][names[0]]["stopped"] == "interrupted"

    begun: list[int] = []
    again = dataclasses.replace(chosen, resume=True, iterations=4)
    finished = run_inversion(again, on_step=lambda step: begun.append(step.iteration))
    assert begun[0] >= 1  # it goes on, where a new search would begin at 0
    assert not finished.interrupted
    assert not list(tmp_path.glob("*.safetensors"))


def test_ctrl_c_in_the_second_stage_keeps_the_first(tmp_path: Path) -> None:
    stages = []

    def stop(step) -> None:
        if len(stages) == 2 and step.iteration >= 1:
            raise KeyboardInterrupt

    chosen = options(reconstruct_mode="both", output_dir=str(tmp_path), iterations=3)
    result = run_inversion(chosen, on_stage=stages.append, on_step=stop)
    assert result.interrupted
    assert list(result.scores) == ["client_0", "client_1", "aggregate"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["results"]["client_0"]["stopped"] != "interrupted"
    assert record["results"]["aggregate"]["stopped"] == "interrupted"


def test_ctrl_c_between_groups_of_clients(monkeypatch, tmp_path: Path) -> None:
    """Clients that had not begun are missing; the others are whole."""
    from gradinv_helpers.attacks import invert as module

    def stop(step) -> None:
        if step.client == 1 and step.iteration == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_TRIALS_CPU", 1)
    chosen = options(num_clients=3, iterations=3, output_dir=str(tmp_path))
    result = run_inversion(chosen, on_step=stop)
    assert result.interrupted
    assert list(result.scores) == ["client_0", "client_1"]
    names = {p.format(f"client_{k}") for k in range(2) for p in PER_UPDATE}
    assert names | {"run.json"} <= content(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["interrupted"] is True
    assert list(record["results"]) == ["client_0", "client_1"]


def test_ctrl_c_while_writing_leaves_whole_files(monkeypatch, tmp_path: Path) -> None:
    original = experiment.write_json

    def stop(path, value):
        if Path(path).name == "client_1_metrics.json":
            raise KeyboardInterrupt
        return original(path, value)

    monkeypatch.setattr(experiment, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        run_inversion(options(output_dir=str(tmp_path)))
    kept = content(tmp_path)
    assert {pattern.format("client_0") for pattern in PER_UPDATE} <= kept
    assert "client_1_metrics.json" not in kept
    assert not [name for name in kept if name.startswith(".")]
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
