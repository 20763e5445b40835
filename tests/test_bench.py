"""The suites of ``gradinv bench``: order, resuming, results, numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_helpers import cli
from gradinv_helpers.bench import (
    SUITES,
    batch,
    defences,
    diffusion,
    fedavg,
    learning_rate,
    networks,
    priors,
    privacy,
    runner,
    single,
    suite,
    table1,
    trained,
    trials,
    wall,
)
from gradinv_helpers.bench import labels as label_suite
from gradinv_helpers.bench.results import main as rewrite
from gradinv_helpers.bench.results import read_result
from gradinv_helpers.bench.runner import BenchOptions, run_bench
from gradinv_helpers.bench.suite import Report, Setting, Suite, Task
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.plots import bars

SCHEMA = {
    "type": "object",
    "required": [
        "suite",
        "command",
        "options",
        "machine",
        "versions",
        "notes",
        "complete",
        "summary",
        "records",
    ],
    "additionalProperties": False,
    "properties": {
        "suite": {"enum": list(SUITES)},
        "command": {"type": "string", "pattern": "^gradinv bench --suite "},
        "options": {"type": "object", "required": ["dataset", "seed", "quick"]},
        "machine": {
            "type": "object",
            "required": ["cpu", "cores", "threads", "memory_gib", "device"],
            "properties": {"threads": {"const": 1}},
        },
        "versions": {"type": "object", "required": ["torch", "python"]},
        "notes": {"type": "object", "required": ["images_sha256"]},
        "complete": {"const": True},
        "summary": {"type": "object", "minProperties": 1},
        "shared": {"type": "array", "minItems": 1},
        "records": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["key"]},
        },
    },
}


def options(folder: Path, name: str = "single", **more) -> BenchOptions:
    usual = {"dataset": "digits", "data_root": None, "device": "cpu", "seed": 0}
    return BenchOptions(suite=name, output_dir=str(folder), **usual | more)


def setting(folder: Path, numbers: dict[str, int], **more) -> Setting:
    usual = {"dataset": "digits", "data_root": None, "seed": 0, "quick": True}
    device = torch.device("cpu")
    return Setting(numbers=numbers, device=device, folder=folder, **usual | more)


# --- every suite, on its smallest cases -------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_quick_suite(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    grown = {"peak_mib": 2.0, "grown_mib": 1.0}
    monkeypatch.setattr(  # measured below, in a process of its own
        trials,
        "_peak",
        lambda setting, count, method, iterations: {
            "what": "memory",
            "trials": count,
            "method": method,
            **grown,
        },
    )
    arguments = ["bench", "--suite", name, "--dataset", "digits", "--quick"]
    threads = torch.get_num_threads()
    code = cli.run([*arguments, "--device", "cpu", "--output-dir", str(tmp_path)])
    assert code == 0
    assert torch.get_num_threads() == threads
    out, _ = capsys.readouterr()
    made = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert made == {f"{name}_digits_quick{end}" for end in (".json", ".md", ".png")}
    assert all(file in out for file in made)
    text = (tmp_path / f"{name}_digits_quick.json").read_text()
    jsonschema.validate(json.loads(text), SCHEMA)
    result = read_result(tmp_path / f"{name}_digits_quick.json")
    assert str(tmp_path) not in text
    keys = [record["key"] for record in result["records"]]
    assert len(set(keys)) == len(keys)
    page = (tmp_path / f"{name}_digits_quick.md").read_text()
    assert result["command"] in page
    assert page.count("| --- |") >= 1
    assert (tmp_path / f"{name}_digits_quick.png").read_bytes()[:4] == b"\x89PNG"
    CHECKS[name](result)


def check_single(result: dict) -> None:
    cases = {(c["noise"], c["method"]): c for c in result["summary"]["cases"]}
    assert set(cases) == {(0, single.RECIPE), (0, "auto")} | {
        (single.NOISE, method) for method in single.METHODS
    }
    exact = cases[0, "auto"]
    assert exact["above_target"] == exact["images"] == exact["labels_right"] == 2
    assert exact["psnr"]["min"] > exact["floors"]["constant"] + 20
    assert exact["recipe_seconds_over_ours"]["pairs"] == 1
    for record in result["records"]:
        if record["psnr"] is not None:
            assert set(record["floors"]) == {"constant", "random_image"}
            assert record["seconds"] > 0


def check_trials(result: dict) -> None:
    cases = result["summary"]["cases"]
    assert [case["trials"] for case in cases] == [1, 4]
    for case in cases:
        spent = case["evaluations_per_trial"]
        assert spent[trials.LOOP] == pytest.approx(spent[trials.OURS], rel=0.3)
        assert case["attack_ratio"]["value"] > 0
        assert case["attack_ratio_all_cores"]["value"] > 0
    assert cases[1]["memory_grown_mib"] == {trials.LOOP: 1.0, trials.OURS: 1.0}
    assert cases[0]["memory_grown_mib"] == {trials.LOOP: None, trials.OURS: None}


def check_labels(result: dict) -> None:
    for record in result["records"]:
        assert label_suite.GUESS in record["methods"]
        assert label_suite.PUBLISHED_UNIQUE in record["methods"]
        one = label_suite.PUBLISHED_ONE in record["methods"]
        assert one == (record["samples"] == 1)
        for found in record["methods"].values():
            assert 0 <= found["exact"] <= found["answered"] <= 1
            assert (found["right"] is None) == (found["answered"] == 0)
            if found["right"]:
                assert 0 <= found["right"]["value"] <= 1
    alone = [r for r in result["records"] if r["samples"] == 1]
    assert alone
    for record in alone:
        best = max(m["exact"] for m in record["methods"].values())
        assert best == 1
        assert record["methods"][label_suite.GUESS]["exact"] < 1


def check_table1(result: dict) -> None:
    cells = result["summary"]["cells"]
    ours = [(c["model"], c["stage"]) for c in cells if c["source"] == table1.OURS]
    assert ours == list(table1.BETTER_IN_THE_PAPER)
    published = [c for c in cells if c["source"] == table1.PUBLISHED]
    assert [c["model"] for c in published] == ["lenet", "lenet"]
    for cell in cells:
        assert set(cell["floors"]) == {"constant", "random_image"}
        assert cell["direction_agrees"] == "undecided"  # a single pair decides nothing
    assert {"lenet, trained", "resnet20, trained"} == set(result["notes"]["models"])


def check_networks(result: dict) -> None:
    cases = result["summary"]["cases"]
    assert [(c["mode"], c["attack"], c["batch_size"]) for c in cases] == [
        (networks.SENT, attack, size)
        for attack in (networks.MOMENTS, networks.MAP)
        for size in (1, 2)
    ]
    for case in cases:
        found = [r for r in result["records"] if r["batch_size"] == case["batch_size"]]
        assert all(len(r["psnr"]) == case["batch_size"] for r in found)
        gain = case["psnr"]["value"] - case["floor"]["value"]
        assert case["gain"]["value"] == pytest.approx(gain, abs=1e-3)
        assert case["labels_right"] == case["batch_size"]
    both = [r for r in result["records"] if r["batch_size"] == 2]
    assert both[0]["labels_alone"] == both[1]["labels_alone"]  # and no gradient
    assert "batch_mean" in both[0]["floors"]
    assert 0 <= result["notes"]["models"]["convnet-bn, 1 epoch"]["test_accuracy"] <= 1


def check_batch(result: dict) -> None:
    cases = result["summary"]["cases"]
    methods = (batch.OURS, batch.BY_LBFGS, *batch.OTHERS.values())
    assert [(c["batch_size"], c["method"]) for c in cases] == [
        (size, method) for size in (2, 3) for method in methods
    ]
    for case in cases:
        assert case["batches"] == 1
        assert case["labels_right"] == case["batch_size"]
        assert 0 <= case["identified_share"] <= 1
        assert case["target"] == batch.TARGETS[case["batch_size"]]
        assert case["median_psnr_95"] == [None, None]  # one batch has no spread
        if case["method"] in methods[:2]:  # three iterations are worth something
            assert case["median_psnr"] > case["floor"] + 3
    for record in result["records"]:
        assert len(record["psnr"]) == record["batch_size"]
        assert set(record["floors"]) == {"constant", "random_image", "batch_mean"}
        assert record["candidates"] > 100
        assert ("misfit" in record) == (record["method"] in methods[:2])


def check_wall(result: dict) -> None:
    summary = result["summary"]
    assert {case["architecture"] for case in summary["cases"]} == set(
        wall._QUICK_ARCHITECTURES
    )
    for case in summary["cases"]:
        assert 0 < case["rank"] <= case["unknowns"]
        share = case["rank"] / case["unknowns"]
        assert case["rank_per_unknown"] == pytest.approx(share, abs=1e-5)
        if wall.ARCHITECTURES[case["architecture"]].smooth:
            assert case["counted"] == pytest.approx(case["rank"], rel=0.1)
    for case in summary["rounding"]:
        assert 0 < case["determined"] <= case["rank"] <= case["unknowns"]
    assert summary["large_images"] == []
    assert {case["batch_size"] for case in summary["attacks"]} == {1, 2}
    for case in summary["attacks"]:
        gain = case["psnr"] - case["floor"]
        assert case["gain"]["value"] == pytest.approx(gain, abs=1e-3)


def check_fedavg(result: dict) -> None:
    cases = result["summary"]["cases"]
    assert [case["order"] for case in cases] == [fedavg.KNOWN, fedavg.UNKNOWN]
    for case, wanted in zip(cases, fedavg.QUICK_CASES, strict=True):
        assert {name: case[name] for name in wanted.facts} == wanted.facts
        assert case["labels"] == wanted.images
        gain = case["psnr"]["value"] - case["floor"]["value"]
        assert case["gain"]["value"] == pytest.approx(gain, abs=1e-3)
        assert 0 < case["misfit"]["median"] < 1
    assert cases[0]["labels_right"] == 2  # they are given
    for record in result["records"]:
        assert len(record["psnr"]) == record["images"]
        assert set(record["floors"]) == {"constant", "random_image", "batch_mean"}


def check_priors(result: dict) -> None:
    summaries = result["summary"]["cases"]
    for case, methods in priors.cases(quick=True):
        ours = [s for s in summaries if case.facts.items() <= s.items()]
        assert [s["method"] for s in ours] == [*priors.GUESSES, *methods]
        guesses = ours[: len(priors.GUESSES)]
        for summary in ours:
            assert summary["floor"] >= max(g["psnr"]["value"] for g in guesses) - 1e-3
            gain = summary["psnr"]["value"] - summary["floor"]
            assert summary["gain"]["value"] == pytest.approx(gain, abs=1e-3)
            assert summary["identified_by_chance"] == pytest.approx(1 / 360, rel=0.01)
            told = summary["method"] == priors.SOFT and case.noise > 0
            assert (summary["bits_per_image"] is not None) == told
    for record in result["records"]:
        assert len(record["psnr"]) == record["images"] == record["labels_right"]
        if record["method"] == priors.SPECTRUM:  # one iteration is worth something
            assert min(record["psnr"]) > max(map(max, record["floors"].values()))
    assert result["notes"]["models"]["convnet, trained"]["victims_unseen"]


def check_diffusion(result: dict) -> None:
    summaries = result["summary"]["cases"]
    for part in diffusion.QUICK_PARTS:
        ours = [s for s in summaries if s["part"] == part.name]
        expected = [(c.method, c.setting) for c in part.all]
        assert [(s["method"], s["setting"]) for s in ours] == expected
        guesses = [s["psnr"]["value"] for s in ours if s["method"] == "class mean"]
        for summary in ours:
            assert summary["floor"] >= max(guesses) - 1e-3
            gain = summary["psnr"]["value"] - summary["floor"]
            assert summary["gain"]["value"] == pytest.approx(gain, abs=1e-3)
    for record in result["records"]:
        right = 0 if record["labels"] == diffusion.WRONG else record["images"]
        assert record["labels_right"] == right
        assert len(record["psnr"]) == len(record["mse"]) == record["images"]
        assert ("misfit" in record) == (
            record["method"] not in (*diffusion.GUESSES, diffusion.MISLED)
        )
    assert result["notes"]["models"]["convnet, trained"]["victims_unseen"]


def check_privacy(result: dict) -> None:
    summary = result["summary"]
    assert set(summary) == {"price", "leak", "bound"}
    assert [c["noise"] for c in summary["price"]] == list(privacy.QUICK_NOISES)
    for case in summary["leak"]:
        assert case["images"] in privacy.QUICK_BATCHES
        assert set(case["methods"]) >= {privacy.VAE, privacy.NAIVE}
    for case in summary["bound"]:
        assert case["guess"] < case["bound"] <= 1


def check_defences(result: dict) -> None:
    cases = {(c["defence"], c["images"]): c for c in result["summary"]["cases"]}
    assert set(cases) == {
        (case.name, count)
        for case in defences.QUICK_CASES
        for count in defences.QUICK_BATCHES
        if count >= case.smallest
    }
    for (name, count), case in cases.items():
        assert case["attacks"]["adaptive"]["of"] == count
        assert ("naive" in case["attacks"]) == (name != "none")
        assert 0 <= case["accuracy"]["value"] <= 1
    assert cases["signs", 1]["bytes"] < cases["none", 1]["bytes"] / 30


def check_secagg(result: dict) -> None:
    summary = result["summary"]
    for case in summary["costs"]:
        assert case["exact"] == case["runs"] == 3
        assert 1 < case["over_paper"] < 1.1
    assert [case["clients"] for case in summary["leaks"]] == [1, 2]
    for case in summary["leaks"]:
        gain = case["psnr"]["value"] - case["floor"]["value"]
        assert case["gain"]["value"] == pytest.approx(gain, abs=1e-3)
        assert (
            case["difference"]["value"] > 60
        )  # the closed form, whatever the sum hides


def check_heterogeneity(result: dict) -> None:
    runs = {case["scheme"]: case for case in result["summary"]["accuracy"]}
    assert set(runs) == {"centralised", "iid", "alpha 0.1"}
    for record in result["records"]:
        assert all(0 <= value <= 1 for value in record.get("accuracy", []))
    assert result["summary"]["proportions"]
    assert result["summary"]["images"]


def check_learning_rate(result: dict) -> None:
    records = result["records"]
    assert {r["what"] for r in records} == {
        learning_rate.FAST,
        learning_rate.REFINED,
        learning_rate.SEEN,
    }
    one_step = {"images": 1, "epochs": 1, "network": learning_rate.LENET}
    (exact,) = suite.chosen(records, what=learning_rate.FAST, **one_step)
    assert exact["error"] < 1e-3
    assert exact["labels_right"]
    assert len(result["summary"]["cases"]) == len(learning_rate.QUICK_CASES)
    (seen,) = result["summary"]["seen"]
    rates = (learning_rate.TRUE, learning_rate.FOUND, learning_rate.TWICE)
    assert set(seen["psnr"]) == set(rates)


CHECKS: dict[str, Callable[[dict], None]] = {
    "single": check_single,
    "trials": check_trials,
    "labels": check_labels,
    "table1": check_table1,
    "networks": check_networks,
    "batch": check_batch,
    "wall": check_wall,
    "fedavg": check_fedavg,
    "learning-rate": check_learning_rate,
    "priors": check_priors,
    "diffusion": check_diffusion,
    "privacy": check_privacy,
    "defences": check_defences,
    "secagg": check_secagg,
    "heterogeneity": check_heterogeneity,
}


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    given = setting(tmp_path, {"repeats": 1})
    found = [trials._peak(given, 16, name, 1) for name in (trials.LOOP, trials.OURS)]
    assert all(record["peak_mib"] > 50 for record in found)
    assert all(record["grown_mib"] >= 0 for record in found)


def test_cells_of_networks_are_measured_once_and_cheap_ones_first() -> None:
    cells = networks.cases(repeats=2)
    assert len({cell.key for cell in cells}) == len(cells)
    assert cells[0].batch_size == 1
    assert (cells[-1].model, cells[-1].batch_size) == (networks.RESNET, 16)
    modes = {(c.model, c.mode) for c in cells}
    assert {mode for name, mode in modes if name == networks.RESNET} == {
        networks.SENT,
        networks.KEPT,
        networks.EVAL,
    }
    for name, mode in modes:
        own = [c for c in cells if (c.model, c.mode) == (name, mode)]
        assert {c.batch_size for c in own} == set(networks.BATCH_SIZES)


# --- order ------------------------------------------------------------------------


def test_recipe_and_ours_take_turns(tmp_path: Path) -> None:
    numbers = {"images": 6, "recipe_images": 3, "noise_images": 2}
    keys = [task.key for task in single._tasks(setting(tmp_path, numbers))]
    recipe, auto = f"noise 0, {single.RECIPE}, image ", "noise 0, auto, image "
    clean = [key for key in keys if key.startswith("noise 0,")]
    expected = []
    for image in range(6):
        expected += [f"{recipe}{image}"] * (image % 2 == 0) + [f"{auto}{image}"]
    assert clean == expected
    noisy = keys[len(clean) :]
    assert noisy == [
        f"noise 0.001, {method}, image {image}"
        for image in (0, 3)
        for method in single.METHODS
    ]


def test_table1_alternates_recipes_and_ours(tmp_path: Path) -> None:
    numbers = {"images": 2, "iterations": 20}
    keys = [task.key for task in table1._tasks(setting(tmp_path, numbers))]
    of_lenet = [key for key in keys if key.startswith("lenet, untrained")]
    sources = [key.split(", ")[-2] for key in of_lenet]
    assert sources == [table1.PUBLISHED, table1.OURS] * 4
    assert [key.split(", ")[-1] for key in of_lenet] == ["0"] * 4 + ["1"] * 4


# --- resuming ---------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """A suite of four measurements that writes down which of them it takes."""
    taken: list[str] = []

    def run(key: str) -> dict:
        if key == "c" and "stop" in taken:
            taken.remove("stop")
            raise KeyboardInterrupt
        taken.append(key)
        return {"value": float(ord(key)), "bad": math.nan}

    def report(records, setting: Setting) -> Report:
        total = sum(record["value"] for record in records)
        return Report({"total": total}, "| a |", bars({"x": total}, xlabel="x"))

    fake = Suite(
        numbers={"images": 3},
        quick={"images": 1},
        tasks=lambda given: [Task(k, lambda k=k: run(k)) for k in "abcd"],
        report=report,
    )
    monkeypatch.setattr(runner, "_suite", lambda name: fake)
    return taken


def test_interrupted_run_goes_on(tmp_path: Path, counted, capsys) -> None:
    counted.append("stop")
    arguments = ["bench", "--suite", "single", "--dataset", "digits"]
    arguments += ["--device", "cpu", "--output-dir", str(tmp_path)]
    assert cli.run(arguments) == 130
    message = "gradinv: interrupted; the same command goes on from here"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert counted == ["a", "b"]
    partial = tmp_path / "single_digits.partial.json"
    kept = json.loads(partial.read_text())
    assert kept["complete"] is False
    assert [record["key"] for record in kept["records"]] == ["a", "b"]
    assert {p.name for p in tmp_path.iterdir()} == {partial.name}

    assert cli.run(arguments) == 0
    assert counted == ["a", "b", "c", "d"]
    result = json.loads((tmp_path / "single_digits.json").read_text())
    assert result["complete"] is True
    assert [record["key"] for record in result["records"]] == list("abcd")
    assert [r["bad"] for r in result["records"]] == [None] * 4
    assert not partial.exists()

    assert cli.run(arguments) == 0  # a finished run is measured afresh
    assert counted == ["a", "b", "c", "d"] * 2


def test_rewritten_unfinished_run_goes_on(tmp_path: Path, counted) -> None:
    counted.append("stop")
    with pytest.raises(KeyboardInterrupt):
        run_bench(options(tmp_path))
    partial = tmp_path / "single_digits.partial.json"
    rewrite([str(partial)])
    run_bench(options(tmp_path))
    assert counted == ["a", "b", "c", "d"]
    result = read_result(tmp_path / "single_digits.json")
    assert [record["key"] for record in result["records"]] == list("abcd")


def test_unfinished_run_of_another_kind_is_kept(tmp_path: Path, counted) -> None:
    counted.append("stop")
    with pytest.raises(KeyboardInterrupt):
        run_bench(options(tmp_path))
    with pytest.raises(InputError, match="output_dir: .*differs in command and opt"):
        run_bench(options(tmp_path, images=2))
    assert (tmp_path / "single_digits.partial.json").exists()
    quick = run_bench(options(tmp_path, quick=True))  # has a name of its own
    assert quick.files[0].name == "single_digits_quick.json"


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"records": 3}'])
def test_damaged_partial_file_is_named(tmp_path: Path, counted, text: str) -> None:
    (tmp_path / "single_digits.partial.json").write_text(text)
    with pytest.raises(InputError, match=r"output_dir: .*readable unfinished run"):
        run_bench(options(tmp_path))


def test_progress_is_told(tmp_path: Path, counted) -> None:
    told: list[tuple[int, int]] = []
    run_bench(options(tmp_path), on_task=lambda done, of: told.append((done, of)))
    assert told == [(i, 4) for i in range(5)]


def test_interrupted_attack_is_no_measurement() -> None:
    class Found:
        stopped = "interrupted"

    with pytest.raises(KeyboardInterrupt):
        suite.stop_if_interrupted(Found())


# --- bad input --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "sngle"], "--suite: expected one of single, trials, labels, tabl"),
        ([], "Missing option '--suite'."),
        (["--suite", "labels", "--images", "3"], "--images: expected an option of su"),
        (["--suite", "single", "--images", "0"], "--images: expected an integer of at"),
        (["--suite", "single", "--images", "999"], "--images: expected at most 360 im"),
        (
            ["--suite", "single", "--images", "3", "--recipe-images", "4"],
            "--recipe-images: expected at most --images 3",
        ),
        (["--suite", "single", "--seed", "-1"], "--seed: expected"),
        (["--suite", "single", "--device", "tpu"], "--device: expected one of"),
    ],
)
def test_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    common = [] if "--device" in arguments else ["--device", "cpu"]
    assert cli.run(["bench", "--dataset", "digits", *arguments, *common]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"gradinv: {message}")
    assert "Traceback" not in err


# --- models -----------------------------------------------------------------------


def test_trained_models_are_kept(tmp_path: Path, monkeypatch) -> None:
    train, test = (
        load_images("digits", split=split)[:60] for split in ("train", "test")
    )
    made = []
    for statistics in (None, trained.pixel_statistics(train)):
        given = setting(tmp_path, {})
        models = []
        for _ in range(2):
            models.append(
                trained.model_at(
                    given, "lenet", "1 epoch", train, test, statistics=statistics
                )
            )
            monkeypatch.setattr(trained, "train_classifier", _no_training)
        monkeypatch.undo()
        made.append(models)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a, b)
        about = given.notes["models"]["lenet, 1 epoch"]
        assert about["epochs"] == 1
        assert 0 <= about["test_accuracy"] <= 1
    assert len(made[0][0]) + 1 == len(made[1][0])  # a layer that standardises
    assert len(list((tmp_path / "models").iterdir())) == 2


def _no_training(*_: object, **__: object) -> None:
    raise AssertionError("trained again")


def test_pixel_statistics() -> None:
    pixels = torch.rand((5, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.zeros(5, dtype=torch.long), ("a", "b"))
    mean, std = trained.pixel_statistics(images)
    assert mean == pytest.approx(pixels.numpy().mean((0, 2, 3)), rel=1e-5)
    assert std == pytest.approx(pixels.numpy().std((0, 2, 3), ddof=1), rel=1e-5)


# --- labels -----------------------------------------------------------------------


@given(
    kind=st.sampled_from(label_suite.KINDS),
    samples=st.integers(1, 64),
    num_classes=st.integers(2, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_drawn_labels(kind: str, samples: int, num_classes: int, seed: int) -> None:
    if kind == "unique":
        samples = min(samples, num_classes)
    generator = torch.Generator().manual_seed(seed)
    labels = label_suite.draw_labels(kind, samples, num_classes, generator)
    assert labels.shape == (samples,)
    assert 0 <= int(labels.min()) <= int(labels.max()) < num_classes
    counts = torch.bincount(labels)
    if kind == "unique":
        assert int(counts.max()) == 1
    if kind == "dominated":
        assert int(counts.max()) >= 0.75 * samples


def test_drawn_images_have_the_labels_and_differ_where_they_can() -> None:
    pool = load_images("digits", split="test")
    labels = torch.tensor([3, 3, 3, 7, 3, 0])
    generator = torch.Generator().manual_seed(0)
    images = label_suite.draw_images(pool, labels, generator)
    assert images.labels.tolist() == labels.tolist()
    assert len({p.numpy().tobytes() for p in images.pixels}) == len(labels)
    few = pool[[0, 1]]
    asked = few.labels[[0, 0, 0]]
    assert label_suite.draw_images(few, asked, generator).labels.tolist() == (
        asked.tolist()
    )
    missing = (few.labels.max() + 1).remainder(10).reshape(1)
    while int(missing) in few.labels.tolist():
        missing = (missing + 1).remainder(10)
    with pytest.raises(InputError, match="dataset: expected test images of class"):
        label_suite.draw_images(few, missing, generator)


def test_right_share() -> None:
    truth = torch.tensor([3, 1, 0])
    for estimate, expected in (([3, 1, 0], 1), ([1, 1, 2], 0.5), ([0, 0, 4], 0)):
        found = label_suite.right_share(torch.tensor(estimate), truth)
        assert found == expected
    assert label_suite.right_share(torch.tensor([2.6, 1.4, 0.0]), truth) == 1


@given(samples=st.integers(1, 200), num_classes=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_equal_counts(samples: int, num_classes: int) -> None:
    counts = label_suite.equal_counts(samples, num_classes)
    assert int(counts.sum()) == samples
    assert len(counts) == num_classes
    assert int(counts.max() - counts.min()) <= 1


# --- numbers ----------------------------------------------------------------------


def test_ratio_of_medians() -> None:
    theirs, ours = [10.0, 20.0, 30.0, 40.0, 50.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    found = suite.ratio_of_medians(theirs, ours)
    assert found["value"] == found["low"] == found["high"] == 10  # in every resample
    wide = suite.ratio_of_medians(theirs, ours[::-1])
    assert wide["value"] == 10
    assert wide["low"] < 10 < wide["high"]
    assert suite.ratio_of_medians(theirs, ours[::-1]) == wide


def test_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = suite.mean_with_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.2 * half)


def test_mean_difference_is_of_pairs() -> None:
    found = suite.mean_difference([5.0, 105.0, 55.0], [4.0, 104.0, 54.0])
    assert found == {"value": 1, "low": 1, "high": 1, "pairs": 3}


def test_one_pair_has_no_interval() -> None:
    for compare in (suite.ratio_of_medians, suite.mean_difference):
        found = compare([6.0], [3.0])
        assert math.isnan(found["low"])
        assert math.isnan(found["high"])
        assert "to" not in suite.with_interval(found)


def test_spread_of() -> None:
    values = [float(v) for v in range(1, 6)]
    expected = {"median": 3, "quartile_1": 2, "quartile_3": 4, "min": 1, "max": 5}
    assert suite.spread_of(values) == expected


def test_rounded() -> None:
    value = {"a": [1.23456789, math.inf], "b": (math.nan, 3, None), "c": True}
    expected = {"a": [1.23457, None], "b": [None, 3, None], "c": True}
    assert suite.rounded(value) == expected


def test_victims_of_a_folder_come_from_all_of_it() -> None:
    assert suite.victim_numbers("photos", 140, 3) == [0, 1, 2]
    assert suite.victim_numbers("folder", 100, 4) == [0, 25, 50, 75]
    assert suite.victim_numbers("folder", 7, 7) == list(range(7))
    with pytest.raises(InputError, match="images: expected at most 7 images"):
        suite.victim_numbers("folder", 7, 8)


def test_fingerprint_sees_pixels_and_labels() -> None:
    images = load_images("digits", split="test")[:5]
    other_label = Images(images.pixels, images.labels.flip(0), images.class_names)
    other_pixel = Images(1 - images.pixels, images.labels, images.class_names)
    prints = {suite.fingerprint(i) for i in (images, other_label, other_pixel)}
    assert len(prints) == 3
    assert suite.fingerprint(images[:]) == suite.fingerprint(images)


def test_text() -> None:
    assert suite.with_quartiles([]) == suite.with_deviation([]) == "–"
    assert suite.with_quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.0 (2.0 to 4.0)"
    assert suite.with_deviation([1.0, 3.0]) == "2.0 ± 1.4"
    table = suite.markdown(["a", "b"], [["x", "1"]])
    assert table.splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |"]
