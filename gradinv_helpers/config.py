"""The settings that readers change: ``config.json``, checked and frozen.

A new setting is one line in one of the classes below; then run

    python -m gradinv_helpers.config --write-schema --write-defaults config.json

which brings the JSON schema and the file of defaults up to date.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradinv_helpers.data import DatasetName
from gradinv_helpers.errors import InputError
from gradinv_helpers.files import expand_home, write_text

CONFIG_FILE = "config.json"
SCHEMA_FILE = Path(__file__).with_name("config.schema.json")
PARENTS_SEARCHED = 4

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class _Group(BaseModel):
    """A group of settings: unchangeable, without unknown keys or converted types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )


class InvertSettings(_Group):
    """Settings of ``gradinv invert``."""

    num_clients: Count = Field(default=1, description="Clients to attack")
    samples_per_client: Count = Field(default=1, description="Images of each client")
    iterations: Count = Field(default=200, description="Outer steps of the optimiser")
    restarts: Count = Field(default=3, description="Independent starts of each attack")
    log_every: Count = Field(default=20, description="Steps between two snapshots")
    init_scale: NotNegative = Field(
        default=0.05, description="Standard deviation of the dummy start"
    )
    tv_weight: NotNegative | None = Field(
        default=None, description="Weight of the total variation; null: the attack's"
    )
    agg_lr: Positive = Field(
        default=0.1, description="Step size of the aggregated step"
    )
    model: str = Field(default="lenet", description="Model that the clients train")
    attack: str = Field(default="auto", description="Attack; auto picks by the update")
    reconstruct_mode: Literal["per-client", "aggregated", "both"] = Field(
        default="per-client", description="Which updates are inverted"
    )
    normalize_gradients: bool = Field(
        default=False,
        description="Scale client gradients to L2 norm 1 before aggregation",
    )
    apply_agg_step: bool = Field(
        default=False,
        description="Take one aggregated step on the model before inversion",
    )
    output_dir: str = Field(
        default="outputs/invert", description="Folder of the results"
    )


class TrainSettings(_Group):
    """Settings of ``gradinv train-global``."""

    model: str = Field(default="convnet", description="Model to train")
    epochs: Count = Field(default=10, description="Passes over the training images")
    batch_size: Count = Field(default=32, description="Images per step")
    lr: Positive = Field(default=0.01, description="Learning rate")
    output: str = Field(
        default="checkpoints/global.pth", description="Checkpoint: .pth or .safetensors"
    )


class SimulateSettings(_Group):
    """Settings of ``gradinv simulate``."""

    rounds: Count = Field(default=10, description="Rounds of training")
    clients: Count = Field(default=10, description="Clients that share the data")
    partition: Literal["iid", "dirichlet", "shards"] = Field(
        default="iid", description="How the data are divided"
    )
    algorithm: Literal["fedavg", "fedsgd"] = Field(
        default="fedavg", description="Weight changes or gradients"
    )
    model: str = Field(default="mlp", description="Model that the clients train")
    lr: Positive = Field(default=0.1, description="Learning rate of the clients")
    local_epochs: Count = Field(default=1, description="Passes over a client's images")
    batch_size: Count = Field(default=16, description="Images per local step")
    optimiser: Literal["sgd", "momentum", "adam"] = Field(
        default="sgd", description="Optimiser of the clients"
    )
    attack: str = Field(default="auto", description="How images are inverted")
    attack_every: int = Field(
        default=5, ge=0, description="Rounds between two attacks; 0 for none"
    )
    attack_images: int = Field(
        default=8, ge=0, description="Most images of a message that is inverted"
    )
    iterations: Count = Field(default=20, description="Outer steps of an inversion")
    output_dir: str = Field(
        default="outputs/simulate", description="Folder of the results"
    )


