"""Algebra on states u [N, V, *data_shape]: matrices over the variables, numbers over samples."""

from __future__ import annotations

import torch


def expand(values: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Append axes to `values` (scalar or [N]) so that it broadcasts against `like` [N, ...], on its device."""
    values = torch.as_tensor(values).to(device=like.device)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


def flatten(u: torch.Tensor, V: int) -> torch.Tensor:
    """u as float64 [N, V, d]. Raises ValueError unless it has V variables."""
    if u.ndim < 2 or u.shape[1] != V:
        raise ValueError(f"state of shape {tuple(u.shape)}: this process has {V} variables, [N, {V}, ...]")
    return u.reshape(*u.shape[:2], -1).to(torch.float64)


def apply_matrix(matrix: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """matrix [V, V] or [N, V, V] times the state, in float64, as u's type."""
    return (matrix.to(u.device) @ flatten(u, matrix.shape[-1])).reshape(u.shape).to(u.dtype)
