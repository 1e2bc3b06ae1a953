"""Which examples to train on: selection functions, and the selector that scores candidates for them."""

from training.selection.functions import FUNCTIONS, conditional_logits, hard_loss, jointly_sample_batch
from training.selection.selector import IdentitySelector, LossSelector

__all__ = ["FUNCTIONS", "IdentitySelector", "LossSelector", "conditional_logits", "hard_loss", "jointly_sample_batch"]
