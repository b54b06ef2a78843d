"""Float64 linear algebra for moment matrices."""

from __future__ import annotations

import torch

RELATIVE_FLOOR = 1e-6


def symmetric_power(matrix: torch.Tensor, power: float, *, floor: float = RELATIVE_FLOOR) -> torch.Tensor:
    """Matrix ** power for a symmetric positive semi-definite (n, n) matrix, by its eigendecomposition.

    Eigenvalues below ``floor`` times the largest are raised to it: directions that calibration hardly saw are neither amplified by
    an inverse nor lost.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    top = float(values[-1])
    if top <= 0:
        return torch.eye(len(matrix), dtype=matrix.dtype)
    return (vectors * values.clamp_min(floor * top).pow(power)) @ vectors.T


def root_and_inverse(matrix: torch.Tensor, *, floor: float = RELATIVE_FLOOR) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root and its inverse, from one eigendecomposition; same floor as :func:`symmetric_power`."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    top = float(values[-1])
    if top <= 0:
        identity = torch.eye(len(matrix), dtype=matrix.dtype)
        return identity, identity
    roots = values.clamp_min(floor * top).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def with_ridge(matrix: torch.Tensor, relative: float) -> torch.Tensor:
    """Matrix + relative * mean diagonal * identity; the identity for a zero matrix."""
    scale = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return matrix + relative * scale * identity if scale > 0 else identity


def descending_eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (n,), clamped at 0, largest first, and the eigenvectors (n, n) in columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)
