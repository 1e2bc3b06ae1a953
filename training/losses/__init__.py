"""What is learned from the noise: losses in two phases, `draw` (all that is random) and `evaluate` (what is learned)."""

from training.losses.denoising import DenoisingLoss, Draws, EDM2Loss, EDMLoss, Loss, Objective, VELoss, VPLoss
from training.losses.targets import StableTargets, stf_targets
from training.schedules import learning_rate_schedule

__all__ = ["DenoisingLoss", "Draws", "EDM2Loss", "EDMLoss", "Loss", "Objective", "VELoss", "VPLoss"]
__all__ += ["StableTargets", "learning_rate_schedule", "stf_targets"]
