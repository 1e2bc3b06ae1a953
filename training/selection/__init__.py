"""Which examples to train on: selection functions, and the selector that scores candidates for them."""

from training.selection.functions import (
    FUNCTIONS,
    conditional_logits,
    diverse_learnability,
    easy_reference,
    hard_loss,
    jointly_sample_batch,
    proportional,
    random_baseline,
    requirements_of,
    selection_size,
)
from training.selection.selector import IdentitySelector, LossSelector, check_choice

__all__ = [
    "FUNCTIONS", "IdentitySelector", "LossSelector", "check_choice", "conditional_logits", "diverse_learnability",
    "easy_reference", "hard_loss", "jointly_sample_batch", "proportional", "random_baseline", "requirements_of",
    "selection_size",
]  # fmt: skip
