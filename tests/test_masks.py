"""Two clients get the same key, and nobody sees it in the mask."""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_helpers.errors import InputError
from gradinv_helpers.federated import masks
from gradinv_helpers.federated.masks import (
    SEED_BYTES,
    add_mask,
    agree,
    derive_key,
    open_seal,
    public_key,
    random_bytes,
    seal,
)
from gradinv_helpers.federated.secagg_messages import TamperedMessageError


def seed(number: int) -> bytes:
    return number.to_bytes(SEED_BYTES)


def mask(key: bytes, size: int, dtype: str = "<u4") -> np.ndarray:
    values = np.zeros(size, dtype)
    add_mask(values, key)
    return values


# --- keys -------------------------------------------------------------------------


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 for one block, written out with the standard library."""
    extracted = hmac.digest(bytes(32), secret, hashlib.sha256)
    return hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def ladder(scalar: bytes, point: bytes) -> bytes:
    """X25519 of RFC 7748 with Python's integers."""
    p = 2**255 - 19
    k = int.from_bytes(scalar, "little") & ~7 & (2**255 - 1) | 2**254
    k &= 2**255 - 1
    x1 = int.from_bytes(point, "little") % 2**255
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a, c * b
        x3, z3 = (da + cb) ** 2 % p, x1 * (da - cb) ** 2 % p
        aa, bb = a * a % p, b * b % p
        e = aa - bb
        x2, z2 = aa * bb % p, e * (aa + 121665 * e) % p
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, -1, p) % p).to_bytes(32, "little")


def test_derived_key_is_hkdf() -> None:
    assert derive_key(b"secret", "purpose") == hkdf(b"secret", b"purpose")


def test_agreement_is_x25519_and_hkdf() -> None:
    """Against both standards, written out here."""
    base = (9).to_bytes(32, "little")
    own = hkdf(seed(1), b"private key")
    peer = ladder(hkdf(seed(2), b"private key"), base)
    assert public_key(seed(2)) == peer
    assert agree(seed(1), peer, "mask") == hkdf(ladder(own, peer), b"mask")


@given(st.integers(0, 2**248 - 1), st.integers(0, 2**248 - 1))
@settings(max_examples=30, deadline=None)
def test_both_sides_get_the_same_key(one: int, other: int) -> None:
    a, b = seed(one), seed(other)
    assert agree(a, public_key(b), "x") == agree(b, public_key(a), "x")
    assert agree(a, public_key(b), "x") != agree(a, public_key(b), "y")


@pytest.mark.parametrize("bad", [bytes(32), b"short", (1).to_bytes(32, "little")])
def test_unusable_public_key(bad: bytes) -> None:
    """Points of low order would make the key the same for everybody."""
    with pytest.raises(TamperedMessageError, match="public key: expected 32 bytes"):
        agree(seed(1), bad, "x")


# --- masks ------------------------------------------------------------------------


def quarter(state: list[int], a: int, b: int, c: int, d: int) -> None:
    for left, right, other, turn in (
        (a, b, d, 16),
        (c, d, b, 12),
        (a, b, d, 8),
        (c, d, b, 7),
    ):
        state[left] = (state[left] + state[right]) % 2**32
        mixed = state[other] ^ state[left]
        state[other] = (mixed << turn | mixed >> (32 - turn)) % 2**32


def chacha_block(key: bytes, counter: int) -> bytes:
    """RFC 8439, Section 2.3, with nonce zero."""
    words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *words, counter, 0, 0, 0]
    state = list(start)
    for _ in range(10):
        for i in range(4):
            quarter(state, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(state, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    total = [(a + b) % 2**32 for a, b in zip(state, start, strict=True)]
    return b"".join(word.to_bytes(4, "little") for word in total)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8"])
def test_mask_is_the_keystream(dtype: str) -> None:
    key = bytes(range(32))
    stream = b"".join(chacha_block(key, i) for i in range(3))
    expected = np.frombuffer(stream, dtype)
    assert np.array_equal(mask(key, len(expected), dtype), expected)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8"])
@pytest.mark.parametrize("size", [1, 5, 2**14 - 1, 2**14, 2**15 + 3, 70_001])
def test_masks_cancel_and_chunks_do_not_show(dtype: str, size: int) -> None:
    key = derive_key(b"k", "m")
    values = np.arange(size).astype(dtype)
    masked = values.copy()
    add_mask(masked, key)
    assert np.array_equal(masked - values, mask(key, 100_000, dtype)[:size])
    add_mask(masked, key, sign=-1)
    assert np.array_equal(masked, values)


def test_different_keys_give_unrelated_masks() -> None:
    one = mask(derive_key(b"k", "1"), 20_000).astype(float)
    other = mask(derive_key(b"k", "2"), 20_000).astype(float)
    assert abs(float(np.corrcoef(one, other)[0, 1])) < 4 / np.sqrt(20_000)
    shifted = np.corrcoef(one[1:], one[:-1])[0, 1]
    assert abs(float(shifted)) < 4 / np.sqrt(20_000)


# --- seals ------------------------------------------------------------------------


@given(st.binary(max_size=200))
@settings(max_examples=20, deadline=None)
def test_seal_round_trip(text: bytes) -> None:
    key = derive_key(b"k", "seal")
    letter = seal(key, text, "from 1 to 2")
    assert len(letter) == len(text) + 16
    assert open_seal(key, letter, "from 1 to 2") == text


def test_any_changed_bit_is_noticed() -> None:
    key = derive_key(b"k", "seal")
    letter = seal(key, b"two shares", "1 to 2")
    for place in range(8 * len(letter)):
        changed = bytearray(letter)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(TamperedMessageError, match="an intact ciphertext"):
            open_seal(key, bytes(changed), "1 to 2")
    for wrong_key, wrong, address in (
        (derive_key(b"k", "other"), letter, "1 to 2"),
        (key, letter, "1 to 3"),
        (key, letter[:-1], "1 to 2"),
        (key, b"", "1 to 2"),
    ):
        with pytest.raises(TamperedMessageError):
            open_seal(wrong_key, wrong, address)


# --- randomness -------------------------------------------------------------------


def test_seeded_bytes_repeat_and_differ_between_clients() -> None:
    assert random_bytes(5, 1)(40) == random_bytes(5, 1)(40)
    assert random_bytes(5, 1)(40) != random_bytes(5, 2)(40)
    assert random_bytes(5, 1)(40) != random_bytes(6, 1)(40)


def test_without_a_seed_nothing_repeats() -> None:
    draw = random_bytes(None, 1)
    assert len(draw(31)) == 31
    assert random_bytes(None, 1)(31) != draw(31)


def test_bad_seed() -> None:
    with pytest.raises(InputError, match="seed: expected an integer of at least 0"):
        random_bytes(-1, 0)


def test_without_cryptography_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    spec = importlib.util.spec_from_file_location("masks_again", masks.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(
        ImportError, match=r"pip install 'gradinv-helpers\[federated\]'"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
