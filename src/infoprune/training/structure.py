"""What calibration tells the gates: compensation, information rates, and spectra of a block's output as functions of its gates.

For one block with contexts c (mean m, covariance S), output projection W and compensation C, the gated output's deviation from its mean is

    o(z) = sum_u z_u W_u (c_u - C_u c) + W C c = sum_{a=0..n} z_a A_a c,   z_0 = 1,

so its energy along any direction q is the quadratic form z^T Q z with Q_ab = q^T A_a S A_b^T q. Directions are the eigenvectors of the
gated output's covariance at the last refresh. They stay outside the graph: to first order an eigenvalue's derivative is that of the
energy along its eigenvector, and nothing divides by gaps between eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infoprune.criteria.heads import Block, head_spectrum, noise_energy
from infoprune.linalg import descending_eigh
from infoprune.plan import Compensation
from infoprune.spectrum import normalize


@dataclass(frozen=True)
class BlockStructure:
    """One block's constants between two refreshes; float32, on the gates' device.

    Attributes:
        coefficient: (n, n) C, zero without regression.
        mean: (n,) m, zero without compensation.
        snr: (units, unit width) lambda_i / s^2 of each unit's output, for the rate.
        dense: (hidden,) cumulative energy shares C(k) of the dense block's output spectrum.
        forms: (hidden, units + 1, units + 1) the quadratic forms Q, one per direction.
    """

    coefficient: torch.Tensor
    mean: torch.Tensor
    snr: torch.Tensor
    dense: torch.Tensor
    forms: torch.Tensor

    def rate(self, gates: torch.Tensor) -> torch.Tensor:
        """Information rate sum_u R_u(z_u), R(z) = 1/2 sum_i ln(1 + z^2 lambda_i / s^2), in nats per token; zero at z = 0."""
        return 0.5 * torch.log1p(gates[:, None].square() * self.snr).sum()

    def ks(self, gates: torch.Tensor) -> torch.Tensor:
        """KS distance max_k |C_z(k) - C(k)| between the spectra of the gated and the dense block's output, in [0, 1]."""
        z = torch.cat([gates.new_ones(1), gates])
        energies = torch.einsum("kab,a,b->k", self.forms, z, z).clamp_min(0)
        total = energies.sum()
        if float(total.detach()) <= 0:
            return gates.new_ones(()) + 0 * gates.sum()
        return ((energies / total).cumsum(0) - self.dense).abs().max()


def leave_one_out(block: Block, kept: list[int]) -> torch.Tensor:
    """Least-squares coefficients of every unit on the kept units other than itself, (n, n); rows of a unit nothing else explains are zero.

    For a removed unit S_uK S_KK^-1; for a kept one -Lambda_uu^-1 Lambda_uK' with Lambda = S_KK^-1 and K' = K without u, which is the same
    regression by the inverse of a partitioned matrix.
    """
    n = len(block.covariance)
    coefficient = torch.zeros(n, n, dtype=torch.float64)
    if not kept:
        return coefficient
    k = block.index(kept)
    precision = torch.linalg.inv(block.covariance[k][:, k])
    for unit in range(block.site.num_units):
        rows = torch.arange(block.columns(unit).start, block.columns(unit).stop)
        if unit not in kept:
            coefficient[rows[:, None], k[None]] = block.covariance[rows][:, k] @ precision
        elif len(kept) > 1:
            place = kept.index(unit) * block.site.unit_width
            own = slice(place, place + block.site.unit_width)
            others = torch.ones(len(k), dtype=torch.bool)
            others[own] = False
            coefficient[rows[:, None], k[others][None]] = -torch.linalg.solve(precision[own, own], precision[own][:, others])
    return coefficient


def stand_in(block: Block, kept: list[int], compensation: Compensation) -> tuple[torch.Tensor, torch.Tensor]:
    """C (n, n) and m (n,) of what stands in for each unit while ``kept`` stay; zero as far as compensation does not go."""
    regression = compensation == "least-squares"
    return (
        leave_one_out(block, kept) if regression else torch.zeros_like(block.covariance),
        torch.zeros_like(block.mean) if compensation == "none" else block.mean,
    )


@dataclass(frozen=True)
class DenseStructure:
    """What does not depend on the gates; float64.

    Attributes:
        root: (n, n) Cholesky factor of S.
        snr, dense: As in :class:`BlockStructure`.
    """

    root: torch.Tensor
    snr: torch.Tensor
    dense: torch.Tensor


def dense_structure(block: Block) -> DenseStructure:
    """Constants of one block, whatever its gates."""
    root = torch.linalg.cholesky(block.covariance)
    output = block.out @ root
    snr = torch.stack([head_spectrum(block, u) for u in range(block.site.num_units)]) / noise_energy(block)
    return DenseStructure(root, snr, normalize(descending_eigh(output @ output.T)[0]).cumsum(0))


def structure_of(block: Block, dense: DenseStructure, gates: torch.Tensor, compensation: Compensation) -> BlockStructure:
    """Constants of one block at the present gates (units,), which say what stays (z > 1/2) and turn the directions."""
    z = gates.detach().double().cpu()
    kept = [u for u in range(block.site.num_units) if z[u] > 0.5]
    n, root = len(block.covariance), dense.root
    coefficient, mean = stand_in(block, kept, compensation)
    identity = torch.eye(n, dtype=torch.float64)
    maps = [block.out @ coefficient @ root]  # A_0 S^1/2, then one per unit
    for unit in range(block.site.num_units):
        c = block.columns(unit)
        maps.append(block.out[:, c] @ (identity[c] - coefficient[c]) @ root)
    stacked = torch.stack(maps)
    now = torch.einsum("a,ahn->hn", torch.cat([z.new_ones(1), z]), stacked)
    directions = descending_eigh(now @ now.T)[1]
    projected = directions.T @ stacked
    pieces = (
        coefficient,
        mean,
        dense.snr,
        dense.dense,
        torch.einsum("akn,bkn->kab", projected, projected),
    )
    return BlockStructure(*(piece.to(gates.device, torch.float32) for piece in pieces))
