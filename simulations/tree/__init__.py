"""The 2-D tree of the autoguidance paper: exact mixture, training, selection experiments, scores."""

from simulations.tree.mixture import (
    LEVEL,
    ExactDenoiser,
    GaussianMixture,
    classification_score,
    components,
    ground_truth,
    mandala_score,
)

__all__ = [
    "LEVEL", "ExactDenoiser", "GaussianMixture", "classification_score", "components", "ground_truth", "mandala_score",
]  # fmt: skip
