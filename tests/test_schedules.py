"""Learning rates against published values and continuity."""

from inspect import signature

import pytest

from training.schedules import SCHEDULES, constant_schedule, cosine_schedule, halved_schedule, learning_rate_schedule

# EDM2 defaults at batch 2048: images seen -> learning rate.
TABLE = {
    0: 0, 2048: 2.048e-6, 20480: 2.048e-5, 10**6: 1e-3, 10**7: 1e-2, 143_360_000: 1e-2, 573_440_000: 5e-3,
    2**31: 2.5837415e-3,
}  # fmt: skip


@pytest.mark.parametrize("nimg", TABLE)
def test_published_values(nimg):
    assert learning_rate_schedule(nimg, 2048) == pytest.approx(TABLE[nimg], rel=1e-7)


@pytest.mark.parametrize("nimg", [0, 1, 10**6, 10**12])
def test_factors_switch_off(nimg):
    assert learning_rate_schedule(nimg, 2048, ref_lr=0.3, ref_batches=0, rampup_Mimg=0) == 0.3
    assert learning_rate_schedule(nimg, 64, 1, 0, 10) == min(nimg / 1e7, 1)
    assert learning_rate_schedule(nimg, 10, 1, 100, 0) == pytest.approx(max(nimg / 1000, 1) ** -0.5)


def test_halved_schedule_drops_at_the_reference():
    """Multi-source experiments: lr = ref / sqrt(4 t / t_ref) after t_ref, the plain value up to it."""
    arguments = dict(batch_size=100, ref_lr=0.01, ref_batches=1000, rampup_Mimg=0)
    assert halved_schedule(100_000, **arguments) == 0.01
    assert halved_schedule(100_001, **arguments) == pytest.approx(0.005, rel=1e-4)
    assert halved_schedule(400_000, **arguments) == pytest.approx(0.01 / (4 * 4) ** 0.5)
    usual = (2048, 100e-4, 70e3, 10)
    assert halved_schedule(0, *usual) == 0 and halved_schedule(5 * 10**6, *usual) == pytest.approx(0.005)


def test_constant_and_cosine():
    assert constant_schedule(10**9, 64, 0.2, 5, 0) == 0.2
    assert cosine_schedule(0, 10, 1.0, 100, 0) == 1
    assert cosine_schedule(500, 10, 1.0, 100, 0) == pytest.approx(0.5)
    assert cosine_schedule(250, 10, 1.0, 100, 0) == pytest.approx((1 + 0.5**0.5) / 2)
    assert cosine_schedule(10**6, 10, 1.0, 100, 0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", [name for name, f in SCHEDULES.items() if "selection" not in signature(f).parameters])
def test_ramp_up_is_linear(name):
    values = [SCHEDULES[name](n, 64, 0.1, 10**6, 1.0) for n in (0, 250_000, 500_000)]
    assert values[0] == 0 and values[2] == pytest.approx(2 * values[1], rel=1e-2)
