"""Images with labels, and the data sets of the book.

Three data sets come inside scikit-learn and scikit-image and need no network
(``digits``, ``photos``, ``faces``); four are downloaded once by torchvision; and
``folder`` reads the reader's own pictures. Every data set has a fixed ``train`` and
``test`` split: models and priors learn from ``train``, the images that an attack tries
to recover come from ``test``.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.errors import InputError, check_choice, check_count
from gradinv_helpers.files import expand_home

if TYPE_CHECKING:
    from PIL.Image import Image

DatasetName = Literal[
    "photos",
    "digits",
    "faces",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "folder",
]
Split = Literal["train", "test"]

DATASETS: tuple[str, ...] = get_args(DatasetName)
EMBEDDED_DATASETS = ("photos", "digits", "faces")
DEFAULT_DATA_ROOT = "~/.torch"

RANGE_TOLERANCE = 1e-4  # rounding of a resize may leave [0, 1] by this much
RESIZE_BATCH = 4096  # images resized at once, to bound the memory
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer

DIGITS_TEST_IMAGES = 360
FACES_TEST_IMAGES_PER_CLASS = 20
PHOTOS_TRAIN_CROPS = 60
PHOTOS_FLAT = 0.02  # less contrast than this: the black rim around the retina

Arrays = tuple[Tensor, Tensor, tuple[str, ...]]  # pixels, labels, class names


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """A set of labelled images of one size.

    ``images[3]``, ``images[[1, 5]]``, ``images[:10]`` and ``images[tensor]`` are
    ``Images`` again; a loop goes over them one by one.

    Args:
        pixels: (N, C, H, W), values in [0, 1]; kept as float32.
        labels: (N,), integers from 0 to the number of classes minus 1; kept as int64.
        class_names: One name for each class.

    Raises:
        InputError: A shape, a value or a label is wrong, or there is no image.

    Example:
        >>> images = Images(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), ("a", "b"))
        >>> images[1:].shape, len(images), images.num_classes
        ((1, 4, 4), 2, 2)

    Taught in: notebooks/01_fl_guarantees.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = _check_names(self.class_names)
        pixels = _check_pixels(_as_tensor("images", self.pixels))
        labels = _check_labels(
            _as_tensor("labels", self.labels), len(pixels), len(names)
        )
        object.__setattr__(self, "pixels", pixels)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(
        self, index: int | slice | Sequence[int] | Tensor | NDArray[Any]
    ) -> Images:
        chosen = _as_indices(index, len(self)).to(self.pixels.device)
        return Images(self.pixels[chosen], self.labels[chosen], self.class_names)

    def __iter__(self) -> Iterator[Images]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        count = f"{len(self)} image" + ("s" if len(self) != 1 else "")
        return f"Images({count} of shape {self.shape}, {self.num_classes} classes)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each of them has an image here."""
        return len(self.class_names)


