"""The command line: files, exit codes, and one line for everything that is wrong."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from gradinv_helpers import cli
from gradinv_helpers.checkpoints import ModelInfo, load_checkpoint, save_checkpoint
from gradinv_helpers.data import DATASETS
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import build_model

PER_UPDATE = ("{}.png", "{}.gif", "{}_loss.json", "{}_metrics.json")
QUICK = ["--iterations", "1", "--restarts", "1", "--no-judge"]
DIGITS = ["invert", "--dataset", "digits", *QUICK]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    """Run in an empty folder, so that no config.json of the project is found."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def content(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def refused(arguments: list[str], capsys, *, stages: int = 0) -> str:
    """Run a command that must fail with code 2 and one line; return the line."""
    capsys.readouterr()
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1 + stages, err
    assert lines[-1].startswith("gradinv: ")
    assert not any(line.startswith("gradinv: ") for line in lines[:-1])
    assert "Traceback" not in err
    return lines[-1].removeprefix("gradinv: ")


# --- the commands of the project's promise, with fewer iterations -----------------


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (
            "--num-clients 3 --samples-per-client 1 --iterations 3 --log-every 2"
            " --reconstruct-mode per-client --restarts 3",
            ["client_0", "client_1", "client_2"],
        ),
        (
            "--num-clients 2 --samples-per-client 2 --client-indices 1,5,42,100"
            " --iterations 1",
            ["client_0", "client_1"],
        ),
        (
            "--num-clients 2 --reconstruct-mode both --iterations 1 --restarts 1",
            ["client_0", "client_1", "aggregate"],
        ),
        (
            "--num-clients 2 --reconstruct-mode aggregated --tv-weight 1e-3"
            " --normalize-gradients --init-scale 0.05 --iterations 1 --restarts 2",
            ["aggregate"],
        ),
        (
            "--num-clients 2 --reconstruct-mode aggregated --apply-agg-step"
            " --agg-lr 0.05 --iterations 1 --restarts 1",
            ["aggregate"],
        ),
    ],
)
def test_promised_commands(line: str, names: list[str], elsewhere, capsys) -> None:
    assert cli.run(["invert", *line.split(), "--no-judge"]) == 0
    out, _ = capsys.readouterr()
    folder = elsewhere / "outputs/invert"
    expected = {pattern.format(name) for name in names for pattern in PER_UPDATE}
    expected |= {"summary.png", "run.json"}
    assert content(folder) == expected
    assert str(Path("outputs/invert")) in out
    for name in (*names, *expected):
        assert name in out
    record = json.loads((folder / "run.json").read_text())
    assert record["options"]["dataset"] == "photos"
    assert list(record["results"]) == names
    words = line.split()
    for word, value in itertools.pairwise(words):
        if word.startswith("--") and not value.startswith("--"):
            found = record["options"][word[2:].replace("-", "_")]
            if word == "--client-indices":
                assert found == record["indices"] == [1, 5, 42, 100]
            else:
                assert str(found) == value or float(found) == float(value)
    assert record["options"]["normalize_gradients"] == ("--normalize-gradients" in line)
    assert record["options"]["apply_agg_step"] == ("--apply-agg-step" in line)


def test_judge_is_trained_on_request(elsewhere) -> None:
    assert (
        cli.run(["invert", "--dataset", "digits", *QUICK[:-1], "--output-dir", "a"])
        == 0
    )
    metrics = json.loads((elsewhere / "a/client_0_metrics.json").read_text())
    assert metrics["per_image"]["class_correct"] in ([0.0], [1.0])
    assert cli.run([*DIGITS, "--output-dir", "b"]) == 0
    metrics = json.loads((elsewhere / "b/client_0_metrics.json").read_text())
    assert metrics["per_image"]["class_correct"] is None


def test_same_seed_gives_the_same_bytes(elsewhere) -> None:
    def scores(folder: str, *more: str) -> dict[str, bytes]:
        arguments = ["--num-clients", "2", "--reconstruct-mode", "both", *more]
        assert cli.run([*DIGITS, *arguments, "--output-dir", folder]) == 0
        paths = sorted((elsewhere / folder).glob("*_metrics.json"))
        assert len(paths) == 3
        return {path.name: path.read_bytes() for path in paths}

    first = scores("a", "--seed", "3")
    assert scores("b", "--seed", "3") == first
    assert scores("c", "--seed", "3", "--dummy-seed", "3") == first
    assert scores("d", "--seed", "3", "--dummy-seed", "4") != first
    assert scores("e", "--seed", "4", "--dummy-seed", "3") != first
    loss = (elsewhere / "a/client_0_loss.json").read_bytes()
    assert (elsewhere / "b/client_0_loss.json").read_bytes() == loss
    picture = (elsewhere / "a/client_0.png").read_bytes()
    assert (elsewhere / "b/client_0.png").read_bytes() == picture


