import gzip
import io
import pickle
import struct
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from gradinv_helpers import data
from gradinv_helpers.data import DATASETS, Images, is_split, load_images
from gradinv_helpers.errors import InputError


def some_images(count=5, num_classes=3):
    pixels = torch.arange(count).reshape(-1, 1, 1, 1).expand(-1, 2, 3, 4) / 10
    names = tuple("abcdefghij"[:num_classes])
    return Images(pixels, torch.arange(count) % num_classes, names)


# Images


def test_images_convert_types_and_clamp_rounding():
    pixels = np.full((2, 1, 3, 3), 1 + 1e-6)
    images = Images(pixels, [1, 0], ["a", "b"])
    assert images.pixels.dtype == torch.float32
    assert float(images.pixels.max()) == 1.0
    assert images.labels.dtype == torch.int64
    assert images.class_names == ("a", "b")
    assert images.pixels.is_contiguous()


def test_images_drop_gradient_history():
    pixels = torch.zeros(1, 1, 2, 2, requires_grad=True)
    assert not Images(pixels, torch.tensor([0]), ("a",)).pixels.requires_grad


def test_images_properties():
    images = some_images()
    assert len(images) == 5
    assert images.shape == (2, 3, 4)
    assert images.num_classes == 3
    assert repr(images) == "Images(5 images of shape (2, 3, 4), 3 classes)"
    assert repr(images[0]) == "Images(1 image of shape (2, 3, 4), 3 classes)"


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (3, [3]),
        ([4, 0, 4], [4, 0, 4]),
        ((1, 2), [1, 2]),
        (slice(1, None, 2), [1, 3]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor(2), [2]),
        (np.array([0, 3]), [0, 3]),
        (np.int64(1), [1]),
        (range(2), [0, 1]),
        (torch.tensor([True, False, False, False, True]), [0, 4]),
    ],
)
def test_indexing(index, expected):
    images = some_images()
    chosen = images[index]
    assert isinstance(chosen, Images)
    assert torch.equal(chosen.pixels, images.pixels[expected])
    assert torch.equal(chosen.labels, images.labels[expected])
    assert chosen.class_names == images.class_names


def test_looping_stops():
    assert [int(image.labels) for image in some_images(4, 3)] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (5, "index: expected positions from 0 to 4, got 5"),
        (-1, "index: expected positions from 0 to 4, got -1"),
        ([0, 99], "index: expected positions from 0 to 4, got 99"),
        ([], "index: .*got none; choose at least one image"),
        (slice(3, 3), "index: .*got none"),
        ([0.5], "index: expected one axis of whole positions"),
        ([[0]], "index: expected one axis of whole positions"),
        (True, "index: expected one axis of whole positions"),
        ([True, False], "index: expected one axis of whole positions"),
        ("a", "index: expected a tensor, got str"),
    ],
)
def test_bad_index(index, message):
    with pytest.raises(InputError, match=message):
        some_images()[index]


PIXELS = torch.zeros(2, 1, 3, 3)
LABELS = torch.tensor([0, 1])
NAMES = ("a", "b")


