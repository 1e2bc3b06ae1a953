"""What solvers yield on their way."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch


class State(NamedTuple):
    """What a solver's generator yields: after `step` steps the state stands at `time` (heun: the noise level)."""

    step: int
    time: float
    state: torch.Tensor


def last_of(states: Iterator[State]) -> State:
    """Run a generator of States to its end and return the last one."""
    return deque(states, maxlen=1).pop()
