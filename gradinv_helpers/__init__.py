"""Measure what a federated-learning update reveals about the images behind it.

The package is one straight pipe, and each step is one call::

    import gradinv_helpers as gi

    images = gi.load_images("photos", split="test")
    model = gi.build_model("lenet", in_channels=3, image_size=32, num_classes=10)
    update = gi.local_update(model, images[[0]])
    reconstruction = gi.invert(update)
    print(gi.score(reconstruction, images[[0]]))

Names are loaded when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradinv_helpers import plots as plots
    from gradinv_helpers import widgets as widgets
    from gradinv_helpers.attacks.alignment import align_images as align_images
    from gradinv_helpers.attacks.analytic import (
        linear_layer_input as linear_layer_input,
    )
    from gradinv_helpers.attacks.batch_size import BatchSize as BatchSize
    from gradinv_helpers.attacks.batch_size import (
        infer_num_samples as infer_num_samples,
    )
    from gradinv_helpers.attacks.certificate import Certificate as Certificate
    from gradinv_helpers.attacks.certificate import LayerSolution as LayerSolution
    from gradinv_helpers.attacks.class_proportions import (
        infer_class_proportions as infer_class_proportions,
    )
    from gradinv_helpers.attacks.clipping import clipped as clipped
    from gradinv_helpers.attacks.denoising import DenoisingUpdate as DenoisingUpdate
    from gradinv_helpers.attacks.denoising import denoising_update as denoising_update
    from gradinv_helpers.attacks.denoising_search import (
        DenoisingEstimate as DenoisingEstimate,
    )
    from gradinv_helpers.attacks.denoising_search import (
        invert_denoising as invert_denoising,
    )
    from gradinv_helpers.attacks.denoising_steps import (
        TimestepEstimate as TimestepEstimate,
    )
    from gradinv_helpers.attacks.denoising_steps import infer_timestep as infer_timestep
    from gradinv_helpers.attacks.differencing import (
        difference_updates as difference_updates,
    )
    from gradinv_helpers.attacks.diffusion_latent import (
        diffusion_latent as diffusion_latent,
    )
    from gradinv_helpers.attacks.diffusion_posterior import (
        diffusion_posterior as diffusion_posterior,
    )
    from gradinv_helpers.attacks.exact import ExactSolution as ExactSolution
    from gradinv_helpers.attacks.exact import invert_exactly as invert_exactly
    from gradinv_helpers.attacks.gradinvdiff import gradinvdiff as gradinvdiff
    from gradinv_helpers.attacks.gradinversion import BatchMoments as BatchMoments
    from gradinv_helpers.attacks.gradinversion import (
        GradInversionWeights as GradInversionWeights,
    )
    from gradinv_helpers.attacks.gradinversion import known_moments as known_moments
    from gradinv_helpers.attacks.invert import invert as invert
    from gradinv_helpers.attacks.invert import invert_clients as invert_clients
    from gradinv_helpers.attacks.jacobian import JacobianRank as JacobianRank
    from gradinv_helpers.attacks.jacobian import jacobian_rank as jacobian_rank
    from gradinv_helpers.attacks.joint_separation import (
        separate_jointly as separate_jointly,
    )
    from gradinv_helpers.attacks.label_search import (
        infer_encoded_labels as infer_encoded_labels,
    )
    from gradinv_helpers.attacks.labels import infer_label_counts as infer_label_counts
    from gradinv_helpers.attacks.labels import infer_labels as infer_labels
    from gradinv_helpers.attacks.laplace import (
        LaplaceApproximation as LaplaceApproximation,
    )
    from gradinv_helpers.attacks.laplace import (
        laplace_approximation as laplace_approximation,
    )
    from gradinv_helpers.attacks.learning_rate import (
        LearningRateEstimate as LearningRateEstimate,
    )
    from gradinv_helpers.attacks.learning_rate import (
        infer_learning_rate as infer_learning_rate,
    )
    from gradinv_helpers.attacks.learning_rate import (
        learning_rate_profile as learning_rate_profile,
    )
    from gradinv_helpers.attacks.map_search import MapEstimate as MapEstimate
    from gradinv_helpers.attacks.map_search import Stage as Stage
    from gradinv_helpers.attacks.map_search import map_estimate as map_estimate
    from gradinv_helpers.attacks.posterior import Posterior as Posterior
    from gradinv_helpers.attacks.reconstruction import Reconstruction as Reconstruction
    from gradinv_helpers.attacks.reconstruction import Step as Step
    from gradinv_helpers.attacks.reconstruction import TrialReport as TrialReport
    from gradinv_helpers.attacks.replay import local_batches as local_batches
    from gradinv_helpers.attacks.replay import replay_map as replay_map
    from gradinv_helpers.attacks.sampling import CalibrationRanks as CalibrationRanks
    from gradinv_helpers.attacks.sampling import PosteriorSamples as PosteriorSamples
    from gradinv_helpers.attacks.sampling import calibration_ranks as calibration_ranks
    from gradinv_helpers.attacks.sampling import (
        effective_sample_size as effective_sample_size,
    )
    from gradinv_helpers.attacks.sampling import sample_posterior as sample_posterior
    from gradinv_helpers.attacks.sampling import split_r_hat as split_r_hat
    from gradinv_helpers.attacks.separation import Separation as Separation
    from gradinv_helpers.attacks.separation import separate_batch as separate_batch
    from gradinv_helpers.attacks.unmixing import mixing_weights as mixing_weights
    from gradinv_helpers.attacks.unmixing import unmix as unmix
    from gradinv_helpers.checkpoints import load_checkpoint as load_checkpoint
    from gradinv_helpers.checkpoints import save_checkpoint as save_checkpoint
    from gradinv_helpers.classifier import Classifier as Classifier
    from gradinv_helpers.classifier import accuracy as accuracy
    from gradinv_helpers.classifier import train_classifier as train_classifier
    from gradinv_helpers.config import Settings as Settings
    from gradinv_helpers.config import load_config as load_config
    from gradinv_helpers.data import Images as Images
    from gradinv_helpers.data import load_images as load_images
    from gradinv_helpers.defences import GaussianNoise as GaussianNoise
    from gradinv_helpers.defences import Sign as Sign
    from gradinv_helpers.defences import (
        StochasticQuantisation as StochasticQuantisation,
    )
    from gradinv_helpers.defences import TopK as TopK
    from gradinv_helpers.defences import defend as defend
    from gradinv_helpers.defences import mixup_update as mixup_update
    from gradinv_helpers.defences import soteria_update as soteria_update
    from gradinv_helpers.encoding import Encoding as Encoding
    from gradinv_helpers.errors import InputError as InputError
    from gradinv_helpers.explain import Explanation as Explanation
    from gradinv_helpers.explain import explain_update as explain_update
    from gradinv_helpers.federated.aggregation import aggregate as aggregate
    from gradinv_helpers.federated.aggregation import apply_update as apply_update
    from gradinv_helpers.federated.aggregation import normalize as normalize
    from gradinv_helpers.federated.fixed_point import FixedPoint as FixedPoint
    from gradinv_helpers.federated.heterogeneity import (
        label_histograms as label_histograms,
    )
    from gradinv_helpers.federated.heterogeneity import (
        total_variation as total_variation,
    )
    from gradinv_helpers.federated.heterogeneity import (
        update_similarity as update_similarity,
    )
    from gradinv_helpers.federated.rounds import FederatedRun as FederatedRun
    from gradinv_helpers.federated.rounds import RoundReport as RoundReport
    from gradinv_helpers.federated.rounds import evaluate_model as evaluate_model
    from gradinv_helpers.federated.rounds import model_bytes as model_bytes
    from gradinv_helpers.federated.rounds import train_federated as train_federated
    from gradinv_helpers.federated.secagg_client import SecAggClient as SecAggClient
    from gradinv_helpers.federated.secagg_messages import (
        AdvertisedKeys as AdvertisedKeys,
    )
    from gradinv_helpers.federated.secagg_messages import (
        BelowThresholdError as BelowThresholdError,
    )
    from gradinv_helpers.federated.secagg_messages import MaskedInput as MaskedInput
    from gradinv_helpers.federated.secagg_messages import (
        RefusedRequestError as RefusedRequestError,
    )
    from gradinv_helpers.federated.secagg_messages import (
        RepeatedMessageError as RepeatedMessageError,
    )
    from gradinv_helpers.federated.secagg_messages import SealedShares as SealedShares
    from gradinv_helpers.federated.secagg_messages import SecAggError as SecAggError
    from gradinv_helpers.federated.secagg_messages import (
        SecAggSettings as SecAggSettings,
    )
    from gradinv_helpers.federated.secagg_messages import (
        TamperedMessageError as TamperedMessageError,
    )
    from gradinv_helpers.federated.secagg_messages import (
        UnmaskingRequest as UnmaskingRequest,
    )
    from gradinv_helpers.federated.secagg_messages import (
        UnmaskingShares as UnmaskingShares,
    )
    from gradinv_helpers.federated.secagg_server import SecAggServer as SecAggServer
    from gradinv_helpers.federated.secure_aggregation import SecureSum as SecureSum
    from gradinv_helpers.federated.secure_aggregation import paper_bytes as paper_bytes
    from gradinv_helpers.federated.secure_aggregation import (
        secure_aggregate as secure_aggregate,
    )
    from gradinv_helpers.federated.secure_aggregation import secure_sum as secure_sum
    from gradinv_helpers.federated.shamir import lagrange_weights as lagrange_weights
    from gradinv_helpers.federated.shamir import recover_secret as recover_secret
    from gradinv_helpers.federated.shamir import split_secret as split_secret
    from gradinv_helpers.identifiability import Identification as Identification
    from gradinv_helpers.identifiability import identify as identify
    from gradinv_helpers.image_metrics import registered_psnr as registered_psnr
    from gradinv_helpers.intervals import bootstrap_interval as bootstrap_interval
    from gradinv_helpers.intervals import share_interval as share_interval
    from gradinv_helpers.metrics import LeakageScore as LeakageScore
    from gradinv_helpers.metrics import score as score
    from gradinv_helpers.models import Normalize as Normalize
    from gradinv_helpers.models import build_model as build_model
    from gradinv_helpers.partition import Client as Client
    from gradinv_helpers.partition import partition as partition
    from gradinv_helpers.perceptual import perceptual_distance as perceptual_distance
    from gradinv_helpers.priors.diffusion import DiffusionPrior as DiffusionPrior
    from gradinv_helpers.priors.diffusion import train_diffusion as train_diffusion
    from gradinv_helpers.priors.gaussian import CovariancePrior as CovariancePrior
    from gradinv_helpers.priors.gaussian import ImagePrior as ImagePrior
    from gradinv_helpers.priors.gaussian import SpectrumPrior as SpectrumPrior
    from gradinv_helpers.priors.gaussian import fit_gaussian as fit_gaussian
    from gradinv_helpers.priors.gaussian import spectrum_prior as spectrum_prior
    from gradinv_helpers.priors.library import load_prior as load_prior
    from gradinv_helpers.priors.vae import SoftVAEPrior as SoftVAEPrior
    from gradinv_helpers.priors.vae import VAEPrior as VAEPrior
    from gradinv_helpers.priors.vae_training import train_vae as train_vae
    from gradinv_helpers.privacy import PrivateNoise as PrivateNoise
    from gradinv_helpers.privacy import epsilon_spent as epsilon_spent
    from gradinv_helpers.privacy import gaussian_delta as gaussian_delta
    from gradinv_helpers.privacy import gaussian_epsilon as gaussian_epsilon
    from gradinv_helpers.privacy import noise_multiplier_for as noise_multiplier_for
    from gradinv_helpers.privacy import per_sample_gradients as per_sample_gradients
    from gradinv_helpers.privacy import privacy_profile as privacy_profile
    from gradinv_helpers.privacy import private_aggregate as private_aggregate
    from gradinv_helpers.privacy import private_update as private_update
    from gradinv_helpers.private_training import PrivateStep as PrivateStep
    from gradinv_helpers.private_training import PrivateTraining as PrivateTraining
    from gradinv_helpers.private_training import train_private as train_private
    from gradinv_helpers.reconstruction_bound import candidate_bound as candidate_bound
    from gradinv_helpers.reconstruction_bound import (
        candidate_likelihoods as candidate_likelihoods,
    )
    from gradinv_helpers.reconstruction_bound import (
        reconstruction_bound as reconstruction_bound,
    )
    from gradinv_helpers.reconstruction_bound import (
        reconstruction_bound_of_epsilon as reconstruction_bound_of_epsilon,
    )
    from gradinv_helpers.updates import LocalTraining as LocalTraining
    from gradinv_helpers.updates import SharedUpdate as SharedUpdate
    from gradinv_helpers.updates import local_update as local_update

_HOMES = {
    "data": ("Images", "load_images"),
    "partition": ("Client", "partition"),
    "models": ("Normalize", "build_model"),
    "classifier": ("Classifier", "accuracy", "train_classifier"),
    "checkpoints": ("load_checkpoint", "save_checkpoint"),
    "updates": ("LocalTraining", "SharedUpdate", "local_update"),
    "defences": (
        "GaussianNoise",
        "defend",
        "TopK",
        "Sign",
        "StochasticQuantisation",
        "soteria_update",
        "mixup_update",
    ),
    "federated.aggregation": ("aggregate", "apply_update", "normalize"),
    "attacks.analytic": ("linear_layer_input",),
    "attacks.certificate": ("Certificate", "LayerSolution"),
    "attacks.exact": ("ExactSolution", "invert_exactly"),
    "attacks.jacobian": ("JacobianRank", "jacobian_rank"),
    "attacks.batch_size": ("BatchSize", "infer_num_samples"),
    "attacks.labels": ("infer_label_counts", "infer_labels"),
    "attacks.separation": ("Separation", "separate_batch"),
    "attacks.joint_separation": ("separate_jointly",),
    "attacks.replay": ("local_batches", "replay_map"),
    "attacks.map_search": ("MapEstimate", "Stage", "map_estimate"),
    "explain": ("Explanation", "explain_update"),
    "priors.gaussian": (
        "CovariancePrior",
        "ImagePrior",
        "SpectrumPrior",
        "fit_gaussian",
        "spectrum_prior",
    ),
    "attacks.alignment": ("align_images",),
    "attacks.clipping": ("clipped",),
    "attacks.denoising": ("DenoisingUpdate", "denoising_update"),
    "attacks.denoising_search": ("DenoisingEstimate", "invert_denoising"),
    "attacks.denoising_steps": ("TimestepEstimate", "infer_timestep"),
    "attacks.diffusion_latent": ("diffusion_latent",),
    "attacks.diffusion_posterior": ("diffusion_posterior",),
    "attacks.gradinvdiff": ("gradinvdiff",),
    "attacks.laplace": ("LaplaceApproximation", "laplace_approximation"),
    "attacks.posterior": ("Posterior",),
    "attacks.sampling": (
        "CalibrationRanks",
        "PosteriorSamples",
        "calibration_ranks",
        "effective_sample_size",
        "sample_posterior",
        "split_r_hat",
    ),
    "priors.diffusion": ("DiffusionPrior", "train_diffusion"),
    "priors.library": ("load_prior",),
    "priors.vae": ("SoftVAEPrior", "VAEPrior"),
    "priors.vae_training": ("train_vae",),
    "attacks.reconstruction": ("Reconstruction", "Step", "TrialReport"),
    "attacks.invert": ("invert", "invert_clients"),
    "metrics": ("LeakageScore", "score"),
    "identifiability": ("Identification", "identify"),
    "image_metrics": ("registered_psnr",),
    "perceptual": ("perceptual_distance",),
    "intervals": ("bootstrap_interval", "share_interval"),
    "config": ("Settings", "load_config"),
    "errors": ("InputError",),
    "federated.secure_aggregation": (
        "SecureSum",
        "paper_bytes",
        "secure_aggregate",
        "secure_sum",
    ),
    "federated.secagg_client": ("SecAggClient",),
    "federated.secagg_server": ("SecAggServer",),
    "federated.secagg_messages": (
        "AdvertisedKeys",
        "BelowThresholdError",
        "MaskedInput",
        "RefusedRequestError",
        "RepeatedMessageError",
        "SealedShares",
        "SecAggError",
        "SecAggSettings",
        "TamperedMessageError",
        "UnmaskingRequest",
        "UnmaskingShares",
    ),
    "federated.fixed_point": ("FixedPoint",),
    "federated.shamir": ("lagrange_weights", "recover_secret", "split_secret"),
    "attacks.differencing": ("difference_updates",),
    "privacy": (
        "PrivateNoise",
        "epsilon_spent",
        "gaussian_delta",
        "gaussian_epsilon",
        "noise_multiplier_for",
        "per_sample_gradients",
        "privacy_profile",
        "private_aggregate",
        "private_update",
    ),
    "private_training": ("PrivateStep", "PrivateTraining", "train_private"),
    "reconstruction_bound": (
        "candidate_likelihoods",
        "reconstruction_bound",
        "reconstruction_bound_of_epsilon",
        "candidate_bound",
    ),
    "encoding": ("Encoding",),
    "attacks.unmixing": ("mixing_weights", "unmix"),
    "attacks.label_search": ("infer_encoded_labels",),
    "federated.rounds": (
        "train_federated",
        "FederatedRun",
        "RoundReport",
        "evaluate_model",
        "model_bytes",
    ),
    "attacks.class_proportions": ("infer_class_proportions",),
    "attacks.gradinversion": ("BatchMoments", "GradInversionWeights", "known_moments"),
    "federated.heterogeneity": (
        "label_histograms",
        "total_variation",
        "update_similarity",
    ),
    "attacks.learning_rate": (
        "LearningRateEstimate",
        "infer_learning_rate",
        "learning_rate_profile",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("plots", "widgets")

__all__ = ["__version__", *_HOME_OF, *_MODULES]

try:
    __version__ = version("gradinv-helpers")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        home = importlib.import_module(f"gradinv_helpers.{_HOME_OF[name]}")
        value = getattr(home, name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"gradinv_helpers.{name}")
    raise AttributeError(f"module 'gradinv_helpers' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps a submodule from hiding the public function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
