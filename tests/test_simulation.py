"""A federated run that is attacked while it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradinv_helpers import cli
from gradinv_helpers.attacks.invert import ATTACKS as ALL_ATTACKS
from gradinv_helpers.data import load_images
from gradinv_helpers.defences import GaussianNoise, Sign, StochasticQuantisation, TopK
from gradinv_helpers.errors import InputError
from gradinv_helpers.privacy import PrivateNoise, epsilon_spent
from gradinv_helpers.simulation import (
    ATTACKS,
    DELTA,
    SimulationOptions,
    parse_defences,
    run_simulation,
)


def options(folder: Path, **changes: Any) -> SimulationOptions:
    small: dict[str, Any] = {
        "dataset": "digits",
        "data_root": None,
        "device": "cpu",
        "seed": 0,
        "output_dir": str(folder),
        "rounds": 3,
        "clients": 4,
        "samples_per_client": 6,
        "attack_every": 0,
        "iterations": 4,
    }
    return SimulationOptions(**(small | changes))


def read(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "simulation.json").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def test_all_of_it_is_written(tmp_path: Path) -> None:
    told: list[int] = []
    result = run_simulation(options(tmp_path), on_round=lambda r: told.append(r.round))
    assert told == [1, 2, 3]
    assert {path.name for path in result.files} == {p.name for p in tmp_path.iterdir()}
    record = read(tmp_path)
    assert record["interrupted"] is False
    assert [r["accuracy"] for r in record["rounds"]] == [
        r.accuracy for r in result.rounds
    ]
    assert [sum(counts) for counts in record["clients"]] == [6] * 4
    assert all(r["bytes_up"] == r["bytes_down"] > 0 for r in record["rounds"])
    assert len(result.table().splitlines()) == 4


def test_training_helps(tmp_path: Path) -> None:
    whole = {"samples_per_client": None, "rounds": 5}
    accuracies = [r.accuracy for r in run_simulation(options(tmp_path, **whole)).rounds]
    assert accuracies[-1] is not None and accuracies[-1] > 0.6


def test_same_seed_same_run(tmp_path: Path) -> None:
    first, again, other = (
        run_simulation(options(tmp_path / name, dropout=0.4, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert [r.accuracy for r in first.rounds] == [r.accuracy for r in again.rounds]
    assert first.arrived == again.arrived
    assert first.arrived != other.arrived


def test_small_messages_are_inverted_above_their_floor(tmp_path: Path) -> None:
    small = {"algorithm": "fedsgd", "samples_per_client": 2, "attack_every": 2}
    result = run_simulation(options(tmp_path, **small))
    assert [seen.round for seen in result.leakage] == [1, 3]
    for seen in result.leakage:
        assert seen.psnr is not None and seen.floor is not None
        assert seen.psnr > seen.floor + 10  # a plain gradient of two images
        assert seen.proportion_error is not None
        assert seen.proportion_error < seen.proportion_floor
    pictures = {p.name for p in result.files if p.name.startswith("round_")}
    assert len(pictures) == 2
    assert f"images {result.leakage[0].psnr:.1f} dB" in result.table()


def test_large_messages_say_why_they_were_left_alone(tmp_path: Path) -> None:
    result = run_simulation(options(tmp_path, attack_every=1, attack_images=5))
    assert all(seen.score is None for seen in result.leakage)
    assert "6 images in one message, more than 5" in result.table()


def test_secure_aggregation_leaves_the_server_the_sum(tmp_path: Path) -> None:
    plain = run_simulation(options(tmp_path / "plain"))
    what = {"secure_aggregation": True, "attack_every": 1}
    masked = run_simulation(options(tmp_path / "masked", **what))
    assert [seen.sender for seen in masked.leakage] == [None] * 3
    assert {seen.num_samples for seen in masked.leakage} == {24}
    for one, other in zip(plain.rounds, masked.rounds, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_lost_rounds_leave_the_model_alone(tmp_path: Path) -> None:
    lost = {"secure_aggregation": True, "threshold": 4, "dropout": 0.9}
    result = run_simulation(options(tmp_path, **lost))
    assert result.arrived == ((), (), ())
    assert len({r.accuracy for r in result.rounds}) == 1
    assert {r.bytes_up for r in result.rounds} == {0}
    assert result.table().count("lost: too few stayed") == 3


def test_dropouts_send_nothing(tmp_path: Path) -> None:
    result = run_simulation(options(tmp_path, dropout=0.5, rounds=6))
    sizes = {r.bytes_down // 4 for r in result.rounds}
    assert len(sizes) == 1
    for report, arrived in zip(result.rounds, result.arrived, strict=True):
        assert report.bytes_up == len(arrived) * sizes.copy().pop()
    assert len({len(arrived) for arrived in result.arrived}) > 1


def test_privacy_is_that_of_the_rounds(tmp_path: Path) -> None:
    private = {"algorithm": "fedsgd", "defence": ("dp:2.0:0.5",)}
    result = run_simulation(options(tmp_path, **private))
    wanted = epsilon_spent(noise_multiplier=2.0, sample_rate=1.0, steps=3, delta=DELTA)
    assert result.epsilon == wanted
    assert f"epsilon {wanted:.2f}" in result.table()


def test_encodings_cost_fewer_bytes(tmp_path: Path) -> None:
    plain, sparse = (
        run_simulation(options(tmp_path / str(number), defence=defence))
        for number, defence in enumerate([(), ("top-k:0.1",)])
    )
    assert sparse.rounds[0].bytes_up < 0.2 * plain.rounds[0].bytes_up


def test_ctrl_c_keeps_the_rounds(tmp_path: Path) -> None:
    def stop(report: Any) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    result = run_simulation(options(tmp_path), on_round=stop)
    assert result.interrupted
    assert [r.round for r in result.rounds] == [1, 2]
    assert read(tmp_path)["interrupted"] is True
    assert (tmp_path / "simulation.png").exists()


def test_no_learned_prior_meets_its_training_images() -> None:
    assert set(ATTACKS) <= set(ALL_ATTACKS)
    assert not [name for name in ATTACKS if "vae" in name or "diff" in name]


def test_defences_are_read() -> None:
    found = parse_defences(["noise:0.1", "dp:1.5:0.5", "top-k:0.2"])
    assert found.applied == (
        GaussianNoise(0.1, relative=True),
        PrivateNoise(1.5),
        TopK(0.2),
    )
    assert (found.clip_norm, found.noise_multiplier) == (0.5, 1.5)
    assert parse_defences(["sign"]).applied == (Sign(),)
    assert parse_defences(["quantise:4"]).applied == (StochasticQuantisation(4),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defence": ("sing",)}, "did you mean 'sign'"),
        ({"defence": ("noise",)}, r"such as noise:0\.01"),
        ({"defence": ("noise:a",)}, r"such as noise:0\.01"),
        ({"defence": ("quantise:2.5",)}, "a whole number of bits"),
        ({"defence": ("top-k:2",)}, "share: expected"),
        ({"defence": ("dp:1:0.5",)}, "--algorithm fedsgd"),
        ({"rounds": 0}, "rounds: expected"),
        ({"clients_per_round": 5}, "clients_per_round: expected"),
        ({"dropout": 1.0}, "dropout: expected a probability below 1"),
        ({"threshold": 2}, "add --secure-aggregation"),
        ({"threshold": 5, "secure_aggregation": True}, "threshold: expected"),
        ({"engine": "flower"}, "engine: expected one of inprocess"),
        ({"attack": "vae-map"}, "attack: expected one of"),
        ({"partition": "even"}, "partition: expected one of"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        options(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--rounds", "2", "--clients", "3", "--device", "cpu"]
    arguments += ["--partition", "dirichlet", "--alpha", "0.5", "--attack-every", "0"]
    arguments += ["--defence", "noise:0.01", "--defence", "sign", "--lr", "0.01"]
    assert cli.run([*arguments, "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("round  clients  accuracy")
    assert "simulation.json" in printed
    chosen = read(tmp_path)["options"]
    assert chosen["alpha"] == 0.5
    assert chosen["defence"] == ["noise:0.01", "sign"]
    whole = len(load_images("digits", split="train"))
    assert sum(map(sum, read(tmp_path)["clients"])) == whole
    assert cli.run([*arguments, "--engine", "flower"]) == 2
    assert "--engine: expected one of inprocess" in capsys.readouterr().err