def test_an_existing_folder_is_used_again(elsewhere) -> None:
    (elsewhere / "out").mkdir()
    (elsewhere / "out/mine.txt").write_text("kept")
    for _ in range(2):
        assert cli.run([*DIGITS, "--output-dir", "out"]) == 0
    assert (elsewhere / "out/mine.txt").read_text() == "kept"


def test_log_every_counts_the_frames(elsewhere) -> None:
    from PIL import Image

    def frames(log_every: str) -> int:
        more = ["--iterations", "6", "--log-every", log_every, "--attack", "dlg"]
        assert cli.run([*DIGITS, *more, "--output-dir", "a"]) == 0
        with Image.open(elsewhere / "a/client_0.gif") as film:
            return film.n_frames

    assert frames("1") > frames("3")


def test_settings_of_the_config_file(elsewhere) -> None:
    settings = {
        "seed": 4,
        "dataset": "digits",
        "invert": {"num_clients": 2, "model": "mlp", "output_dir": "mine"},
    }
    (elsewhere / "own.json").write_text(json.dumps(settings))
    assert cli.run(["invert", "--config", "own.json", *QUICK]) == 0
    record = json.loads((elsewhere / "mine/run.json").read_text())["options"]
    assert (record["seed"], record["dataset"], record["model"]) == (4, "digits", "mlp")
    assert record["num_clients"] == 2
    assert record["dummy_seed"] == 4
    # An option on the line wins, zero and negations included.
    more = ["--seed", "0", "--num-clients", "1", "--model", "lenet"]
    assert cli.run(["invert", "--config", "own.json", *QUICK, *more]) == 0
    record = json.loads((elsewhere / "mine/run.json").read_text())["options"]
    assert (record["seed"], record["num_clients"], record["model"]) == (0, 1, "lenet")


def test_negations_win_over_the_config_file(elsewhere) -> None:
    group = {"normalize_gradients": True, "apply_agg_step": True}
    (elsewhere / "own.json").write_text(json.dumps({"invert": group}))
    line = [*DIGITS, "--config", "own.json", "--output-dir", "a"]
    assert cli.run(line) == 0
    record = json.loads((elsewhere / "a/run.json").read_text())["options"]
    assert record["normalize_gradients"] and record["apply_agg_step"]
    assert cli.run([*line, "--no-normalize-gradients", "--no-apply-agg-step"]) == 0
    record = json.loads((elsewhere / "a/run.json").read_text())["options"]
    assert not record["normalize_gradients"] and not record["apply_agg_step"]


# --- train-global -----------------------------------------------------------------

