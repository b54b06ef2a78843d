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
        snr, dense: As in :class:`BlockStructure`.
    """

    snr: torch.Tensor
    dense: torch.Tensor


def dense_structure(block: Block) -> DenseStructure:
    """Constants of one block, whatever its gates."""
    snr = torch.stack([head_spectrum(block, u) for u in range(block.site.num_units)]) / noise_energy(block)
    return DenseStructure(snr, normalize(descending_eigh(block.out @ block.covariance @ block.out.T)[0]).cumsum(0))


def energy_forms(block: Block, directions: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """The quadratic forms Q of the energies along ``directions``, (hidden, units + 1, units + 1), without any of the maps A_a.

    A unit's map A_u = W E_u D, with D = I - C and E_u the projection on its columns, differs from the next one's only in the columns of
    W that it takes. So with P = directions^T W (hidden, n) and R = D S D^T (n, n) the entry of units u and v in direction k is

        P_ku R_uv P_kv^T,   and with A_0 = W C:   Q_k0v = (P C)_k (S D^T)_v P_kv^T,   Q_k00 = (P C)_k S (P C)_k^T,

    where subscripts u and v take a unit's columns. All units together take as many products as a single map does.

    Args:
        block: Of S and W.
        directions: (hidden, hidden) in columns.
        coefficient: (n, n) C.
    """
    units = block.site.num_units
    rest = torch.eye(len(coefficient), dtype=torch.float64) - coefficient
    weight = directions.T @ block.out

    def by_unit(rows: torch.Tensor) -> torch.Tensor:  # (hidden, n) -> (hidden, units)
        return (rows * weight).view(len(weight), units, -1).sum(-1)

    forms = weight.new_empty(len(weight), units + 1, units + 1)
    standing_in = weight @ coefficient
    seen = standing_in @ block.covariance
    forms[:, 0, 0] = (seen * standing_in).sum(1)
    forms[:, 0, 1:] = forms[:, 1:, 0] = by_unit(seen @ rest.T)
    residual = rest @ block.covariance @ rest.T
    for unit in range(units):
        c = block.columns(unit)
        forms[:, unit + 1, 1:] = by_unit(weight[:, c] @ residual[c])
    return forms


def structure_of(
    block: Block, dense: DenseStructure, gates: torch.Tensor, compensation: Compensation, spectra: bool = True
) -> BlockStructure:
    """Constants of one block at the present gates (units,), which say what stays (z > 1/2) and turn the directions.

    Without ``spectra``, which take an eigenproblem of the hidden size, there are no energies, and so no KS distance.
    """
    z = gates.detach().cpu().double()
    kept = [u for u in range(block.site.num_units) if z[u] > 0.5]
    coefficient, mean = stand_in(block, kept, compensation)
    if not spectra:
        nothing = torch.empty(0, *[block.site.num_units + 1] * 2)
        return BlockStructure(*(piece.to(gates.device, torch.float32) for piece in (coefficient, mean, dense.snr, dense.dense, nothing)))
    gated = block.out * z.repeat_interleave(block.site.unit_width)
    now = gated + (block.out - gated) @ coefficient  # sum_a z_a A_a
    directions = descending_eigh(now @ block.covariance @ now.T)[1]
    pieces = (coefficient, mean, dense.snr, dense.dense, energy_forms(block, directions, coefficient))
    return BlockStructure(*(piece.to(gates.device, torch.float32) for piece in pieces))