class BookSettings(_Group):
    """Size of the experiments in the notebooks."""

    num_seeds: Count = Field(default=3, description="Repetitions of each experiment")
    num_images: Count = Field(
        default=8, description="Images attacked in each experiment"
    )
    iterations: Count = Field(default=40, description="Outer steps of the optimiser")
    restarts: Count = Field(default=2, description="Independent starts of each attack")
    epochs: Count = Field(
        default=5, description="Passes over the data when a model trains"
    )


class BookProfiles(_Group):
    """The two sizes of the notebooks: for a laptop and for a thorough run."""

    fast: BookSettings = BookSettings()
    full: BookSettings = BookSettings(
        num_seeds=10, num_images=100, iterations=300, restarts=5, epochs=20
    )


class Settings(_Group):
    """Everything in ``config.json``; each value has a default.

    Example:
        >>> settings = Settings()
        >>> settings.invert.iterations, settings.book_settings.num_seeds
        (200, 3)
    """

    schema_file: str = Field(
        default="gradinv_helpers/config.schema.json",
        alias="$schema",
        description="Helps editors to check this file",
    )
    profile: Literal["fast", "full"] = Field(
        default="fast", description="Size of the experiments in the notebooks"
    )
    dataset: Literal["auto", DatasetName] = Field(
        default="auto",
        description="auto: photos for invert, digits for whatever trains",
    )
    data_root: str = Field(
        default="~/.torch", description="Folder of downloads, or of the data set folder"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="auto takes an accelerator if there is one"
    )
    seed: Seed = Field(default=0, description="Seed of everything random")
    invert: InvertSettings = InvertSettings()
    train_global: TrainSettings = TrainSettings()
    simulate: SimulateSettings = SimulateSettings()
    book: BookProfiles = BookProfiles()

    @property
    def book_settings(self) -> BookSettings:
        """The notebook settings of the active profile."""
        return self.book.full if self.profile == "full" else self.book.fast


def load_config(path: str | Path | None = None) -> Settings:
    """Read the settings from a file.

    Without ``path``, ``config.json`` is looked for in the current folder and up to
    four of its parents. A file there counts only if its ``$schema`` names
    ``config.schema.json`` or if it has a group ``invert`` or ``train_global``, because
    other programs use the same file name. If there is none, the defaults are returned.

    Args:
        path: The file; it need not hold every key.

    Returns:
        Checked settings that cannot be changed.

    Raises:
        InputError: The file is missing, is not JSON, or has a key that is unknown,
            double or has a bad value; the line is named.

    Taught in: notebooks/01_fl_guarantees.
    """
    if path is not None:
        file = expand_home(path)
        return _parse(file.name, _read(file))
    here = Path.cwd()
    for folder in [here, *here.parents][: PARENTS_SEARCHED + 1]:
        file = folder / CONFIG_FILE
        if file.is_file() and _is_ours(text := _read(file)):
            return _parse(file.name, text)
    return Settings()


def _read(file: Path) -> str:
    """Read a text file; an editor's byte order mark is dropped."""
    expected = "a JSON file that can be read"
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        hint = "check the path, or leave it out to use the defaults"
        raise InputError("config", expected, f"no file {str(file)!r}", hint) from error
    except UnicodeDecodeError as error:
        got = f"{str(file)!r}, which is not UTF-8 text"
        raise InputError("config", expected, got) from error
    except OSError as error:
        got = f"{str(file)!r} ({error.strerror})"
        raise InputError("config", expected, got) from error


def _is_ours(text: str) -> bool:
    """Say whether a file names our schema or our groups, even if it is broken."""
    schema = r'"\$schema"\s*:\s*"[^"]*config\.schema\.json"'
    return bool(re.search(schema + r'|"(invert|train_global)"\s*:', text))


class _DoubleKeyError(ValueError):
    """A key stands twice in one group."""