TRAIN = ["train-global", "--epochs", "1", "--model", "mlp"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_train_then_attack(suffix: str, elsewhere, capsys) -> None:
    output = f"made/here/global{suffix}"
    assert cli.run([*TRAIN, "--output", output]) == 0
    out, _ = capsys.readouterr()
    assert re.search(r"accuracy 0\.\d{3} on train, 0\.\d{3} on test", out)
    assert content(elsewhere) == {output, "made/here/global.json"}
    assert f"global{suffix}" in out and "global.json" in out
    record = json.loads((elsewhere / "made/here/global.json").read_text())
    assert record["accuracy"]["test"] > 0.5
    more = ["--model-checkpoint", output, "--output-dir", "out", "--seed", "5"]
    assert cli.run([*DIGITS, *more]) == 0
    run = json.loads((elsewhere / "out/run.json").read_text())
    assert run["options"]["model_checkpoint"] == output
    assert cli.run([*DIGITS, "--output-dir", "untrained", "--seed", "5"]) == 0
    trained, untrained = (
        (elsewhere / folder / "client_0_loss.json").read_text()
        for folder in ("out", "untrained")
    )
    assert trained != untrained


def test_train_writes_below_the_output_folder(elsewhere) -> None:
    assert cli.run([*TRAIN, "--output-dir", "out", "--output", "a.safetensors"]) == 0
    assert content(elsewhere) == {"out/a.safetensors", "out/a.json"}
    _, info = load_checkpoint(elsewhere / "out/a.safetensors")
    assert info == ModelInfo("mlp", in_channels=1, image_size=8, num_classes=10)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--epochs", "0"], "--epochs: expected an integer of at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size: expected an integer of at least 1"),
        (["--lr", "0"], "--lr: expected a finite number > 0, got 0"),
        (["--lr", "nan"], "--lr: expected a finite number > 0, got nan"),
        (["--model", "vgg"], "--model: expected one of lenet, mlp, convnet, resnet18"),
        (["--dataset", "digit"], "--dataset: expected one of .*did you mean 'digits'"),
        (["--output", "a.bin"], "checkpoint: expected a file name ending in"),
        (["--output", "a"], "checkpoint: expected a file name ending in"),
        (["--device", "abacus"], "--device: expected one of auto, cpu, cuda, mps"),
        (["--seed", "-4"], "--seed: expected an integer of at least 0, got -4"),
        (["--epochs", "two"], "Invalid value for '--epochs': 'two'"),
        (["--epoch", "2"], "No such option"),
    ],
)
def test_bad_training(more: list[str], line: str, elsewhere, capsys) -> None:
    assert re.match(line, refused([*TRAIN, *more], capsys))
    assert content(elsewhere) == set()
    assert list(elsewhere.iterdir()) == []


def test_training_into_a_file(elsewhere, capsys) -> None:
    (elsewhere / "file").write_text("x")
    line = refused([*TRAIN, "--output", "file/global.pth"], capsys)
    assert line.startswith("--output: expected a folder that can be written to")
    assert (elsewhere / "file").read_text() == "x"


# --- bad input --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--dataset", "mnits"], "--dataset: expected one of .*did you mean 'mnist'"),
        (["--model", "lenett"], "--model: .*got 'lenett'; did you mean 'lenet'"),
        (["--attack", "dgl"], "--attack: expected one of auto, dlg, idlg.*, got 'dgl'"),
        (["--device", "gpu"], "--device: expected one of auto, cpu, cuda, mps"),
        (["--reconstruct-mode", "all"], "--reconstruct-mode: expected one of per-cl"),
        (["--num-clients", "361"], "--num-clients: expected at most 360 images"),
        (["--samples-per-client", "1000"], "--num-clients: expected at most 360 imag"),
        (["--client-indices", "360"], r"--client-indices: .*0 to 359, got \[360\]"),
        (["--client-indices", "-1"], r"--client-indices: .*0 to 359, got \[-1\]"),
        (
            ["--client-indices", "4,4", "--num-clients", "2"],
            r"--client-indices: expected different indices, got \[4\] twice",
        ),
        (
            ["--client-indices", "4", "--num-clients", "2"],
            "--client-indices: expected 2 indices .* got 1",
        ),
        (["--client-indices", "1,x"], "--client-indices: expected integers .*'1,x'"),
        (["--client-indices", ""], "--client-indices: expected integers with commas"),
        (["--client-indices", "1,,2"], "--client-indices: expected integers"),
        (["--num-clients", "0"], "--num-clients: expected an integer of at least 1"),
        (["--num-clients", "-3"], "--num-clients: expected an integer of at least 1"),
        (["--samples-per-client", "0"], "--samples-per-client: expected an integer"),
        (["--iterations", "0"], "--iterations: expected an integer of at least 1"),
        (["--restarts", "-1"], "--restarts: expected an integer of at least 1"),
        (["--log-every", "0"], "--log-every: expected an integer of at least 1"),
        (["--seed", "-1"], "--seed: expected an integer of at least 0, got -1"),
        (["--seed", "99999999999"], "--seed: expected an integer of at most"),
        (["--dummy-seed", "-1"], "--dummy-seed: expected an integer of at least 0"),
        (["--tv-weight", "-1"], "--tv-weight: expected a finite number >= 0"),
        (["--tv-weight", "nan"], "--tv-weight: expected a finite number >= 0, got nan"),
        (["--init-scale", "inf"], "--init-scale: expected a finite number >= 0"),
        (["--agg-lr", "0"], "--agg-lr: expected a finite number > 0, got 0"),
        (["--num-clients", "two"], "Invalid value for '--num-clients': 'two'"),
        (["--iterations", "1.5"], "Invalid value for '--iterations': '1.5'"),
        (["--clients", "2"], "No such option"),
        (["--seed"], "Option '--seed' requires an argument"),
        (["surplus"], "Got unexpected extra argument"),
        (["--config", "none.json"], "--config: expected a JSON file .* no file"),
        (["--attack", "idlg", "--samples-per-client", "2"], "update: expected an upd"),
        (["--model-checkpoint", "no.pth"], "checkpoint: expected an existing file"),
        (["--model-checkpoint", "no"], "checkpoint: expected a file name ending in"),
        (["--dataset", "folder"], "--data-root: expected a folder"),
        (["--dataset", "folder", "--data-root", "no"], "--data-root: expected"),
    ],
)
def test_bad_input(more: list[str], line: str, elsewhere, capsys) -> None:
    stages = 1 if more[:2] == ["--attack", "idlg"] else 0
    found = refused([*DIGITS, *more], capsys, stages=stages)
    assert re.match(line, found), found
    assert content(elsewhere) == set()
    if not stages:
        assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"seed": 1,\n "sed": 2}', "own.json line 2, sed: expected a known key"),
        ('{"invert": {\n"iterations":\n "many"}}', "own.json line 2, invert.iteratio"),
        ('{"seed": 1', "own.json line 1, column .*: expected JSON, got a syntax error"),
        ('{"seed": -1}', "own.json line 1, seed: expected a number greater than"),
        ("[]", r"own.json: expected a JSON object"),
        ('{"invert": {"model": "vgg"}}', "--model: expected one of"),
    ],
)
def test_malformed_config(text: str, line: str, elsewhere, capsys) -> None:
    (elsewhere / "own.json").write_text(text)
    found = refused([*DIGITS, "--config", "own.json"], capsys)
    assert re.match(line, found), found
    assert content(elsewhere) == {"own.json"}


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def checkpoint(path: Path, change) -> None:
    info = ModelInfo("lenet", in_channels=1, image_size=8, num_classes=10)
    model = build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    save_checkpoint(path, model, info)
    whole = torch.load(path, weights_only=True)
    change(whole["state_dict"])
    torch.save(whole, path)