def load_images(
    name: str,
    *,
    data_root: str | Path | None = None,
    split: Split = "train",
    image_size: int | None = None,
) -> Images:
    """Load one split of a data set.

    - ``photos``: 600 / 140 colour crops of 10 photographs, 32x32, embedded
    - ``digits``: 1437 / 360 handwritten digits, grey, 8x8, embedded
    - ``faces``: 160 / 40 faces and non-faces, grey, 25x25, embedded
    - ``mnist``, ``fashion_mnist``: 60000 / 10000, grey, 28x28, downloaded
    - ``cifar10``, ``cifar100``: 50000 / 10000, colour, 32x32, downloaded
    - ``folder``: your own images, one sub-folder per class, 32x32

    The two numbers are the images of the train and the test split, which are fixed.
    ``digits``: the last 360 rows are the test split (rows that stand together mostly
    come from the same writer). ``photos``: one square region of every photograph is
    the test split and no training crop touches it; images 0 to 9 of the test split
    are the ten whole regions. ``faces``: the last 20 of each class. ``folder``: a
    folder that holds ``train/`` and ``test/`` has these two splits; any other folder
    gives all its images for either split (see ``is_split``). They are sorted by class
    and path and become RGB; the centre square is cut out and resized.

    Args:
        name: One of ``DATASETS``.
        data_root: Where downloads are kept, default ``~/.torch``; for ``folder`` the
            folder itself. Files that are there already are used without network.
        split: ``train`` or ``test``.
        image_size: Height and width in pixels; the native size if ``None``. Resized
            with an antialiased bilinear filter.

    Returns:
        The images, in a fixed order.

    Raises:
        InputError: An unknown name or split, a download that fails, or a file that is
            damaged or holds code.

    Source: digits: Alpaydin and Kaynak (1998); faces: Huang et al. (2007); MNIST:
    LeCun et al. (1998); Fashion-MNIST: Xiao et al. (2017); CIFAR: Krizhevsky (2009).
    Taught in: notebooks/01_fl_guarantees.
    """
    check_choice("dataset", name, DATASETS)
    check_choice("split", split, get_args(Split))
    if image_size is not None:
        check_count("image_size", image_size)
    if name == "folder":
        return Images(*_read_folder(_folder_root(data_root), split, image_size or 32))
    if name in EMBEDDED_DATASETS:
        pixels, labels, names = _embedded(name, split, image_size)
        return Images(pixels.clone(), labels.clone(), names)
    root = expand_home(data_root or DEFAULT_DATA_ROOT)
    read = _read_mnist if name.endswith("mnist") else _read_cifar
    pixels, labels, names = read(name, root, split)
    if image_size is not None:
        pixels = _resize(pixels, image_size, image_size)
    return Images(pixels, labels, names)


def is_split(name: str, data_root: str | Path | None = None) -> bool:
    """Say whether the train and test images of a data set are different images.

    False only for a ``folder`` without ``train/`` and ``test/``: both splits are then
    all its images, and a caller that needs unseen images must hold some out.

    Raises:
        InputError: An unknown name, or ``folder`` with a folder that is missing.
    """
    check_choice("dataset", name, DATASETS)
    return name != "folder" or _has_splits(_folder_root(data_root))


# Checks of Images


