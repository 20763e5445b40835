"""The package as a reader meets it: quick to import, complete, documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradinv_helpers as gi

PACKAGE = Path(gi.__file__).parent
HEAVY = (
    "matplotlib",
    "scipy",
    "sklearn",
    "skimage",
    "torchmetrics",
    "torchvision",
    "diffusers",
    "flwr",
    "opacus",
    "ipywidgets",
    "pydantic",
    "typer",
    "PIL",
)
# Notebooks that a page of the book exists or is planned for, by DESIGN.
NOTEBOOKS = (
    "01_fl_guarantees",
    "02_dlg_four_steps",
    "03_stronger_matching",
    "04_aggregated_gradients",
    "05_vae_prior",
    "06_diffusion_prior",
    "07_iid_noniid",
    "08_differential_privacy",
    "09_secure_aggregation",
    "10_federated_simulation",
    "11_active_attacks",
    "12_audit_your_model",
)


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = f"""
import json, sys
import gradinv_helpers
heavy = {HEAVY!r} + ("torch",)
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    assert json.loads(python(code)) == []


def test_the_pipe_needs_none_of_the_heavy_ones() -> None:
    """Updates, aggregation and attacks run on torch alone and leave it as it was."""
    code = """
import json, sys
import torch
state = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()
import gradinv_helpers as gi
model = gi.build_model("mlp", in_channels=1, image_size=4, num_classes=3)
images = gi.Images(torch.rand(1, 1, 4, 4), torch.tensor([1]), ("a", "b", "c"))
update = gi.aggregate([gi.defend(gi.local_update(model, images))])
found = gi.invert(update, iterations=1, restarts=1)
assert found.labels.tolist() == [1]
heavy = ("matplotlib", "torchmetrics", "diffusers", "flwr", "opacus", "ipywidgets")
loaded = [name for name in heavy if name in sys.modules]
for name in gi.__all__:
    getattr(gi, name)
assert state == (
    torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()
)
print(json.dumps(loaded))
"""
    assert json.loads(python(code)) == []


def test_version() -> None:
    from importlib.metadata import version

    assert gi.__version__ == version("gradinv-helpers")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", gi.__version__)


@pytest.mark.parametrize("name", gi.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(gi, name) is not None
    assert name in dir(gi)


def test_public_names_of_the_design() -> None:
    wanted = """load_images partition build_model local_update defend aggregate
    infer_labels invert score Images Client LocalTraining SharedUpdate Reconstruction
    LeakageScore"""
    assert set(wanted.split()) <= set(gi.__all__)
    assert len(gi.__all__) == len(set(gi.__all__))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'gradinv_helpers' has no .* 'inverse'"):
        gi.inverse  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the lazy table agree."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # marks it as exported
            seen[alias.name] = node.module
    assert set(seen) == set(gi.__all__) - {"__version__"}
    for name, module in seen.items():
        home = importlib.import_module(module)
        assert getattr(gi, name) is getattr(home, name)


@pytest.mark.parametrize(
    "first",
    [
        "import gradinv_helpers.partition",
        "gi.Client",
    ],
)
def test_partition_is_the_function_whoever_came_first(first: str) -> None:
    """A submodule has the same name; importing it must not hide the function."""
    code = f"""
import inspect
import gradinv_helpers as gi
{first}
assert inspect.isfunction(gi.partition), gi.partition
from gradinv_helpers import partition
assert inspect.isfunction(partition)
from gradinv_helpers.partition import Client
assert Client is gi.Client
print("function")
"""
    assert python(code).strip() == "function"


# --- documentation ----------------------------------------------------------------


def documented() -> list[str]:
    return [
        name
        for name in gi.__all__
        if inspect.isfunction(getattr(gi, name)) or inspect.isclass(getattr(gi, name))
    ]


@pytest.mark.parametrize("name", documented())
def test_docstrings(name: str) -> None:
    thing = getattr(gi, name)
    text = inspect.getdoc(thing)
    assert text
    first = text.splitlines()[0]
    assert len(first) < 80
    assert first.endswith(".")
    parameters = (
        inspect.signature(thing).parameters if inspect.isfunction(thing) else {}
    )
    for parameter in parameters:
        assert re.search(rf"\b{parameter}\b", text), f"{parameter} is not explained"


# Errors and settings are met everywhere and have no chapter of their own.
@pytest.mark.parametrize(
    "name", [n for n in documented() if n not in ("InputError", "Settings")]
)
def test_docstrings_name_the_notebook(name: str) -> None:
    """The public name itself, or else its module, says where it is taught."""
    thing = getattr(gi, name)
    module = sys.modules[thing.__module__]
    text = f"{inspect.getdoc(thing)}\n{module.__doc__}"
    found = re.findall(r"Taught in: notebooks/(\w+)", " ".join(text.split()))
    assert found, "no 'Taught in: notebooks/...' line"
    assert set(found) <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", documented())
def test_functions_take_at_most_three_positional_arguments(name: str) -> None:
    thing = getattr(gi, name)
    if inspect.isclass(thing):
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(thing).parameters.values()
    assert sum(p.kind in kinds for p in parameters) <= 3
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters)
    for parameter in parameters:
        assert parameter.annotation is not inspect.Parameter.empty


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_library_code_is_quiet_and_clean(path: Path) -> None:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exec", "eval"), node.lineno
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.manual_seed", "np.random.seed") or (
                "fork_rng" in text
            ), node.lineno
            assert called != "warnings.filterwarnings", node.lineno
    assert not re.search(r"(?i)\b(todo|fixme|xxx)\b", text)
    assert "/work" not in text and "/tmp/" not in text