def test_hostile_and_damaged_checkpoints(elsewhere, tmp_path: Path, capsys) -> None:
    marker = tmp_path / "marker"
    torch.save({"0.weight": Bomb(str(marker))}, elsewhere / "hostile.pth")
    (elsewhere / "plain.pth").write_bytes(pickle.dumps(Bomb(str(marker))))
    (elsewhere / "empty.safetensors").write_bytes(b"")
    (elsewhere / "noise.safetensors").write_bytes(os.urandom(500))
    checkpoint(elsewhere / "nan.pth", lambda s: s["0.bias"].fill_(float("nan")))
    checkpoint(elsewhere / "short.pth", lambda s: s.update({"0.bias": torch.ones(3)}))
    checkpoint(elsewhere / "less.pth", lambda s: s.pop("0.bias"))
    whole = (elsewhere / "less.pth").read_bytes()
    (elsewhere / "half.pth").write_bytes(whole[: len(whole) // 2])
    before = content(elsewhere)
    for name in sorted(before):
        line = refused([*DIGITS, "--model-checkpoint", name], capsys)
        assert line.startswith("checkpoint: expected"), line
        assert name in line
    assert "can run code, so it was not opened" in refused(
        [*DIGITS, "--model-checkpoint", "hostile.pth"], capsys
    )
    assert "0.bias has NaN" in refused(
        [*DIGITS, "--model-checkpoint", "nan.pth"], capsys
    )
    assert not marker.exists()
    assert content(elsewhere) == before
    assert not (elsewhere / "outputs").exists()


def test_nan_in_an_update(elsewhere, capsys) -> None:
    """Weights that overflow in the forward pass give an update of NaN."""
    checkpoint(elsewhere / "big.pth", lambda s: s["7.weight"].fill_(3e38))
    line = refused([*DIGITS, "--model-checkpoint", "big.pth"], capsys)
    assert "expected finite numbers" in line
    assert content(elsewhere) == {"big.pth"}


def test_checkpoint_for_other_images(elsewhere, capsys) -> None:
    checkpoint(elsewhere / "grey.pth", lambda s: None)
    line = refused(["invert", *QUICK, "--model-checkpoint", "grey.pth"], capsys)
    assert line.startswith("--model-checkpoint: expected a model for 3 x 32 x 32 imag")


# --- folders ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_unwritable_folder(name: str, elsewhere, capsys) -> None:
    (elsewhere / "file").write_text("x")
    line = refused([*DIGITS, "--output-dir", name], capsys)
    assert line.startswith("--output-dir: expected a folder that can be written to")
    assert content(elsewhere) == {"file"}
    assert (elsewhere / "file").read_text() == "x"


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_from_the_start(elsewhere, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused([*DIGITS, "--output-dir", "out"], capsys)
    assert line.startswith("--output-dir: ")
    assert "No space left on device" in line and "free some space" in line
    assert content(elsewhere) == set()


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_disk_full_in_the_middle(after: int, elsewhere, monkeypatch, capsys) -> None:
    original, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) > after:
            full()
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    line = refused([*DIGITS, "--output-dir", "out"], capsys, stages=1)
    assert "No space left on device" in line
    kept = content(elsewhere / "out")
    assert len(kept) == after
    assert not [name for name in kept if name.startswith(".")]


def test_disk_full_while_saving_a_checkpoint(elsewhere, monkeypatch, capsys) -> None:
    for suffix in (".pth", ".safetensors"):
        monkeypatch.setattr(os, "replace", full)
        line = refused([*TRAIN, "--output", f"out/a{suffix}"], capsys)
        assert "No space left on device" in line
        assert content(elsewhere) == set()


# --- Ctrl-C -----------------------------------------------------------------------


def test_interrupt_before_there_is_a_result(elsewhere, monkeypatch, capsys) -> None:
    from gradinv_helpers import experiment

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "local_update", stop)
    assert cli.run([*DIGITS, "--output-dir", "out"]) == 130
    assert capsys.readouterr() == ("", "gradinv: interrupted\n")
    assert content(elsewhere) == set()


def test_interrupt_in_the_attack_keeps_the_best(elsewhere, monkeypatch, capsys) -> None:
    from gradinv_helpers import experiment

    original = experiment.invert_clients

    def stop(step) -> None:
        if step.iteration >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        experiment,
        "invert_clients",
        lambda updates, *, on_step, **settings: original(
            updates, on_step=stop, **settings
        ),
    )
    arguments = [*DIGITS, "--iterations", "50", "--attack", "dlg", "--num-clients", "2"]
    assert cli.run([*arguments, "--output-dir", "out"]) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("gradinv: interrupted; the best so far")
    assert "Traceback" not in err
    names = {p.format(f"client_{k}") for k in range(2) for p in PER_UPDATE}
    names |= {"summary.png", "run.json"}
    kept = "clients.checkpoint.safetensors"
    assert content(elsewhere / "out") == names | {kept}
    assert json.loads((elsewhere / "out/run.json").read_text())["interrupted"] is True
    assert "client_1" in out

    monkeypatch.setattr(experiment, "invert_clients", original)
    arguments[arguments.index("50")] = "5"
    assert cli.run([*arguments, "--output-dir", "out", "--resume"]) == 0
    assert content(elsewhere / "out") == names