@pytest.mark.parametrize(
    ("pixels", "labels", "names", "message"),
    [
        (
            torch.zeros(28, 28),
            LABELS,
            NAMES,
            r"images: expected shape \(N, C, H, W\), got \(28, 28\); "
            r"add a batch and a channel axis with images\[None, None\]",
        ),
        (
            torch.zeros(3, 8, 8),
            LABELS,
            NAMES,
            r"got \(3, 8, 8\); add a batch axis with images\[None\]",
        ),
        (torch.zeros(0, 1, 2, 2), LABELS, NAMES, "there must be at least one image"),
        (PIXELS.to(torch.complex64), LABELS, NAMES, "images: expected real numbers"),
        (PIXELS + float("nan"), LABELS, NAMES, "images: .*got NaN or infinite"),
        (PIXELS + float("inf"), LABELS, NAMES, "images: .*got NaN or infinite"),
        (PIXELS - float("inf"), LABELS, NAMES, "images: .*got NaN or infinite"),
        (PIXELS + 255, LABELS, NAMES, "values from 255 to 255; divide by 255"),
        (PIXELS - 1, LABELS, NAMES, "values from -1 to -1; rescale them"),
        ("pixels", LABELS, NAMES, "images: expected a tensor, got str"),
        (PIXELS, [0.0, 1.0], NAMES, r"labels: expected integers, got torch.float64"),
        (PIXELS, [0], NAMES, r"labels: expected shape \(2,\) for 2 images, got \(1,\)"),
        (PIXELS, [0, 2], NAMES, "labels: expected integers from 0 to 1, got 0 to 2"),
        (PIXELS, [0, -1], NAMES, "labels: expected integers from 0 to 1, got -1 to 0"),
        (PIXELS, None, NAMES, "labels: expected a tensor, got NoneType"),
        (PIXELS, LABELS, "ab", "class_names: expected a tuple"),
        (PIXELS, LABELS, (), "class_names: expected a tuple"),
        (PIXELS, LABELS, (0, 1), "class_names: expected a tuple"),
    ],
)
def test_bad_images(pixels, labels, names, message):
    with pytest.raises(InputError, match=message):
        Images(pixels, labels, names)


# Embedded data sets


@pytest.mark.parametrize(
    ("name", "shape", "counts", "num_classes"),
    [
        ("photos", (3, 32, 32), (600, 140), 10),
        ("digits", (1, 8, 8), (1437, 360), 10),
        ("faces", (1, 25, 25), (160, 40), 2),
    ],
)
def test_embedded_sets(name, shape, counts, num_classes):
    for split, count in zip(("train", "test"), counts, strict=True):
        images = load_images(name, split=split)
        assert len(images) == count
        assert images.shape == shape
        assert images.num_classes == num_classes
        assert images.labels.unique().tolist() == list(range(num_classes))
        again = load_images(name, split=split)
        assert torch.equal(images.pixels, again.pixels)
        again.pixels.zero_()
        assert torch.equal(images.pixels, load_images(name, split=split).pixels)
    assert is_split(name)
    assert load_images(name, split="test", image_size=16).shape == (shape[0], 16, 16)


def test_digits_are_the_rows_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = load_images("digits"), load_images("digits", split="test")
    together = torch.cat([train.pixels, test.pixels])[:, 0].numpy()
    np.testing.assert_array_equal(together * 16, digits.images)
    np.testing.assert_array_equal(torch.cat([train.labels, test.labels]), digits.target)


def test_faces_alternate_and_splits_share_no_image():
    train, test = load_images("faces"), load_images("faces", split="test")
    assert test.class_names == ("face", "non-face")
    assert test.labels[:4].tolist() == [0, 1, 0, 1]
    distance = torch.cdist(train.pixels.flatten(1), test.pixels.flatten(1))
    assert float(distance.min()) > 0.1


def test_photos_test_split_begins_with_one_whole_square_per_class():
    images = load_images("photos", split="test", image_size=64)
    assert images.class_names[0] == "astronaut"
    assert images.labels[:20].tolist() == list(range(10)) * 2
    # The second to fifth crop of a class are the quarters of the first.
    upper = torch.cat([images.pixels[10], images.pixels[20]], dim=2)
    lower = torch.cat([images.pixels[30], images.pixels[40]], dim=2)
    whole = torch.cat([upper, lower], dim=1)[None]
    small = torch.nn.functional.avg_pool2d(whole, 2)[0]
    assert float((small - images.pixels[0]).abs().mean()) < 0.02


def test_photos_train_crops_touch_no_pixel_of_a_test_square():
    for photo in data._PHOTOS:
        picture = data._read_photo(photo)
        used = np.zeros(picture.shape[:2], dtype=int)
        for top, left, side in data._test_windows(photo):
            assert side >= 32
            used[top : top + side, left : left + side] |= 1
        for top, left, side in data._train_windows(photo, picture):
            assert side >= 32
            used[top : top + side, left : left + side] |= 2
        assert used.max() == 2, photo.name
        assert (used == 1).sum() == photo.side**2


