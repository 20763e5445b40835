"""Keys that two clients agree on, and what they make of them: masks and seals.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from gradinv_helpers.errors import check_count
from gradinv_helpers.federated.fixed_point import Residues
from gradinv_helpers.federated.secagg_messages import TamperedMessageError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import (
        X25519PrivateKey,
        X25519PublicKey,
    )
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise ImportError(
        "secure aggregation needs the package cryptography; install it with: "
        "pip install 'gradinv-helpers[federated]'"
    ) from error

SEED_BYTES = 31  # 248 bits: below the prime of the shares
KEY_BYTES = 32

# Every key serves one message only, so that the nonce need not change.
_NONCE = bytes(16)
_CHUNK = 2**16  # bytes of keystream at once: they stay in the cache


def random_bytes(seed: int | None, client: int) -> Callable[[int], bytes]:
    """A source of random bytes for one client.

    Args:
        seed: For lessons and tests: the same seed and client give the same bytes.
            ``None`` asks the operating system, as a real client must.
        client: Number of the client.

    Returns:
        A function from a count to as many bytes.

    Taught in: notebooks/09_secure_aggregation.
    """
    if seed is None:
        return os.urandom
    check_count("seed", seed, minimum=0)
    return np.random.default_rng((seed, client)).bytes


def derive_key(secret: bytes, purpose: str) -> bytes:
    """One key for one purpose out of a secret, by HKDF with SHA-256.

    Args:
        secret: Bytes that nobody can guess.
        purpose: Keys for different purposes tell nothing of each other.

    Returns:
        32 bytes.

    Source: Krawczyk and Eronen (2010), RFC 5869.
    Taught in: notebooks/09_secure_aggregation.
    """
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=purpose.encode()).derive(secret)


def public_key(seed: bytes) -> bytes:
    """The X25519 public key of the private key that a seed stands for.

    Source: Langley et al. (2016), RFC 7748.
    Taught in: notebooks/09_secure_aggregation.
    """
    return _private_key(seed).public_key().public_bytes_raw()


def agree(seed: bytes, peer: bytes, purpose: str) -> bytes:
    """The key that two clients share, and nobody who only sees both public keys.

    Args:
        seed: The seed of one's own private key.
        peer: The public key of the other client, 32 bytes.
        purpose: What the key is for.

    Returns:
        32 bytes, the same for both clients.

    Raises:
        TamperedMessageError: The public key is not a usable point.

    Source: Langley et al. (2016), RFC 7748.
    Taught in: notebooks/09_secure_aggregation.
    """
    try:
        shared = _private_key(seed).exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        raise TamperedMessageError(
            "public key", "32 bytes that make an X25519 key", peer.hex()
        ) from error
    return derive_key(shared, purpose)


def add_mask(values: Residues, key: bytes, *, sign: int = 1) -> None:
    """Add the mask of a key to numbers modulo 2**bits, in place.

    The mask is the ChaCha20 keystream, cut into words: no rejection is needed, since
    every word is a number modulo 2**bits.

    Args:
        values: (m,) unsigned integers.
        key: 32 bytes, for this mask alone.
        sign: 1 to add, -1 to subtract.

    Source: Nir and Langley (2018), RFC 8439, for the cipher.
    Taught in: notebooks/09_secure_aggregation.
    """
    stream = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
    change = np.add if sign > 0 else np.subtract
    zeros = bytes(_CHUNK)
    buffer = bytearray(_CHUNK)
    words = np.frombuffer(buffer, values.dtype)
    for start in range(0, len(values), len(words)):
        part = values[start : start + len(words)]
        stream.update_into(zeros, buffer)
        change(part, words[: len(part)], out=part)


def seal(key: bytes, text: bytes, address: str) -> bytes:
    """Encrypt a message so that any change to it or its address is noticed.

    Args:
        key: 32 bytes, for this message alone.
        text: The message.
        address: From whom to whom; authenticated, not encrypted.

    Returns:
        The ciphertext, 16 bytes longer than the message.

    Source: Nir and Langley (2018), RFC 8439 (ChaCha20-Poly1305).
    Taught in: notebooks/09_secure_aggregation.
    """
    return ChaCha20Poly1305(key).encrypt(_NONCE[:12], text, address.encode())


def open_seal(key: bytes, letter: bytes, address: str) -> bytes:
    """Decrypt a message.

    Raises:
        TamperedMessageError: Key, ciphertext or address are not those of ``seal``.

    Taught in: notebooks/09_secure_aggregation.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE[:12], letter, address.encode())
    except InvalidTag as error:
        raise TamperedMessageError(
            f"letter {address}", "an intact ciphertext", "one that fails its check"
        ) from error


def _private_key(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive_key(seed, "private key"))