def _as_tensor(argument: str, value: object) -> Tensor:
    """Turn an array or a nested list into a tensor without history."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        # torch.tensor copies, so that arrays of any stride and read-only ones work.
        return torch.tensor(np.ascontiguousarray(cast(Any, value)))
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(value).__name__
        raise InputError(argument, "a tensor", got) from error


def _check_names(names: object) -> tuple[str, ...]:
    """Return the class names as a tuple."""
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = tuple(names)
        if names and all(isinstance(name, str) for name in names):
            return names
    raise InputError("class_names", "a tuple with one text per class", repr(names)[:60])


def _check_pixels(pixels: Tensor) -> Tensor:
    """Return (N, C, H, W) float32 pixels in [0, 1]."""
    if pixels.ndim != 4 or 0 in pixels.shape:
        missing = 4 - pixels.ndim
        hint = {
            1: "add a batch axis with images[None]",
            2: "add a batch and a channel axis with images[None, None]",
        }.get(missing, "")
        if 0 in pixels.shape:
            hint = "there must be at least one image and one pixel"
        raise InputError("images", "shape (N, C, H, W)", tuple(pixels.shape), hint)
    if pixels.is_complex():
        raise InputError("images", "real numbers in [0, 1]", str(pixels.dtype))
    pixels = pixels.to(torch.float32).contiguous()
    low, high = (float(value) for value in pixels.aminmax())
    if not (low > -float("inf") and high < float("inf")):  # also false for NaN
        raise InputError("images", "finite values in [0, 1]", "NaN or infinite values")
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        hint = "divide by 255" if low >= 0 and 2 < high <= 255 else "rescale them"
        got = f"values from {low:g} to {high:g}"
        raise InputError("images", "values in [0, 1]", got, hint)
    return pixels.clamp(0, 1) if low < 0 or high > 1 else pixels


def _check_labels(labels: Tensor, count: int, num_classes: int) -> Tensor:
    """Return (N,) int64 labels in the range of the classes."""
    whole = not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.dtype == torch.bool:
        raise InputError("labels", "integers", str(labels.dtype), "use labels.long()")
    if labels.shape != (count,):
        raise InputError(
            "labels",
            f"shape ({count},) for {count} images",
            tuple(labels.shape),
            "give one label to each image",
        )
    labels = labels.to(torch.int64).contiguous()
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise InputError(
            "labels",
            f"integers from 0 to {num_classes - 1}",
            f"{int(labels.min())} to {int(labels.max())}",
            "class_names must name every class",
        )
    return labels


def _as_indices(index: object, count: int) -> Tensor:
    """Turn what stands in the brackets into a tensor of valid positions."""
    valid = f"positions from 0 to {count - 1}"
    if isinstance(index, slice):
        index = list(range(count)[index])
    elif isinstance(index, int) and not isinstance(index, bool):
        index = [index]
    chosen = _as_tensor("index", index)
    if chosen.dtype == torch.bool and chosen.shape == (count,):
        chosen = chosen.nonzero().flatten()
    chosen = chosen.reshape(1) if chosen.ndim == 0 else chosen
    if chosen.numel() == 0:
        raise InputError("index", valid, "none", "choose at least one image")
    whole = not (chosen.is_floating_point() or chosen.is_complex())
    if chosen.ndim != 1 or not whole or chosen.dtype == torch.bool:
        raise InputError(
            "index", f"one axis of whole {valid}", f"{chosen.dtype} of {chosen.ndim}d"
        )
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if len(outside):
        raise InputError("index", valid, int(outside[0]))
    return chosen.long()


# Embedded data sets


def _embedded(name: str, split: Split, image_size: int | None) -> Arrays:
    """Read an embedded data set; the result is kept and must not be changed."""
    readers: dict[str, tuple[Callable[[Split, int], Arrays], int]] = {
        "photos": (_read_photos, 32),
        "digits": (_read_digits, 8),
        "faces": (_read_faces, 25),
    }
    read, native_size = readers[name]
    return read(split, image_size or native_size)


@lru_cache(maxsize=4)
def _read_digits(split: Split, size: int) -> Arrays:
    """The digits of scikit-learn, 16 grey levels, 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = slice(-DIGITS_TEST_IMAGES, None)
    if split == "train":
        rows = slice(None, -DIGITS_TEST_IMAGES)
    pixels = torch.tensor(digits.images[rows] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[rows], dtype=torch.int64)
    names = tuple(str(digit) for digit in range(10))
    return _resize(pixels[:, None], size, size), labels, names


@lru_cache(maxsize=4)
def _read_faces(split: Split, size: int) -> Arrays:
    """The LFW subset of scikit-image: 100 faces, then 100 patches without a face."""
    with _packaged("skimage", "data/lfw_subset.npy").open("rb") as file:
        both = torch.tensor(np.load(file, allow_pickle=False), dtype=torch.float32)
    rows = slice(-FACES_TEST_IMAGES_PER_CLASS, None)
    if split == "train":
        rows = slice(None, -FACES_TEST_IMAGES_PER_CLASS)
    pixels = torch.stack([both[:100][rows], both[100:][rows]], dim=1)  # (n, 2, 25, 25)
    labels = torch.tensor([0, 1]).repeat(len(pixels))
    pixels = pixels.flatten(0, 1)[:, None]
    return _resize(pixels, size, size), labels, ("face", "non-face")


class _Photo(NamedTuple):
    """A packaged photograph and the square of it that is kept for the test split."""

    name: str
    package: str
    path: str
    top: int
    left: int
    side: int