def test_a_missing_packaged_file_is_named(monkeypatch):
    lost = data._PHOTOS[0]._replace(path="data/lost.png")
    with pytest.raises(InputError, match="skimage: .*the file data/lost.png"):
        data._read_photo(lost)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "digit"}, "dataset: .*photos, digits, .*did you mean 'digits'"),
        ({"name": "digits", "split": "val"}, "split: expected one of train, test"),
        ({"name": "digits", "image_size": 0}, "image_size: .*at least 1, got 0"),
        ({"name": "digits", "image_size": 8.5}, "image_size: .*integer"),
        ({"name": "folder"}, "data_root: expected a folder with .*got None"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(InputError, match=message):
        load_images(**options)


# Downloaded data sets: small files in the published formats, never the network


@pytest.fixture
def no_network(monkeypatch):
    """Count the downloads that are tried; each fails like a machine without network."""
    tried = []

    def fail(url, *_, **__):
        tried.append(url)
        raise urllib.error.URLError("no network")

    from torchvision.datasets import cifar, mnist

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    monkeypatch.setattr(mnist, "download_and_extract_archive", fail)
    return tried


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
    ],
)
def test_without_network_and_file(name, by_hand, tmp_path, no_network, capsys):
    message = f"dataset {name}: .*no network.*; put .*{by_hand}.* by hand.*digits"
    with pytest.raises(InputError, match=message) as caught:
        load_images(name, data_root=tmp_path)
    assert no_network
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")
    assert is_split(name, tmp_path)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    rng = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "t10k-images-idx3-ubyte", rng.integers(0, 256, (4, 28, 28)))
    write_idx(raw / "t10k-labels-idx1-ubyte", np.array([7, 2, 1, 0]))
    return tmp_path


def test_mnist_from_files(mnist_root, no_network):
    images = load_images("mnist", data_root=mnist_root, split="test")
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, (4, 28, 28)) / 255
    np.testing.assert_allclose(images.pixels[:, 0], expected, rtol=1e-6)
    assert images.labels.tolist() == [7, 2, 1, 0]
    small = load_images("mnist", data_root=mnist_root, split="test", image_size=14)
    assert small.shape == (1, 14, 14)
    assert no_network == []


def test_fashion_mnist_has_names(mnist_root, no_network):
    (mnist_root / "MNIST").rename(mnist_root / "FashionMNIST")
    images = load_images("fashion_mnist", data_root=mnist_root, split="test")
    assert images.class_names[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t10k-images-idx3-ubyte", b""),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x03" + bytes(40)),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x04\x01"),
        ("t10k-labels-idx1-ubyte", b"<html>not found</html>"),
    ],
)
def test_damaged_mnist_file_is_named(mnist_root, name, content):
    path = mnist_root / "MNIST" / "raw" / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: expected a whole.*delete it"):
        load_images("mnist", data_root=mnist_root, split="test")


def test_mnist_files_that_disagree(mnist_root):
    raw = mnist_root / "MNIST" / "raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", np.array([7, 2, 1]))
    with pytest.raises(InputError, match="got 4 images and 3 labels"):
        load_images("mnist", data_root=mnist_root, split="test")
    write_idx(raw / "t10k-labels-idx1-ubyte", np.array([7, 2, 1, 10]))
    with pytest.raises(InputError, match="labels 1 to 10 for 10 classes"):
        load_images("mnist", data_root=mnist_root, split="test")


def test_mnist_compressed_files_put_by_hand(mnist_root, monkeypatch):
    """torchvision unpacks the published files; their checksums are replaced here."""
    import hashlib

    from torchvision.datasets import MNIST

    raw = mnist_root / "MNIST" / "raw"
    resources = []
    for prefix in ("train", "t10k"):
        for end in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            source = raw / f"t10k-{end}"
            packed = raw / f"{prefix}-{end}.gz"
            packed.write_bytes(gzip.compress(source.read_bytes()))
            digest = hashlib.md5(packed.read_bytes()).hexdigest()
            resources.append((packed.name, digest))
    for end in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (raw / f"t10k-{end}").unlink()
    monkeypatch.setattr(MNIST, "resources", resources)
    assert len(load_images("mnist", data_root=mnist_root)) == 4


