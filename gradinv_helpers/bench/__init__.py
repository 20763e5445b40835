"""Measurements behind the book's and the README's figures: ``gradinv bench``.

Every suite compares with the recipe of the paper, written plainly in ``recipes``, in
the same run.
"""

from __future__ import annotations

SUITES: tuple[str, ...] = (
    "single",
    "trials",
    "labels",
    "table1",
    "networks",
    "batch",
    "wall",
    "fedavg",
    "learning-rate",
    "priors",
    "diffusion",
    "heterogeneity",
    "privacy",
    "secagg",
    "defences",
)
