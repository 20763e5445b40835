"""What a client can do to its update before sending it.

Every defence states on the update what its protocol makes public, so that an attack
can be adapted to it.
"""

from __future__ import annotations

from gradinv_helpers.defences.common import Defence, defend
from gradinv_helpers.defences.mixing import mixup_update
from gradinv_helpers.defences.noise import GaussianNoise
from gradinv_helpers.defences.pruning import TopK
from gradinv_helpers.defences.quantisation import Sign, StochasticQuantisation
from gradinv_helpers.defences.representation import soteria_update

__all__ = [
    "Defence",
    "GaussianNoise",
    "Sign",
    "StochasticQuantisation",
    "TopK",
    "defend",
    "mixup_update",
    "soteria_update",
]