CIFAR_PIXELS = np.random.default_rng(1).integers(0, 256, (3, 3072)).astype(np.uint8)


def write_cifar(root, name, *, protocol=2, python2=False, labels=(2, 0, 1)):
    """Write small files with the names and keys of the published ones."""
    if name == "cifar100":
        folder, files, key = root / "cifar-100-python", ["train", "test"], "fine_labels"
        meta, names_key = "meta", "fine_label_names"
    else:
        folder, key = root / "cifar-10-batches-py", "labels"
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        meta, names_key = "batches.meta", "label_names"
    folder.mkdir(parents=True)
    batch = {"data": CIFAR_PIXELS, key: list(labels), "batch_label": "small"}
    for file in files:
        content = pickle.dumps(batch, protocol=protocol)
        (folder / file).write_bytes(as_python2(content) if python2 else content)
    content = pickle.dumps({names_key: ["apple", "bear", "cup"]}, protocol=protocol)
    (folder / meta).write_bytes(content)
    return folder


def as_python2(content):
    """Name numpy's modules as the published files of 2009 do."""
    return content.replace(b"cnumpy._core.", b"cnumpy.core.")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar_python_format(name, protocol, tmp_path, no_network):
    write_cifar(tmp_path, name, protocol=protocol, python2=protocol == 2)
    images = load_images(name, data_root=tmp_path, split="test")
    expected = CIFAR_PIXELS.reshape(3, 3, 32, 32) / 255
    np.testing.assert_allclose(images.pixels, expected, rtol=1e-6)
    assert images.labels.tolist() == [2, 0, 1]
    assert images.class_names == ("apple", "bear", "cup")
    batches = 5 if name == "cifar10" else 1
    assert len(load_images(name, data_root=tmp_path)) == 3 * batches
    assert no_network == []


def test_cifar_text_that_python_2_wrote(tmp_path):
    """In the published files, keys and array contents are Python 2 strings."""
    folder = write_cifar(tmp_path, "cifar100")
    raw = CIFAR_PIXELS.tobytes()
    text = b"".join(
        [
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n",
            b"(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x03M\x00\x0c\x86",
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff",
            b"J\xff\xff\xff\xffK\x00tb\x89T",
            struct.pack("<I", len(raw)),
            raw,
            b"tbU\x0bfine_labels](K\x02K\x00K\x01eu.",
        ]
    )
    assert pickle.loads(text, encoding="bytes")[b"fine_labels"] == [2, 0, 1]
    (folder / "test").write_bytes(text)
    images = load_images("cifar100", data_root=tmp_path, split="test")
    expected = CIFAR_PIXELS.reshape(3, 3, 32, 32) / 255
    np.testing.assert_allclose(images.pixels, expected, rtol=1e-6)


@pytest.mark.parametrize("labels", [np.array([2, 0, 1]), tuple(np.int64([2, 0, 1]))])
def test_cifar_labels_may_be_numpy_integers(labels, tmp_path):
    folder = write_cifar(tmp_path, "cifar100")
    batch = {"data": np.asfortranarray(CIFAR_PIXELS), "fine_labels": labels}
    (folder / "test").write_bytes(pickle.dumps(batch, protocol=2))
    images = load_images("cifar100", data_root=tmp_path, split="test")
    assert images.labels.tolist() == [2, 0, 1]
    assert float(images.pixels[1].flatten()[5] * 255) == pytest.approx(
        CIFAR_PIXELS[1, 5]
    )


