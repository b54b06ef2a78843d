"""Float64 linear algebra for moment matrices."""

from __future__ import annotations

import torch

from infoprune.errors import CalibrationError

RELATIVE_FLOOR = 1e-6
BLOCK = 192  # rows of the blocks of symmetric products, of which those below the diagonal are not formed


def cholesky_factor(matrix: torch.Tensor, *, floor: float = RELATIVE_FLOOR) -> torch.Tensor:
    """Lower triangular L with L L^T = matrix, for a symmetric positive semi-definite (n, n) matrix; the identity for a zero one.

    Where some direction carries less than ``floor`` times the largest diagonal entry given those before it, that much is added to the
    diagonal: directions that calibration hardly saw are neither amplified by an inverse nor lost. Moments of fewer vectors than dimensions
    with large means are off by more than that, in either direction; there it is ten times as much, and so on until the factor exists.

    Raises:
        CalibrationError: It never does.
    """
    matrix = (matrix + matrix.T) / 2
    top = float(matrix.diagonal().max())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    if top <= 0:
        return identity
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or float(factor.diagonal().min()) ** 2 < floor * top:
        factor, failed = torch.linalg.cholesky_ex(matrix + floor * top * identity)
        while int(failed) and floor < 1:
            floor *= 10
            factor, failed = torch.linalg.cholesky_ex(matrix + floor * top * identity)
        if int(failed):
            raise CalibrationError("A matrix of moments has no factor: it is not finite, or not of moments.")
    return factor


def row_products(matrix: torch.Tensor) -> torch.Tensor:
    """M M^T, (n, n) float64 from (n, m), formed in float32 or better: half the time of float64, for what need not be exact."""
    wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    return (wide @ wide.T).double()


def add_products_(total: torch.Tensor, weighted: torch.Tensor, vectors: torch.Tensor) -> None:
    """Add sum_t w_t x_t x_t^T to ``total`` (n, n), wherever that is; the blocks on and above its diagonal alone are of use.

    Args:
        total: Read it by :func:`mirrored_`.
        weighted: (t, n) the w_t x_t.
        vectors: (t, n) the x_t.
    """
    for start in range(0, len(total), BLOCK):
        total[start : start + BLOCK, start:] += (weighted[:, start : start + BLOCK].T @ vectors[:, start:]).to(total.device)


def mirrored_(total: torch.Tensor) -> torch.Tensor:
    """What lies above the diagonal of ``total`` (n, n) put in place below it, in place."""
    for start in range(0, len(total), BLOCK):
        end = start + BLOCK
        total[start:end, start:end] = total[start:end, start:end].triu() + total[start:end, start:end].triu(1).T
        total[end:, start:end] = total[start:end, end:].T
    return total


def with_ridge(matrix: torch.Tensor, relative: float) -> torch.Tensor:
    """Matrix + relative * mean diagonal * identity; the identity for a zero matrix."""
    scale = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return matrix + relative * scale * identity if scale > 0 else identity


def descending_eigvalsh(matrix: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (n,), clamped at 0, largest first: several times faster than with the eigenvectors."""
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0).clamp_min(0)


def descending_eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (n,), clamped at 0, largest first, and the eigenvectors (n, n) in columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)