# The squares were chosen by hand so that they show the subject. Units: pixels.
_PHOTOS = (
    _Photo("astronaut", "skimage", "data/astronaut.png", 8, 130, 190),
    _Photo("cat", "skimage", "data/chelsea.png", 48, 120, 226),
    _Photo("coffee", "skimage", "data/coffee.png", 10, 165, 250),
    _Photo("rocket", "skimage", "data/rocket.jpg", 128, 180, 285),
    _Photo("retina", "skimage", "data/retina.jpg", 450, 30, 420),
    _Photo("tissue", "skimage", "data/ihc.png", 304, 215, 200),
    _Photo("galaxy", "skimage", "data/hubble_deep_field.jpg", 350, 600, 250),
    _Photo("motorcycle", "skimage", "data/motorcycle_left.png", 72, 312, 388),
    _Photo("temple", "sklearn", "datasets/images/china.jpg", 20, 75, 310),
    _Photo("flower", "sklearn", "datasets/images/flower.jpg", 75, 165, 285),
)

_Window = tuple[int, int, int]  # top, left, side


@lru_cache(maxsize=4)
def _read_photos(split: Split, size: int) -> Arrays:
    """Square crops of ten photographs, class by class in turn."""
    crops = []
    for photo in _PHOTOS:
        picture = _read_photo(photo)
        windows = _test_windows(photo)
        if split == "train":
            windows = _train_windows(photo, picture)
        crops.append(torch.cat([_crop(picture, window, size) for window in windows]))
    pixels = torch.stack(crops, dim=1)  # (crops, classes, 3, size, size)
    labels = torch.arange(len(_PHOTOS)).repeat(len(pixels))
    return pixels.flatten(0, 1), labels, tuple(photo.name for photo in _PHOTOS)


@lru_cache(maxsize=len(_PHOTOS))
def _read_photo(photo: _Photo) -> NDArray[np.uint8]:
    """Read one packaged photograph as (H, W, 3)."""
    from PIL import Image

    with _packaged(photo.package, photo.path).open("rb") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def _packaged(package: str, path: str) -> Any:
    """Find a file inside an installed package; it is never downloaded."""
    file = resources.files(package).joinpath(path)
    if not file.is_file():
        raise InputError(
            package, f"a package with the file {path}", "none", "install it again"
        )
    return file


def _test_windows(photo: _Photo) -> list[_Window]:
    """The whole test square, its four quarters and its nine ninths."""
    windows = []
    for parts in (1, 2, 3):
        side = photo.side // parts
        for row in range(parts):
            for column in range(parts):
                windows.append(
                    (photo.top + row * side, photo.left + column * side, side)
                )
    return windows