def test_cifar_binary_format(tmp_path, no_network):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rows = np.column_stack([[9, 9, 9], [2, 0, 1], CIFAR_PIXELS]).astype(np.uint8)
    rows.tofile(folder / "test.bin")
    (folder / "fine_label_names.txt").write_text("apple\nbear\ncup\n")
    images = load_images("cifar100", data_root=tmp_path, split="test")
    assert images.labels.tolist() == [2, 0, 1]
    assert images.class_names == ("apple", "bear", "cup")

    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in range(1, 6):
        rows[:, 1:].tofile(folder / f"data_batch_{number}.bin")
    (folder / "batches.meta.txt").write_text("apple\nbear\ncup\n\n")
    images = load_images("cifar10", data_root=tmp_path)
    assert len(images) == 15
    expected = CIFAR_PIXELS.reshape(3, 3, 32, 32) / 255
    np.testing.assert_allclose(images.pixels[3:6], expected, rtol=1e-6)

    (folder / "data_batch_2.bin").write_bytes(bytes(3000))
    with pytest.raises(InputError, match="data_batch_2.bin: .*got 3000 bytes"):
        load_images("cifar10", data_root=tmp_path)
    assert no_network == []


class Hostile:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_pickles(mark):
    """Files that would create the file ``mark`` if any of their code were run."""
    import builtins
    import codecs
    import os

    return {
        "system": Hostile(os.system, f"touch {mark}"),
        "open": {"data": Hostile(io.open, str(mark), "w")},
        "eval": [Hostile(builtins.eval, f"open({str(mark)!r}, 'w')")],
        "codec": Hostile(codecs.encode, "x", "rot13"),
        "objects": np.array([None, {}], dtype=object),
        "record": np.zeros(2, dtype=[("a", "u1")]),
    }


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("kind", list(hostile_pickles("")))
@pytest.mark.parametrize("file", ["test", "meta"])
def test_hostile_pickle_is_refused_not_run(kind, protocol, file, tmp_path):
    folder = write_cifar(tmp_path, "cifar100")
    mark = tmp_path / "mark"
    content = pickle.dumps(hostile_pickles(mark)[kind], protocol=protocol)
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file}: expected a .*delete it"):
        load_images("cifar100", data_root=tmp_path, split="test")
    assert not mark.exists()


def test_hostile_pickle_names_what_it_called(tmp_path):
    folder = write_cifar(tmp_path, "cifar100")
    (folder / "test").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match=r"calls os\.system; nothing was run"):
        load_images("cifar100", data_root=tmp_path, split="test")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": CIFAR_PIXELS}, "no images with fine_labels"),
        ({"data": CIFAR_PIXELS, "fine_labels": [0, 1]}, "3 images and 2 labels"),
        ({"data": CIFAR_PIXELS, "fine_labels": [0, 1, 3]}, "0 to 3 for 3 classes"),
        ({"data": CIFAR_PIXELS, "fine_labels": ["a"] * 3}, "no images with"),
        ({"data": CIFAR_PIXELS[:, :9], "fine_labels": [0, 1, 2]}, "no images with"),
        ({"data": CIFAR_PIXELS * 1.0, "fine_labels": [0, 1, 2]}, "array type 'f8'"),
        ({"data": CIFAR_PIXELS.astype(int), "fine_labels": [0, 1, 2]}, "int64"),
        ([1, 2], "a list instead of a dictionary"),
    ],
)
def test_cifar_file_with_other_content(batch, message, tmp_path):
    folder = write_cifar(tmp_path, "cifar100")
    (folder / "test").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(InputError, match=f"test: expected a whole data.*{message}"):
        load_images("cifar100", data_root=tmp_path, split="test")


@pytest.mark.parametrize("kept", [0, 1, 40, 200, 5000, -1])
def test_cifar_file_that_is_cut_off(kept, tmp_path):
    folder = write_cifar(tmp_path, "cifar100")
    path = folder / "test"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"test: .*a damaged one.*delete it"):
        load_images("cifar100", data_root=tmp_path, split="test")


def test_cifar_meta_without_names(tmp_path):
    folder = write_cifar(tmp_path, "cifar100")
    (folder / "meta").write_bytes(pickle.dumps({"other": 1}))
    with pytest.raises(InputError, match="meta: .*no list 'fine_label_names'"):
        load_images("cifar100", data_root=tmp_path, split="test")


