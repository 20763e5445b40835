"""Perceptual distance (LPIPS) where the weights of its network are at hand.

The linear heads of LPIPS come with torchmetrics. The network below them is one of
torchvision's, trained on ImageNet; its weights are used from torch's hub cache and
downloaded only where the caller asks for it.
"""

from __future__ import annotations

import pickle
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args
from urllib.error import URLError

import torch
from torch import Tensor, nn

from gradinv_helpers.compute import cpu_threads, private_randomness
from gradinv_helpers.errors import InputError, check_choice
from gradinv_helpers.image_metrics import check_pair, check_unit_range

PerceptualNet = Literal["alex", "vgg", "squeeze"]

PERCEPTUAL_NETS: tuple[str, ...] = get_args(PerceptualNet)
MIN_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}  # pixels that every layer needs

_CHUNK = 32  # image pairs per forward pass
_WORK_PER_PIXEL = {"alex": 14_000, "vgg": 310_000, "squeeze": 7_000}  # multiplied
_WEIGHTS = {
    "alex": "AlexNet_Weights",
    "vgg": "VGG16_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}


def perceptual_weights_available(net: PerceptualNet = "alex") -> bool:
    """Tell whether torch's hub cache holds the weights of a perceptual network.

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``.

    Returns:
        Whether ``perceptual_distance`` works without a download.

    Raises:
        InputError: Unknown network.

    Taught in: notebooks/03_stronger_matching
    """
    check_choice("net", net, PERCEPTUAL_NETS)
    return _checkpoint(net)[1].is_file()


def perceptual_distance(
    images: Tensor,
    truth: Tensor,
    *,
    net: PerceptualNet = "alex",
    download: bool = False,
) -> Tensor:
    """Compute the learned perceptual distance (LPIPS) of each image pair.

    Squared differences of unit-length features, weighted per channel and averaged
    over positions and layers. Images are not resized; grey ones are repeated in three
    channels. Values of different networks cannot be compared.

    Args:
        images: Reconstructions (N, C, H, W), C 1 or 3, values in [0, 1], already in
            the order of ``truth``. The smaller side must have at least 31 pixels for
            ``alex``, 16 for ``vgg`` and 17 for ``squeeze``.
        truth: True images (N, C, H, W), values in [0, 1].
        net: Network below the linear heads.
        download: Fetch weights that are missing from torch's hub cache (233 MB for
            ``alex``, 528 MB for ``vgg``, 5 MB for ``squeeze``).

    Returns:
        (N,) float64, 0 for equal images; lower is closer.

    Raises:
        InputError: Unknown network, images it cannot take, or weights that are
            missing, damaged or cannot be downloaded.

    Source: Zhang et al. (2018), The unreasonable effectiveness of deep features.
    Taught in: notebooks/03_stronger_matching
    """
    check_choice("net", net, PERCEPTUAL_NETS)
    left, right = check_pair(images, truth)
    check_unit_range(left, "images")
    check_unit_range(right, "truth")
    if not fits_perceptual_net(left, net):
        expected = f"1 or 3 channels and sides of at least {MIN_SIDE[net]} for {net!r}"
        raise InputError("images", expected, tuple(left.shape[1:]))
    url, path = _checkpoint(net)
    if not path.is_file():
        _fetch(url, path, allowed=download)
    network = _network(net, path, path.stat().st_mtime_ns)
    colours = [side.float().clamp(0, 1).expand(-1, 3, -1, -1) for side in (left, right)]
    work = _WORK_PER_PIXEL[net] * min(_CHUNK, len(left)) * left[0, 0].numel()
    with cpu_threads(work), torch.no_grad():
        pairs = zip(*(side.split(_CHUNK) for side in colours), strict=True)
        values = [network(a, b, normalize=True).flatten() for a, b in pairs]
    return torch.cat(values).double()


def fits_perceptual_net(images: Tensor, net: PerceptualNet) -> bool:
    """Tell whether a perceptual network takes images of this shape."""
    return images.shape[1] in (1, 3) and min(images.shape[-2:]) >= MIN_SIDE[net]


def _checkpoint(net: PerceptualNet) -> tuple[str, Path]:
    """Return the address of the weights and their place in torch's hub cache."""
    from torchvision import models

    url = getattr(models, _WEIGHTS[net]).DEFAULT.url
    return url, Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])


def _fetch(url: str, path: Path, *, allowed: bool) -> None:
    """Download the weights into the cache, or say how to get them there."""
    hint = f"get {url} and put it at {path}"
    if not allowed:
        expected = "weights in torch's hub cache"
        raise InputError("net", expected, "none", f"pass download=True, or {hint}")
    prefix = path.stem.rsplit("-", 1)[-1]  # start of the SHA-256, by torch's naming
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), prefix, progress=False)
    except (OSError, URLError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError("download", "a reachable server", reason, hint) from error


@lru_cache(maxsize=3)
def _network(net: PerceptualNet, path: Path, _modified: int) -> nn.Module:
    """Build LPIPS on the cached weights; torchvision reads the file at ``path``."""
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    try:
        torch.load(path, map_location="cpu", weights_only=True)  # tensors, no code
        with private_randomness(0, torch.device("cpu")):
            metric = LearnedPerceptualImagePatchSimilarity(net_type=net)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = f"delete {path} and fetch it again"
        raise InputError("net", "readable weights", reason, hint) from error
    return metric.net.eval()