def test_a_real_interrupt(elsewhere) -> None:
    """SIGINT to a running process, as Ctrl-C sends it."""
    code = """
import signal, sys
from gradinv_helpers.attacks import search
from gradinv_helpers.cli import main

original = search.Step


def tell(**fields):
    print("a step", file=sys.stderr, flush=True)
    return original(**fields)


search.Step = tell
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    arguments = "invert --samples-per-client 8 --restarts 2 --attack dlg --no-judge"
    arguments += " --output-dir out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments.split()],
        cwd=elsewhere,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.startswith("inverting the updates")
    while process.stderr.readline() != "a step\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("gradinv: interrupted")
    names = {pattern.format("client_0") for pattern in PER_UPDATE}
    kept = {"summary.png", "run.json", "clients.checkpoint.safetensors"}
    assert content(elsewhere / "out") == names | kept
    metrics = json.loads((elsewhere / "out/client_0_metrics.json").read_text())
    assert metrics["stopped"] == "interrupted"


# --- other exits ------------------------------------------------------------------


def test_help_of_the_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradinv_helpers", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "invert" in done.stdout and "train-global" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["invert", "--help"]])
def test_help(arguments: list[str], capsys) -> None:
    assert cli.run(arguments) == 0
    assert "Usage: gradinv" in capsys.readouterr().out


def test_every_option_of_the_design_is_there() -> None:
    group = typer.main.get_command(cli.app)
    wanted = {
        "invert": """--num-clients --samples-per-client --client-indices --iterations
        --log-every --reconstruct-mode --restarts --dummy-seed --normalize-gradients
        --tv-weight --init-scale --apply-agg-step --agg-lr --model --attack""",
        "train-global": "--epochs --batch-size --lr --output",
    }
    common = "--config --dataset --data-root --device --seed --output-dir"
    for name, options in wanted.items():
        params = group.commands[name].params
        found = {option for param in params for option in param.opts}
        assert set(f"{options} {common}".split()) <= found
        assert all(param.help for param in params)
    helped = {o: p.help for p in group.commands["invert"].params for o in p.opts}
    assert all(name in helped["--dataset"] for name in DATASETS)


@pytest.mark.parametrize("arguments", [["inver"], ["audit"], ["--verbose"]])
def test_unknown_commands(arguments: list[str], capsys) -> None:
    assert "No such" in refused(arguments, capsys)


def test_other_errors_are_not_hidden(monkeypatch) -> None:
    """Exit code 1 with a traceback: a bug is no bad input."""
    from gradinv_helpers import experiment

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(experiment, "local_update", broken)
    with pytest.raises(ZeroDivisionError):
        cli.run([*DIGITS, "--output-dir", "out"])


def test_main_exits_with_the_code(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gradinv", "invert", "--restarts", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--restarts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("num_clients", "--num-clients: expected a, got b"),
        ("update", "update: expected a, got b"),
        ("config.json line 3, seed", "config.json line 3, seed: expected a, got b"),
    ],
)
def test_only_options_are_written_as_options(argument: str, expected: str) -> None:
    assert cli._with_option(InputError(argument, "a", "b")) == expected


# --- data sets from files ---------------------------------------------------------


def write_cifar100(root: Path) -> None:
    """A small file with the names, keys and pickle protocol of the published one."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("test", 3)):
        batch = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [i % 3 for i in range(count)],
            "coarse_labels": [0] * count,
            "batch_label": "small",
            "filenames": [f"{i}.png" for i in range(count)],
        }
        content = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    names = {"fine_label_names": ["apple", "bear", "cup"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))