# --- the attacker is blindfolded --------------------------------------------------

ATTACKER = sorted([*PACKAGE.glob("attacks/*.py"), *PACKAGE.glob("priors/*.py")])
FORBIDDEN_MODULES = (
    "image_metrics",
    "identifiability",
    "perceptual",
    "intervals",
    "metrics",
    "data",
    "partition",
    "classifier",
    "experiment",
    "plots",
    "widgets",
    "training",
)

# These learn from public images, and have to name them.
TRAINERS = ("diffusion.py", "vae.py", "vae_training.py")
PUBLIC_IMAGES = ("gradinv_helpers.data", "gradinv_helpers.data.Images", "pixels")


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(str(node.module))
    return names


def reaches_the_truth(source: str) -> list[str]:
    """Imports and names in a module that would let an attacker look."""
    tree = ast.parse(source)
    bad = [
        name
        for name in imported(tree)
        for module in FORBIDDEN_MODULES
        if f"{name}.".startswith(f"gradinv_helpers.{module}.")
    ]
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.alias):
            name = node.name.rsplit(".", 1)[-1]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value if node.value.isidentifier() else ""
        if re.search(r"(?i)truth|^load_images$|^true_|victim|^pixels$", name):
            bad.append(name)
        if name in ("__import__", "import_module", "get_objects", "get_referrers"):
            bad.append(name)
    return bad


def test_the_scan_finds_a_peeking_attacker() -> None:
    """The test below can fail."""
    for source in (
        "from gradinv_helpers.metrics import score",
        "from gradinv_helpers import metrics",
        "import gradinv_helpers.data as d",
        "def f():\n    from gradinv_helpers.data import load_images",
        "def f(update, truth): pass",
        "def f(update, ground_truth=None): pass",
        "def f(client): return client.images.pixels",
        "getattr(x, 'pixels')",
        "import importlib; importlib.import_module('x')",
    ):
        assert reaches_the_truth(source), source
    assert reaches_the_truth("import torch\nfrom gradinv_helpers import updates") == []


@pytest.mark.parametrize("path", ATTACKER, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_attacker_cannot_reach_the_truth(path: Path) -> None:
    allowed = PUBLIC_IMAGES if path.name in TRAINERS else ()
    found = reaches_the_truth(path.read_text("utf-8"))
    assert set(found) <= set(allowed)


def test_there_is_an_attacker() -> None:
    assert {"invert.py", "matching.py", "labels.py", "smoothness.py"} <= {
        path.name for path in ATTACKER
    }