def _train_windows(photo: _Photo, picture: NDArray[np.uint8]) -> list[_Window]:
    """Windows of several sizes that share no pixel with the test square.

    Of all windows that overlap by two thirds, an evenly spaced choice is kept, so that
    every photograph has the same number.
    """
    height, width, _ = picture.shape
    windows = []
    for divisor in (1, 1.5, 2, 3, 4):
        side = round(photo.side / divisor)
        for top in range(0, height - side + 1, side // 3):
            for left in range(0, width - side + 1, side // 3):
                beside = (
                    top + side <= photo.top
                    or top >= photo.top + photo.side
                    or left + side <= photo.left
                    or left >= photo.left + photo.side
                )
                crop = picture[top : top + side, left : left + side]
                if beside and crop.std() > PHOTOS_FLAT * 255:
                    windows.append((top, left, side))
    kept = np.linspace(0, len(windows) - 1, PHOTOS_TRAIN_CROPS).round().astype(int)
    return [windows[i] for i in kept]


def _crop(picture: NDArray[np.uint8], window: _Window, size: int) -> Tensor:
    """Cut out a window and resize it to (1, 3, size, size)."""
    top, left, side = window
    crop = _to_pixels(picture[top : top + side, left : left + side])
    return _resize(crop, size, size)


def _to_pixels(picture: NDArray[Any], highest: int = 255) -> Tensor:
    """(H, W, 3) integers to (1, 3, H, W) in [0, 1]."""
    pixels = torch.tensor(np.ascontiguousarray(picture), dtype=torch.float32)
    return pixels.permute(2, 0, 1)[None] / highest


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize (N, C, H, W) with an antialiased bilinear filter."""
    if pixels.shape[2:] == (height, width):
        return pixels
    parts = [
        F.interpolate(
            part,
            size=(height, width),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        ).clamp_(0, 1)
        for part in pixels.split(RESIZE_BATCH)
    ]
    return torch.cat(parts)


# Downloaded data sets


def _download(name: str, root: Path, by_hand: str, fetch: Callable[[], Any]) -> Any:
    """Run a download of torchvision and explain what to do when it fails.

    torchvision checks what it downloads. Its own notes are not shown, and a server
    that does not answer counts as a failure.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return fetch()
    except Exception as error:  # network, disk, checksum: one message for all
        raise InputError(
            f"dataset {name}",
            f"its files in {root} or a download",
            f"neither ({_last_line(error)})",
            f"put {by_hand} by hand, or use an embedded data set: "
            + ", ".join(EMBEDDED_DATASETS),
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _last_line(error: Exception) -> str:
    """The last line of an error's text, which names the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


def _damaged(path: Path, problem: object) -> InputError:
    """The error for a data file that cannot be read."""
    hint = "delete it and fetch the data set again"
    return InputError(str(path), "a whole data file", problem, hint)


def _read_mnist(name: str, root: Path, split: Split) -> Arrays:
    """Read MNIST or Fashion-MNIST, which share one format."""
    from torchvision import datasets
    from torchvision.datasets import mnist

    kind = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    raw = root / kind.__name__ / "raw"
    prefix = "train" if split == "train" else "t10k"
    image_file = raw / f"{prefix}-images-idx3-ubyte"
    label_file = raw / f"{prefix}-labels-idx1-ubyte"
    if image_file.is_file() and label_file.is_file():
        pixels = _read_idx(mnist.read_image_file, image_file)
        labels = _read_idx(mnist.read_label_file, label_file)
    else:
        by_hand = f"the published *-ubyte.gz files into {raw}"
        dataset = _download(
            name,
            raw,
            by_hand,
            lambda: kind(root, train=split == "train", download=True),
        )
        pixels, labels = dataset.data, dataset.targets
    names = tuple(str(digit) for digit in range(10))
    if name == "fashion_mnist":
        names = tuple(kind.classes)
    _check_file(image_file, len(pixels), labels, names)
    return pixels[:, None].float().div_(255), labels, names


def _read_idx(read: Callable[[str], Tensor], path: Path) -> Tensor:
    """Read one file in MNIST's format."""
    try:
        return read(str(path))
    except Exception as error:  # the reader checks with assert and with indexing
        raise _damaged(path, "one that is cut off or has another format") from error


def _check_file(path: Path, count: int, labels: Tensor, names: tuple[str, ...]) -> None:
    """Check what a data file says against itself, so that errors name the file."""
    if count == 0 or len(labels) != count:
        raise _damaged(path, f"{count} images and {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= len(names):
        got = f"labels {int(labels.min())} to {int(labels.max())}"
        raise _damaged(path, f"{got} for {len(names)} classes")


def _read_cifar(name: str, root: Path, split: Split) -> Arrays:
    """Read CIFAR-10 or CIFAR-100 (fine labels) in the Python or the binary format."""
    from torchvision.datasets import cifar

    kind = cifar.CIFAR10 if name == "cifar10" else cifar.CIFAR100
    listed = kind.train_list if split == "train" else kind.test_list
    folder = root / kind.base_folder
    files = [folder / entry[0] for entry in listed]
    meta = folder / kind.meta["filename"]
    if not all(file.is_file() for file in [*files, meta]):
        binary = _read_cifar_binary(name, root, [entry[0] for entry in listed])
        if binary is not None:
            return binary
        by_hand = f"{kind.filename} or its folder {kind.base_folder} into {root}"
        _download(
            name,
            folder,
            by_hand,
            lambda: cifar.download_and_extract_archive(
                kind.url, str(root), filename=kind.filename, md5=kind.tgz_md5
            ),
        )
    names = _cifar_names(meta, kind.meta["key"])
    key = "labels" if name == "cifar10" else "fine_labels"
    parts = [_cifar_batch(file, key, names) for file in files]
    pixels, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return pixels.float().div_(255), labels, names


def _cifar_names(path: Path, key: str) -> tuple[str, ...]:
    """Read the class names of CIFAR's Python format."""
    names = _read_pickle(path).get(key)
    if not isinstance(names, list) or not names:
        raise _damaged(path, f"no list {key!r}")
    return tuple(str(_text(name)) for name in names)


def _cifar_batch(path: Path, key: str, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Read (N, 3, 32, 32) bytes and (N,) labels of CIFAR's Python format."""
    batch = _read_pickle(path)
    try:
        data = np.array(batch["data"])
        labels = torch.tensor(np.array(batch[key]).astype(np.int64, casting="safe"))
        if data.dtype != np.uint8:
            raise TypeError(f"data of type {data.dtype}")
        pixels = torch.tensor(data).reshape(-1, 3, 32, 32)
        labels = labels.reshape(-1)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"no images with {key} ({_last_line(error)})") from error
    _check_file(path, len(pixels), labels, names)
    return pixels, labels


def _read_cifar_binary(name: str, root: Path, listed: list[str]) -> Arrays | None:
    """Read CIFAR's binary format: label bytes, then 3072 colour bytes, per image."""
    fine = name == "cifar100"
    folder = root / ("cifar-100-binary" if fine else "cifar-10-batches-bin")
    files = [folder / f"{entry}.bin" for entry in listed]
    name_file = folder / ("fine_label_names.txt" if fine else "batches.meta.txt")
    if not all(file.is_file() for file in [*files, name_file]):
        return None
    names = tuple(name_file.read_text(encoding="utf-8", errors="replace").split())
    label_bytes = 2 if fine else 1  # CIFAR-100: the coarse label, then the fine one
    pixels, labels = [], []
    for file in files:
        content = np.fromfile(file, dtype=np.uint8)
        if len(content) % (label_bytes + 3072) or not len(content) or not names:
            raise _damaged(file, f"{len(content)} bytes, which are not whole images")
        rows = torch.from_numpy(content).reshape(-1, label_bytes + 3072)
        pixels.append(rows[:, label_bytes:].reshape(-1, 3, 32, 32))
        labels.append(rows[:, label_bytes - 1].long())
        _check_file(file, len(pixels[-1]), labels[-1], names)
    return torch.cat(pixels).float().div_(255), torch.cat(labels), names


# A pickle file can run any code when it is read. The reader below builds plain values
# and arrays only, through its own stand-ins for the few numpy names that CIFAR's files
# mention, and refuses every other name before anything runs.


def _read_pickle(path: Path) -> dict[str, Any]:
    """Read a dictionary of plain values and arrays; never run code from the file."""
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _damaged(path, f"a damaged one ({_last_line(error)})") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"a {type(content).__name__} instead of a dictionary")
    return {str(_text(key)): value for key, value in content.items()}


def _text(value: object) -> object:
    """Python 2 wrote text as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else value


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows numpy arrays by their stand-ins and nothing else."""

    def __init__(self, file: io.BufferedIOBase, path: Path):
        super().__init__(cast(Any, file), encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Give the stand-in for a name, or refuse the file."""
        stand_in = _STAND_INS.get((module.replace("._core.", ".core."), name))
        if stand_in is None:
            raise InputError(
                str(self.path),
                "a data file with arrays, text and numbers only",
                f"one that calls {module}.{name}",
                "nothing was run; delete it and fetch the data set again",
            )
        return stand_in


class _PlainType:
    """Stand-in for ``numpy.dtype``: integers of 1 to 8 bytes only."""

    def __init__(self, code: object, *_: object):
        text = str(_text(code))
        if text not in {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"}:
            raise pickle.UnpicklingError(f"array type {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = str(_text(state[1]))
        self.dtype = self.dtype.newbyteorder(cast(Any, order if order in "<>" else "="))


class _PlainArray:
    """Stand-in for ``numpy.ndarray``, filled by ``__setstate__``."""

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0, dtype=np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, column_major, content = state
        order: Literal["F", "C"] = "F" if column_major else "C"
        self.values = _plain_values(content, kind, shape, order)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.values if dtype is None else self.values.astype(dtype)


def _plain_values(
    content: object, kind: _PlainType, shape: Any, order: Literal["F", "C"] = "C"
) -> NDArray[Any]:
    """Bytes to an array."""
    raw = content.encode("latin1") if isinstance(content, str) else content
    values = np.frombuffer(cast(Any, raw), dtype=kind.dtype)
    return values.reshape(shape, order=order)


def _plain_scalar(kind: _PlainType, content: object) -> int:
    """Stand-in for numpy's scalars."""
    return int(_plain_values(content, kind, (1,))[0])


def _plain_bytes(text: str, encoding: object = "latin1") -> bytes:
    """Stand-in for ``codecs.encode``, with which Python 3 writes bytes for Python 2."""
    if _text(encoding) not in {"latin1", "latin-1"}:
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _PlainType,
    ("numpy", "ndarray"): _PlainArray,
    ("numpy.core.multiarray", "_reconstruct"): _PlainArray,
    ("numpy.core.multiarray", "scalar"): _plain_scalar,
    ("numpy.core.numeric", "_frombuffer"): _plain_values,
    ("_codecs", "encode"): _plain_bytes,
}


# The reader's own images


def _folder_root(data_root: str | Path | None) -> Path:
    """The folder of the data set ``folder``."""
    expected = "a folder with one sub-folder of images per class"
    if data_root is None:
        raise InputError("data_root", expected, None)
    root = expand_home(data_root)
    if not root.is_dir():
        raise InputError("data_root", expected, f"{str(root)!r}, which is no folder")
    return root


def _has_splits(root: Path) -> bool:
    return (root / "train").is_dir() and (root / "test").is_dir()


def _read_folder(root: Path, split: Split, size: int) -> Arrays:
    """Read a folder of images, sorted by class and path.

    Classes are numbered in the order of their names, as torchvision's ``ImageFolder``
    does. Names that begin with a dot are left out: notebook and system folders.
    """
    splits = _has_splits(root)
    tops = [root / "train", root / "test"] if splits else [root]
    names = sorted({entry for top in tops for entry in _class_folders(top)})
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = _image_files((root / split if splits else root) / name)
        if not found and not splits:
            raise InputError(
                "data_root",
                "images in every class folder",
                f"none in {str(root / name)!r}",
                "fill it or remove it",
            )
        files += found
        labels += [label] * len(found)
    if not files:
        raise InputError(
            "data_root",
            "one sub-folder of images per class",
            f"no images below {str(root / split if splits else root)!r}",
            "put the images of each class into a sub-folder with its name",
        )
    pixels = torch.cat([_read_image(file, size) for file in files])
    return pixels, torch.tensor(labels), tuple(names)


def _class_folders(top: Path) -> list[str]:
    try:
        return [
            entry.name
            for entry in top.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        ]
    except OSError as error:
        raise InputError(
            "data_root", "a folder that can be read", f"{str(top)!r} ({error.strerror})"
        ) from error


def _image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted by path."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMG_EXTENSIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def _read_image(path: Path, size: int) -> Tensor:
    """Read the centre square of one image as (1, 3, size, size)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            pixels = _rgb_pixels(ImageOps.exif_transpose(file))
    except Exception as error:  # image readers raise many types for a damaged file
        raise InputError(
            str(path),
            "an image that can be read",
            f"a damaged one ({_last_line(error)})",
            "replace or remove it",
        ) from error
    height, width = pixels.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[:, :, top : top + side, left : left + side]
    return _resize(square, size, size)


def _rgb_pixels(image: Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]; 16-bit grey, which Pillow would clip, is scaled."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        return _to_pixels(np.stack([grey] * 3, axis=-1), highest=65535)
    return _to_pixels(np.asarray(image.convert("RGB")))