# The reader's own images


def write_image(path, colour, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def photo_folder(tmp_path):
    write_image(tmp_path / "dog" / "b.png", (255, 0, 0))
    write_image(tmp_path / "dog" / "a.JPG", (0, 0, 255), size=(20, 90))
    write_image(tmp_path / "cat" / "sub" / "c.png", 128, mode="L")
    write_image(tmp_path / "cat" / ".hidden.png", 0, mode="L")
    write_image(tmp_path / ".ipynb_checkpoints" / "x.png", 0, mode="L")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "readme.txt").write_text("not a class")
    return tmp_path


def test_folder(photo_folder):
    images = load_images("folder", data_root=str(photo_folder))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1]
    assert images.shape == (3, 32, 32)
    assert images.pixels[0].unique().tolist() == [pytest.approx(128 / 255)]
    assert float(images.pixels[1, 2].mean()) > 0.95  # a.JPG is blue
    assert images.pixels[2, :, 0, 0].tolist() == [1, 0, 0]  # b.png is red
    test = load_images("folder", data_root=photo_folder, split="test")
    assert torch.equal(test.pixels, images.pixels)
    assert not is_split("folder", photo_folder)
    small = load_images("folder", data_root=photo_folder, image_size=8)
    assert small.shape == (3, 8, 8)


def test_folder_cuts_out_the_centre_and_turns_by_the_camera_note(tmp_path):
    picture = Image.new("RGB", (60, 20), (0, 0, 0))
    picture.paste((255, 255, 255), (20, 0, 40, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "a").mkdir()
    picture.save(tmp_path / "a" / "1.png")
    picture.save(tmp_path / "a" / "2.png", exif=exif)
    images = load_images("folder", data_root=tmp_path, image_size=20)
    assert images.pixels[0, 0, :, 0].tolist() == [1] * 10 + [0] * 10
    assert images.pixels[1, 0, :, 0].tolist() == [0] * 10 + [1] * 10


def test_folder_scales_16_bit_grey(tmp_path):
    write_image(tmp_path / "a" / "1.png", 32768, mode="I;16")
    images = load_images("folder", data_root=tmp_path)
    assert float(images.pixels.mean()) == pytest.approx(32768 / 65535)


def test_folder_with_train_and_test(tmp_path):
    write_image(tmp_path / "train" / "cat" / "1.png", (0, 0, 0))
    write_image(tmp_path / "train" / "dog" / "1.png", (0, 0, 0))
    write_image(tmp_path / "test" / "dog" / "1.png", (255, 255, 255))
    assert is_split("folder", tmp_path)
    assert load_images("folder", data_root=tmp_path).labels.tolist() == [0, 1]
    test = load_images("folder", data_root=tmp_path, split="test")
    assert test.labels.tolist() == [1]
    assert test.class_names == ("cat", "dog")
    assert float(test.pixels.min()) == 1


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="data_root: .*none', which is no folder"):
        load_images("folder", data_root=tmp_path / "none")
    with pytest.raises(InputError, match="data_root: .*which is no folder"):
        is_split("folder", tmp_path / "none")
    with pytest.raises(InputError, match="data_root: .*no images below.*sub-folder"):
        load_images("folder", data_root=tmp_path)
    write_image(tmp_path / "cat" / "1.png", (0, 0, 0))
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="data_root: .*none in .*dog'; fill it"):
        load_images("folder", data_root=tmp_path)


@pytest.mark.parametrize("name", ["a.JPG", "b.png"])
@pytest.mark.parametrize("kept", [0, 0.2, 0.5])
def test_damaged_image_is_named(photo_folder, name, kept):
    path = photo_folder / "dog" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=f"{name}: expected an image.*remove it"):
        load_images("folder", data_root=photo_folder)


def test_every_name_is_documented():
    for name in DATASETS:
        assert f"``{name}``" in load_images.__doc__