def _parse(name: str, text: str) -> Settings:
    """Turn the text of a configuration file into settings."""
    try:
        values = json.loads(text, object_pairs_hook=_no_double_keys)
    except json.JSONDecodeError as error:
        where = f"{name} line {error.lineno}, column {error.colno}"
        raise InputError(where, "JSON", f"a syntax error ({error.msg})") from error
    except _DoubleKeyError as error:
        double = str(error)
        path, lines = next(
            (path, lines)
            for path, lines in _key_lines(text).items()
            if path[-1] == double and len(lines) > 1
        )
        where = f"{name} line {lines[1]}, {'.'.join(path)}"
        got = f"a second one (the first is in line {lines[0]})"
        raise InputError(where, "each key once", got, "remove one") from error
    except (ValueError, RecursionError) as error:
        raise InputError(name, "JSON", str(error)) from error
    if not isinstance(values, dict):
        got = f"a {type(values).__name__}"
        raise InputError(name, "a JSON object { ... }", got)
    try:
        return Settings.model_validate(_over(_defaults(), values))
    except ValidationError as error:
        _raise_first(name, text, error)


def _no_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dictionary; plain JSON would silently keep the last of equal keys."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _DoubleKeyError(key)
        seen[key] = value
    return seen


def _over(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Lay values over defaults, group by group, so that each key may be left out."""
    merged = defaults | values
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            merged[key] = _over(defaults[key], value)
    return merged


def _key_lines(text: str) -> dict[tuple[str, ...], list[int]]:
    """Find the lines of every key in valid JSON, by path from the top."""
    found: dict[tuple[str, ...], list[int]] = {}
    groups: list[str] = []
    key = ""
    for token in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', text):
        if token[0] == "{":
            groups.append(key)
        elif token[0] == "}":
            groups.pop()
        elif token[2]:
            key = json.loads(token[1])
            line = text.count("\n", 0, token.start()) + 1
            found.setdefault((*groups[1:], key), []).append(line)
    return found


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": 'text in "quotes"',
    "model_type": "a group of settings { ... }",
}


def _raise_first(name: str, text: str, error: ValidationError) -> NoReturn:
    """Report the problem that stands first in the file."""
    lines = _key_lines(text)
    problems = []
    for detail in error.errors(include_url=False):
        path = tuple(str(part) for part in detail["loc"])
        problems.append((lines.get(path, [1])[0], path, detail))
    line, path, detail = min(problems, key=lambda problem: problem[0])
    where = f"{name} line {line}, {'.'.join(path)}"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
        raise InputError(where, "a known key", "an unknown key", hint) from error
    expected = detail["msg"].removeprefix("Input should be ")
    expected = _EXPECTED.get(detail["type"], expected)
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    raise InputError(where, expected, json.dumps(detail["input"])[:60]) from error


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys of the group at a path."""
    group: type[BaseModel] = Settings
    for part in path:
        group = group.model_fields[part].annotation  # type: ignore[assignment]
    return [field.alias or name for name, field in group.model_fields.items()]


def _defaults() -> dict[str, Any]:
    return Settings().model_dump(by_alias=True)


def schema_text() -> str:
    """The JSON schema of ``config.json``, for editors."""
    schema = Settings.model_json_schema(by_alias=True)
    return json.dumps(schema, indent=2) + "\n"


def defaults_text() -> str:
    """The content of a ``config.json`` that holds every default."""
    return json.dumps(_defaults(), indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the schema or the defaults; run after a change of the classes above."""
    parser = argparse.ArgumentParser(prog="python -m gradinv_helpers.config")
    parser.add_argument("--write-schema", action="store_true", help=str(SCHEMA_FILE))
    parser.add_argument("--write-defaults", metavar="FILE", help="such as config.json")
    chosen = parser.parse_args(arguments)
    if chosen.write_schema:
        write_text(SCHEMA_FILE, schema_text())
    if chosen.write_defaults:
        write_text(chosen.write_defaults, defaults_text())


if __name__ == "__main__":
    main()
