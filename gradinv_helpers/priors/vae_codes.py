r"""The law of a VAE's codes, class by class.

Training pulls the codes of all images together towards N(0, I), but those of one
class fill a part of that space only: a decoder that is given a class and a standard
normal code often draws another class. The codes of a class are close to Gaussian, so
their mean and covariance say where they are.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CodeLaw:
    r"""A Gaussian of the codes for every class: :math:`z = m_y + L_y u`.

    Args:
        means: (K, d), one row per class; one row in all for a VAE that is not told
            the class.
        roots: Lower triangular roots (K, d, d) of the covariances.
    """

    means: Tensor
    roots: Tensor

    def place(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Codes (rows, d) of standard normal latents (rows, d).

        Args:
            latents: (rows, d).
            classes: One row per latent, 1 at its class (rows, K), or (rows, 0).
        """
        means, roots = self._of(classes)
        return means + (roots @ latents[..., None])[..., 0]

    def whiten(self, codes: Tensor, classes: Tensor) -> Tensor:
        """The latents (rows, d) whose codes are ``codes``: undoes ``place``."""
        means, roots = self._of(classes)
        gaps = (codes - means)[..., None]
        return torch.linalg.solve_triangular(roots, gaps, upper=False)[..., 0]

    def log_volume(self, classes: Tensor) -> Tensor:
        """Log determinant (rows,) of each row's root."""
        return self._of(classes)[1].diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def to(self, like: Tensor) -> CodeLaw:
        """The same law with the type and on the device of ``like``."""
        return CodeLaw(self.means.to(like), self.roots.to(like))

    def _of(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and root of every row."""
        if classes.shape[1]:
            rows = classes.argmax(1)
        else:
            rows = torch.zeros(len(classes), dtype=torch.long, device=classes.device)
        return self.means[rows], self.roots[rows]


def standard_law(num_classes: int, size: int) -> CodeLaw:
    """N(0, I) for every class: the law that the training assumes."""
    count = max(num_classes, 1)
    return CodeLaw(torch.zeros(count, size), torch.eye(size).repeat(count, 1, 1))


def fit_code_law(means: Tensor, variances: Tensor, classes: Tensor) -> CodeLaw:
    r"""Match the moments of the encoder's Gaussians, class by class.

    A code z of class y is drawn by picking an image of that class and drawing from
    its q(z | x). That mixture has the mean :math:`m_y` of the encoder's means and a
    covariance that is theirs plus the mean of the encoder's variances; among all
    Gaussians, the one with these moments maximises the evidence lower bound of the
    images. A class is shrunk towards the covariance within all classes, which counts
    as d images, so that a few images do.

    Args:
        means: Encoder's means (N, d).
        variances: Encoder's variances (N, d).
        classes: Classes (N, K) as ones, or (N, 0).

    Returns:
        The law; a class without images has that of all images.

    Source: the moments of the aggregated posterior, as in Tomczak and Welling (2018),
    Section 2.
    Taught in: notebooks/05_vae_prior.
    """
    means, variances = means.double(), variances.double()
    size = means.shape[1]
    parts = classes.double() if classes.shape[1] else means.new_ones(len(means), 1)
    counts = parts.sum(0)
    centres = parts.T @ means / counts.clamp_min(1)[:, None]
    gaps = means - parts @ centres
    scatter = torch.einsum("nk,ni,nj->kij", parts, gaps, gaps)
    scatter = scatter + torch.diag_embed(parts.T @ variances)
    pooled = scatter.sum(0) / len(means)
    shrunk = (scatter + size * pooled) / (counts + size)[:, None, None]
    empty = counts == 0
    if bool(empty.any()):
        spread = means - means.mean(0)
        whole = spread.T @ spread / len(means) + variances.mean(0).diag()
        centres[empty], shrunk[empty] = means.mean(0), whole
    return CodeLaw(centres.float(), torch.linalg.cholesky(shrunk).float())
