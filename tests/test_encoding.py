"""What an update may say of how it was encoded, and how long it is then."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from gradinv_helpers.data import Images
from gradinv_helpers.defences import GaussianNoise, Sign, TopK, defend
from gradinv_helpers.encoding import Encoding
from gradinv_helpers.errors import InputError
from gradinv_helpers.explain import explain_update
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import SharedUpdate, local_update


def update_of(seed: int = 0) -> SharedUpdate:
    model = build_model("mlp", in_channels=1, image_size=8, num_classes=4)
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return local_update(model, Images(pixels, torch.tensor([1, 3]), tuple("abcd")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "huffman", "scales": {"a": 1.0}}, "encoding.kind: expected one of"),
        ({"kind": "sign"}, "encoding.scales: expected at least one tensor"),
        ({"kind": "mixed", "scales": {"a": 1.0}}, "encoding.scales: expected no"),
        ({"kind": "sign", "scales": {"a": math.inf}}, "expected a finite number"),
        ({"kind": "sign", "scales": {"a": -1.0}}, "expected a finite number"),
        ({"kind": "pruned", "scales": 0.1}, "a mapping from names to numbers"),
        ({"kind": "quantised", "scales": {"a": 1.0}}, "encoding.bits: expected"),
        ({"kind": "sign", "scales": {"a": 1.0}, "bits": 2}, "expected None for kind"),
    ],
)
def test_bad_encodings(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Encoding(**given)


def test_scales_are_read_only_and_travel() -> None:
    encoding = Encoding("pruned", {"a": math.inf})
    with pytest.raises(TypeError):
        encoding.scales["a"] = 0.0  # type: ignore[index]
    for same in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert same == encoding
    defended = defend(update_of(), Sign())
    back = pickle.loads(pickle.dumps(defended))
    assert back.encoding == defended.encoding


@pytest.mark.parametrize(
    ("kind", "scale", "bits", "fits", "contradicts"),
    [
        ("pruned", 0.5, None, [0.0, 0.5, -2.0], [0.0, 0.4, 1.0]),
        ("pruned", math.inf, None, [0.0, 1e-9, 3.0], None),
        ("sign", 0.5, None, [0.5, -0.5, 0.5], [0.5, 0.0, 0.5]),
        ("quantised", 0.5, 3, [1.5, -0.5, 0.0], [2.0, 0.0, 0.0]),
        ("quantised", 0.5, 3, [1.5, -0.5, 0.0], [0.3, 0.0, 0.0]),
        ("quantised", 0.0, 3, [0.0, 0.0, 0.0], [0.1, 0.0, 0.0]),
    ],
)
def test_entries_fit_their_encoding(kind, scale, bits, fits, contradicts) -> None:
    encoding = Encoding(kind, {"a": scale}, bits)
    encoding.check({"a": torch.tensor(fits), "b": torch.tensor([0.123])})
    if contradicts is not None:
        with pytest.raises(InputError, match=r"tensors\['a'\]: expected .*1 other"):
            encoding.check({"a": torch.tensor(contradicts)})
    with pytest.raises(InputError, match="names of tensors, got 'a'"):
        encoding.check({"b": torch.tensor(fits)})


def test_an_update_checks_its_encoding() -> None:
    update = update_of()
    scales = dict.fromkeys(update.tensors, 0.1)
    with pytest.raises(InputError, match="plus or minus 0.1"):
        dataclasses.replace(update, encoding=Encoding("sign", scales))
    with pytest.raises(InputError, match="an Encoding or None, got str"):
        dataclasses.replace(update, encoding="sign")


@pytest.mark.parametrize(
    ("encoding", "tensor", "expected"),
    [
        # 100 entries of 4 bytes: 10 values and 10 indices of 7 bits, then a bit mask
        (Encoding("pruned", {"a": 0.0}), torch.arange(100.0) >= 90, 10 * 4 + 9),
        (Encoding("pruned", {"a": 0.0}), torch.arange(100.0) >= 50, 50 * 4 + 13),
        (Encoding("sign", {"a": 1.0}), torch.ones(100), 13 + 4),
        (Encoding("quantised", {"a": 1.0}, 3), torch.ones(100), 38 + 4),
        (Encoding("sign", {"b": 1.0}), torch.ones(100), 400),
    ],
)
def test_bytes(encoding: Encoding, tensor: torch.Tensor, expected: int) -> None:
    assert encoding.num_bytes({"a": tensor.float()}) == expected


def test_an_update_counts_encoded_bytes() -> None:
    update = update_of()
    entries = sum(t.numel() for t in update.tensors.values())
    assert update.num_bytes == 4 * entries
    signs = defend(update, Sign())
    assert entries / 8 <= signs.num_bytes <= entries / 8 + 5 * len(update.tensors)
    assert dataclasses.replace(signs, encoding=None).num_bytes == 4 * entries


def test_an_encoded_update_states_no_gradient() -> None:
    signs = defend(update_of(), Sign())
    with pytest.raises(InputError, match=r"encoded \(sign\); use attack 'gaussian-map"):
        signs.gradient()
    face = dataclasses.replace(signs, encoding=None).gradient()
    assert all(torch.equal(face[n], t) for n, t in signs.tensors.items())


def test_aggregates_carry_no_encoding() -> None:
    one, other = (defend(update_of(seed), TopK(0.1)) for seed in (0, 1))
    assert aggregate([one]).encoding is None
    assert aggregate([one, other]).encoding is None
    mixed = dataclasses.replace(update_of(), encoding=Encoding("mixed"))
    assert aggregate([mixed, update_of(1)]).encoding == Encoding("mixed")
    assert aggregate([mixed, other]).encoding is None


def test_what_may_follow_what() -> None:
    pruned = defend(update_of(), TopK(0.1))
    for late in (GaussianNoise(0.1), TopK(0.5), Sign()):
        with pytest.raises(InputError, match="not encoded yet, got encoding 'pruned'"):
            defend(pruned, late)
    with pytest.raises(InputError, match="normalise first"):
        normalize(pruned)
    noisy = defend(update_of(), GaussianNoise(0.1), TopK(0.1))
    assert noisy.noise_std == 0.1
    assert defend(normalize(update_of()), Sign()).normalized


def test_replaced_tensors_keep_the_encoding() -> None:
    signs = defend(update_of(), Sign())
    turned = signs.replace_tensors({n: -t for n, t in signs.tensors.items()})
    assert turned.encoding == signs.encoding


def test_explained() -> None:
    told = str(explain_update(defend(update_of(), Sign()), measure="counted"))
    assert "encoded" in told
    assert "sign: rank and spectrum are those of what was computed" in told
    assert "encoded" not in str(explain_update(update_of(), measure="counted"))
