"""Learning rate as a function of the images seen. `--lr-schedule` chooses by the names in SCHEDULES."""

import math


def learning_rate_schedule(
    cur_nimg: float, batch_size: int, ref_lr: float = 100e-4, ref_batches: float = 70e3, rampup_Mimg: float = 10
) -> float:
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


def halved_schedule(cur_nimg: float, batch_size: int, ref_lr: float, ref_batches: float, rampup_Mimg: float) -> float:
    """The schedule of the multi-source experiments (Wang et al., ICML 2025, published code).

    As EDM2's, but lr halves suddenly at t = ref_batches and decays from there. The paper does not mention it.
    """
    lr = learning_rate_schedule(cur_nimg, batch_size, ref_lr, ref_batches, rampup_Mimg)
    return lr / 2 if ref_batches > 0 and cur_nimg > ref_batches * batch_size else lr


def constant_schedule(cur_nimg: float, batch_size: int, ref_lr: float, ref_batches: float, rampup_Mimg: float) -> float:
    """Constant after the linear ramp-up."""
    return learning_rate_schedule(cur_nimg, batch_size, ref_lr, 0, rampup_Mimg)


def cosine_schedule(cur_nimg: float, batch_size: int, ref_lr: float, ref_batches: float, rampup_Mimg: float) -> float:
    """Half a cosine from ref_lr to 0 over ref_batches batches, times the linear ramp-up."""
    progress = min(cur_nimg / (ref_batches * batch_size), 1) if ref_batches > 0 else 0
    return learning_rate_schedule(cur_nimg, batch_size, ref_lr, 0, rampup_Mimg) * (1 + math.cos(math.pi * progress)) / 2


def ajest_learning_rate(
    cur_nimg: float,  # images trained on, this step's included
    cur_step: float,  # steps before this one
    super_batch: float = 2048,  # candidates per step
    mini_batch: float | None = None,  # images trained on per selecting step; None: super_batch
    selecting: bool = False,  # whether this step selects
    when: str = "always",  # "always", "early" (selection ended at the switch) or "late" (it began there)
    change_nimg: float = 0,  # images trained on at the switch ...
    change_step: float = 0,  # ... and steps; 0: no switch yet
    ref_lr: float = 100e-4,
    ref_batches: float = 70e3,  # steps; 0: no decay
    rampup_Mimg: float = 10,  # million images; 0: no ramp
) -> float:
    """The learning rate of AJEST's published code (Pais et al. 2025), where a selecting step counts as super_batch images.

    With F = super_batch / mini_batch: while selecting, images and steps count F times and the ramp is F times shorter, so
    in steps everything is F times, in trained images F^2 times faster; after a switch the stretch before it keeps its
    count. The decay is continuous at a switch, the ramp is not if the switch comes before its end. Raises ValueError
    for super_batch < mini_batch, or a selecting step with both equal.
    """
    mini_batch = super_batch if mini_batch is None else mini_batch
    if super_batch < mini_batch or (selecting and super_batch == mini_batch):
        raise ValueError(f"a super-batch of {super_batch} is too small to select {mini_batch} images from")
    factor = super_batch / mini_batch
    if change_step and when == "early" and not selecting:
        cur_nimg, cur_step = cur_nimg + (factor - 1) * change_nimg, cur_step + (factor - 1) * change_step
    if change_step and when == "late" and selecting:
        cur_nimg, cur_step = cur_nimg - (1 - 1 / factor) * change_nimg, cur_step - (1 - 1 / factor) * change_step
    speed = factor if selecting else 1
    lr = ref_lr
    if rampup_Mimg > 0:
        lr *= min(cur_nimg * speed / (rampup_Mimg * 1e6 / speed), 1)
    if ref_batches > 0:
        lr /= math.sqrt(max(cur_step * speed / ref_batches, 1))
    return lr


def ajest_schedule(
    cur_nimg: float, batch_size: int, ref_lr: float, ref_batches: float, rampup_Mimg: float, *, selection: dict
) -> float:
    """`ajest_learning_rate` of a run with batches of batch_size trained images. selection: the selector's `progress()`."""
    change = 0 if selection["beaten_at"] is None else selection["beaten_at"] + batch_size  # the step after the trigger
    sizes = batch_size * selection["ratio"], batch_size
    phase = selection["selecting"], selection["when"], change, change / batch_size
    position = cur_nimg + batch_size, cur_nimg / batch_size
    return ajest_learning_rate(*position, *sizes, *phase, ref_lr, ref_batches, rampup_Mimg)


SCHEDULES = {  # one that declares `selection` gets the selector's progress()
    "ajest": ajest_schedule,
    "edm2": learning_rate_schedule,
    "edm2-halved": halved_schedule,
    "constant": constant_schedule,
    "cosine": cosine_schedule,
}
