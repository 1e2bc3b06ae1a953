"""Learning rate as a function of the images seen. `--lr-schedule` chooses by the names in SCHEDULES."""

import math


def learning_rate_schedule(cur_nimg, batch_size, ref_lr=100e-4, ref_batches=70e3, rampup_Mimg=10):
    """EDM2's schedule (EDM2 eq. 67): linear ramp-up, then ref_lr / sqrt(max(t / ref_batches, 1)), t in batches.

    Each factor is skipped where its parameter is 0. Evaluated with the images seen before the step, so that the first
    step has lr 0.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(cur_nimg / (ref_batches * batch_size), 1))
    if rampup_Mimg > 0:
        lr *= min(cur_nimg / (rampup_Mimg * 1e6), 1)
    return lr


def halved_schedule(cur_nimg, batch_size, ref_lr=100e-4, ref_batches=70e3, rampup_Mimg=10):
    """The schedule of the multi-source experiments (Wang et al., ICML 2025, published code).

    As EDM2's, but lr halves suddenly at t = ref_batches and decays from there. The paper does not mention it.
    """
    lr = learning_rate_schedule(cur_nimg, batch_size, ref_lr, ref_batches, rampup_Mimg)
    return lr / 2 if ref_batches > 0 and cur_nimg > ref_batches * batch_size else lr


def constant_schedule(cur_nimg, batch_size, ref_lr=100e-4, ref_batches=0, rampup_Mimg=10):
    """Constant after the linear ramp-up."""
    return learning_rate_schedule(cur_nimg, batch_size, ref_lr, 0, rampup_Mimg)


def cosine_schedule(cur_nimg, batch_size, ref_lr=100e-4, ref_batches=70e3, rampup_Mimg=10):
    """Half a cosine from ref_lr to 0 over ref_batches batches, times the linear ramp-up."""
    progress = min(cur_nimg / (ref_batches * batch_size), 1) if ref_batches > 0 else 0
    return learning_rate_schedule(cur_nimg, batch_size, ref_lr, 0, rampup_Mimg) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES = {
    "edm2": learning_rate_schedule,
    "edm2-halved": halved_schedule,
    "constant": constant_schedule,
    "cosine": cosine_schedule,
}
