"""Algebra on states u [N, V, *data_shape]: matrices over the variables, numbers over samples."""

from __future__ import annotations

import torch

from torch_utils.devices import send


def expand(values: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Append axes to `values` (scalar or [N]) so that it broadcasts against `like` [N, ...], axes on its device."""
    values = torch.as_tensor(values)
    if not values.ndim:
        return values  # a number may meet tensors of every device
    return send(values, like.device).reshape(values.shape + (1,) * (like.ndim - values.ndim))


def flatten(u: torch.Tensor, V: int) -> torch.Tensor:
    """u as [N, V, d]. Raises ValueError unless it has V variables."""
    if u.ndim < 2 or u.shape[1] != V:
        raise ValueError(f"state of shape {tuple(u.shape)}: this process has {V} variables, [N, {V}, ...]")
    return u.reshape(*u.shape[:2], -1)


def apply_matrix(matrix: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """matrix [V, V] or [N, V, V] times the state, in its type."""
    return (send(matrix.to(u.dtype), u.device) @ flatten(u, matrix.shape[-1])).reshape(u.shape)