@pytest.fixture
def no_network(monkeypatch) -> None:
    from torchvision.datasets import cifar

    def fail(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)


def test_cifar100_from_a_folder(elsewhere, no_network) -> None:
    write_cifar100(elsewhere / "data")
    arguments = ["--dataset", "cifar100", "--data-root", "data", "--num-clients", "2"]
    assert cli.run(["invert", *QUICK, *arguments, "--output-dir", "out"]) == 0
    metrics = json.loads((elsewhere / "out/client_1_metrics.json").read_text())
    assert metrics["true_labels"] == [1]
    assert {p.format("client_1") for p in PER_UPDATE} <= content(elsewhere / "out")


def test_cifar100_as_a_setting(elsewhere, no_network) -> None:
    write_cifar100(elsewhere / "data")
    settings = {"dataset": "cifar100", "data_root": "data"}
    (elsewhere / "own.json").write_text(json.dumps(settings))
    assert cli.run(["invert", *QUICK, "--config", "own.json"]) == 0


@pytest.mark.parametrize("command", [["invert", *QUICK], TRAIN])
def test_cifar100_without_network_and_file(
    command, elsewhere, no_network, capsys
) -> None:
    arguments = ["--dataset", "cifar100", "--data-root", "data"]
    line = refused([*command, *arguments], capsys)
    assert line.startswith("dataset cifar100: expected")
    assert "cifar-100-python.tar.gz" in line
    assert "data" in line
    assert "photos" in line and "digits" in line
    assert content(elsewhere) == set()


def test_a_folder_of_ones_own_images(elsewhere) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (elsewhere / "pets" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(elsewhere / f"pets/{name}/{number}.png")
    arguments = ["--dataset", "folder", "--data-root", "pets", "--num-clients", "2"]
    assert cli.run(["invert", *QUICK, *arguments, "--output-dir", "out"]) == 0
    record = json.loads((elsewhere / "out/run.json").read_text())
    assert list(record["results"]) == ["client_0", "client_1"]
