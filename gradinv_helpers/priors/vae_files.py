"""A VAE prior as a folder: ``config.json`` and ``model.safetensors``, never pickle."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from gradinv_helpers.errors import InputError, check_choice
from gradinv_helpers.files import expand_home, prepare_folder, write_bytes, write_json
from gradinv_helpers.priors.gaussian import CovariancePrior, SpectrumPrior
from gradinv_helpers.priors.vae_codes import CodeLaw
from gradinv_helpers.priors.vae_network import VAENetwork

if TYPE_CHECKING:
    from gradinv_helpers.priors.vae import VAEPrior

KIND = "vae"
PRETRAINED: tuple[str, ...] = ("vae-digits", "vae-photos")

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_NETWORK, _RESIDUAL = "network.", "residual."
_MEANS, _ROOTS = "codes.means", "codes.roots"


def write_prior(prior: VAEPrior, folder: str | Path) -> Path:
    """Write both files; ``config.json`` comes last and says that all is there."""
    from safetensors.torch import save

    path = prepare_folder(folder, "output_dir")
    state = {_NETWORK + k: v for k, v in prior.network.state_dict().items()}
    state |= {_RESIDUAL + k: v for k, v in _residual_tensors(prior.residual).items()}
    state |= {_MEANS: prior.law.means, _ROOTS: prior.law.roots}
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in state.items()}
    write_bytes(path / _WEIGHTS, save(tensors))
    head = {"kind": KIND, "name": prior.name}
    architecture = {"architecture": prior.network.architecture}
    write_json(path / _CONFIG, {**head, **architecture, **prior.about})
    return path


def read_prior(
    folder: str | Path,
) -> tuple[VAENetwork, SpectrumPrior | CovariancePrior, CodeLaw, dict[str, Any]]:
    """Read the network, the laws of residuals and codes, and what the folder says.

    Raises:
        InputError: A file is missing, damaged, or does not fit the other.
    """
    path = _located(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).is_file():
            hint = "gradinv train-prior vae writes one"
            raise InputError("prior", f"a folder with {name}", repr(str(path)), hint)
    config = _read_config(path / _CONFIG)
    tensors = _read_tensors(path / _WEIGHTS)
    architecture = config.pop("architecture")
    with torch.device("meta"):  # takes no memory, whatever sizes are stated
        skeleton = VAENetwork(**architecture)
    _check_shapes(path / _WEIGHTS, tensors, skeleton)
    network = VAENetwork(**architecture)
    named = {k.removeprefix(_NETWORK): v for k, v in tensors.items()}
    network.load_state_dict({k: named[k] for k in network.state_dict()})
    codes = CodeLaw(tensors[_MEANS], tensors[_ROOTS])
    parts = {k.removeprefix(_RESIDUAL): v for k, v in tensors.items()}
    if "root" in parts:
        zero = torch.zeros(network.image_shape)
        residual = CovariancePrior(zero, parts["root"], "residuals")
        return network, residual, codes, config
    return network, spectral(parts["deviations"], parts["colours"]), codes, config


def spectral(deviations: Tensor, colours: Tensor) -> SpectrumPrior:
    """A Gaussian of mean 0 that is diagonal in frequencies."""
    return SpectrumPrior(deviations.new_zeros(()), deviations, colours, "residuals")


def _residual_tensors(residual: SpectrumPrior | CovariancePrior) -> dict[str, Tensor]:
    if isinstance(residual, CovariancePrior):
        return {"root": residual.root}
    return {"deviations": residual.deviations, "colours": residual.colours}


def _located(folder: str | Path) -> Path:
    """The folder of a prior that ships with the package, or the folder itself."""
    if str(folder) in PRETRAINED:
        shipped = resources.files("gradinv_helpers.priors") / "pretrained"
        return Path(str(shipped / str(folder)))
    return expand_home(folder)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        check_choice("kind", config.pop("kind"), (KIND,))
        config["name"] = str(config["name"])
        with torch.device("meta"):
            VAENetwork(**config["architecture"])
    except KeyError as error:
        raise _damaged(path, f"no {error}") from error
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())
    except Exception as error:  # every way in which a damaged file can fail
        raise _damaged(path, error) from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise _damaged(path, f"{name} has NaN or infinite values")
    return tensors


def _check_shapes(path: Path, tensors: dict[str, Tensor], network: VAENetwork) -> None:
    channels, *sides = network.image_shape
    found = {name: tensor.shape for name, tensor in tensors.items()}
    expected = {_NETWORK + k: v.shape for k, v in network.state_dict().items()}
    if _RESIDUAL + "root" in found:
        count = math.prod(network.image_shape)
        expected[_RESIDUAL + "root"] = Size([count, count])
    else:
        expected[_RESIDUAL + "deviations"] = Size(sides)
        expected[_RESIDUAL + "colours"] = Size([channels, channels])
    classes, size = max(network.num_classes, 1), network.latent_size
    expected |= {_MEANS: Size([classes, size]), _ROOTS: Size([classes, size, size])}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise _damaged(path, f"{name} does not fit {_CONFIG}")


def _damaged(path: Path, reason: object) -> InputError:
    text = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return InputError("prior", "an undamaged file", f"{str(path)!r} ({text})")
