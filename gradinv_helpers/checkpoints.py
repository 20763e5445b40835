"""Weights on disk: safetensors, or PyTorch files that are never unpickled as code."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gradinv_helpers.errors import InputError
from gradinv_helpers.files import expand_home, write_atomically
from gradinv_helpers.models import build_model

_KEY = "gradinv"
_FORMATS = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class ModelInfo:
    """The arguments of ``build_model`` that make the architecture of a checkpoint."""

    name: str
    in_channels: int
    image_size: int
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def save_checkpoint(path: str | Path, model: nn.Module, info: ModelInfo) -> Path:
    """Write a model's weights, whole or not at all; the suffix picks the format.

    Args:
        path: A file name that ends in ``.safetensors``, ``.pth`` or ``.pt``.
        model: The model; it is not changed.
        info: How to build it again.

    Returns:
        The path written.

    Raises:
        InputError: Unknown suffix, or a folder that cannot be written to.

    Taught in: notebooks/01_fl_guarantees.
    """
    path = check_checkpoint_name(path)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, temporary, metadata={_KEY: json.dumps(asdict(info))})
        else:
            torch.save({"state_dict": state, _KEY: asdict(info)}, temporary)

    return write_atomically(path, write)


def load_checkpoint(
    path: str | Path, *, model: nn.Module | None = None
) -> tuple[nn.Module, ModelInfo | None]:
    """Read weights from a file; code in it is refused, never run.

    Args:
        path: A ``.safetensors`` file, or a ``.pth``/``.pt`` file holding tensors only.
        model: Where to load a bare state dictionary of your own; not needed for files
            written by ``save_checkpoint``. It is changed in place.

    Returns:
        The model in evaluation mode, and how it was built, if the file says so.

    Raises:
        InputError: The file is missing, damaged, holds code, or does not fit.

    Taught in: notebooks/01_fl_guarantees.
    """
    path = check_checkpoint_name(path)
    if not path.is_file():
        raise InputError("checkpoint", "an existing file", repr(str(path)))
    state, about = _read(path)
    info = None
    if about is not None:
        try:
            for name in ("mean", "std"):  # JSON has no tuples
                if about.get(name) is not None:
                    about[name] = tuple(map(float, about[name]))
            info = ModelInfo(**about)
        except (TypeError, ValueError) as error:
            raise _damaged(path, "its description of the model is not ours") from error
    if model is None:
        if info is None:
            raise InputError(
                "checkpoint",
                "a file that says which model it holds",
                f"{str(path)!r} with bare tensors",
                "pass model= to load them into a model of your own",
            )
        try:
            with torch.device("meta"):  # takes no memory, whatever size is stated
                skeleton = build_model(**asdict(info))
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            reason = f"its description of the model: {str(error).splitlines()[0]}"
            raise _damaged(path, reason) from error
        _fill(skeleton, {name: t.to("meta") for name, t in state.items()}, path)
        model = build_model(**asdict(info))
    _fill(model, state, path)
    return model.eval(), info


def check_checkpoint_name(path: str | Path) -> Path:
    """Return the path if its suffix names a known format.

    Raises:
        InputError: The suffix is unknown.
    """
    path = expand_home(path)
    if path.suffix not in _FORMATS:
        raise InputError(
            "checkpoint", f"a file name ending in {', '.join(_FORMATS)}", str(path)
        )
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """State dictionary and description of the model, of either format."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
                about = json.loads((file.metadata() or {}).get(_KEY, "null"))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            state, about = content, None
            if isinstance(content, dict) and "state_dict" in content:
                state, about = content["state_dict"], content.get(_KEY)
    except pickle.UnpicklingError as error:
        raise InputError(
            "checkpoint",
            "a file of tensors only",
            f"{str(path)!r}, which holds other objects or is damaged",
            "such a file can run code, so it was not opened; save tensors only",
        ) from error
    except Exception as error:  # every way in which a damaged file can fail
        raise _damaged(path, "it cannot be read in this format") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor)
        for name, value in state.items()
    ):
        raise _damaged(path, "it is not a mapping from names to tensors")
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise _damaged(path, f"{name} has NaN or infinite values")
    if about is not None and not isinstance(about, dict):
        raise _damaged(path, "its description of the model is not ours")
    return state, about


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load all tensors into a model, or leave it as it was."""
    before = copy.deepcopy(model.state_dict())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        model.load_state_dict(before)
        lines = [line.strip() for line in str(error).splitlines()]
        raise InputError(
            "checkpoint",
            "tensors with the names and shapes of the model",
            f"{str(path)!r} ({lines[min(1, len(lines) - 1)]})",
        ) from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError("checkpoint", "an undamaged file", f"{str(path)!r} ({reason})")
