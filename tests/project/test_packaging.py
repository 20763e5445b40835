"""What people install says the same everywhere."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

CONDA_NAMES = {"torch": "pytorch"}


def split(requirement: str) -> tuple[str, str]:
    """Name and bounds of a requirement."""
    match = re.fullmatch(r"([A-Za-z0-9-]+)(?:\[[^]]*\])?\s*(.*)", requirement)
    assert match, requirement
    return match[1], match[2]


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]


def test_core_requirements_have_lower_bounds_only(project: dict) -> None:
    for requirement in project["dependencies"]:
        _, bounds = split(requirement)
        assert re.fullmatch(r">=[\d.]+", bounds), requirement


def test_extra_all_holds_every_other_extra(project: dict) -> None:
    extras = project["optional-dependencies"]
    (union,) = extras["all"]
    named = re.fullmatch(re.escape(project["name"]) + r"\[(.*)\]", union)
    assert named
    assert set(named[1].split(",")) == set(extras) - {"all"}


def test_conda_environment_agrees(root: Path, project: dict) -> None:
    text = (root / "environment.yml").read_text("utf-8")
    entries = yaml.safe_load(text)["dependencies"]
    conda = dict(split(entry) for entry in entries if isinstance(entry, str))
    expected = {"python": project["requires-python"], "pip": ""}
    for name, bounds in map(split, project["dependencies"]):
        expected[CONDA_NAMES.get(name, name)] = bounds
    assert conda == expected
    assert [e for e in entries if isinstance(e, dict)] == [{"pip": ["-e .[all]"]}]


def test_licence_is_mit(root: Path, project: dict) -> None:
    text = (root / "LICENSE").read_text("utf-8")
    assert text.startswith("MIT License\n")
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in text
    assert project["license"] == "MIT"


def test_command_exists(project: dict) -> None:
    assert project["scripts"] == {"gradinv": "gradinv_helpers.cli:main"}


def test_browser_files_are_locked(root: Path) -> None:
    assets = root / "book" / "assets"
    wanted = json.loads((assets / "package.json").read_text("utf-8"))["dependencies"]
    lock = json.loads((assets / "package-lock.json").read_text("utf-8"))["packages"]
    assert lock.pop("")["dependencies"] == wanted
    for name, version in wanted.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert lock[f"node_modules/{name}"]["version"] == version
    for name, package in lock.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, f"{name} names the place of the download"


def test_workflows_run_what_a_person_runs(root: Path, project: dict) -> None:
    folder = root / ".github" / "workflows"
    tests = yaml.safe_load((folder / "tests.yml").read_text("utf-8"))
    versions = tests["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    assert versions[0] == project["requires-python"].removeprefix(">=")
    steps = tests["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    book = yaml.safe_load((folder / "book.yml").read_text("utf-8"))
    assert "make book" in [step.get("run") for step in book["jobs"]["build"]["steps"]]
