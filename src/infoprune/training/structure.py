"""What calibration tells the gates: what stands in for what they shut off, information rates, and spectra of a block's output.

For one block with contexts c (mean m, covariance S, that of unit u alone S_uu) a gate z_u is a channel that passes z_u (c_u - m_u) and
noise of covariance (1 - z_u^2) S_uu, so that power is kept. The best linear estimate of all contexts from what comes through, y, is

    c^ = m + S Z M(z)^-1 y,    M(z) = Z S Z + (I - Z^2) blockdiag(S_uu),

with Z = diag(z) (the Gaussian channel of the information bottleneck: Chechik, Globerson, Tishby & Weiss, JMLR 6, 2005; the estimate is
Wiener's). Its covariance is C^(z) = S Z M(z)^-1 Z S. Gates themselves add no noise: they send its mean, y = Z (c - m). At gates of 0 and 1
the estimate is the regression on the units that stay, S_.K S_KK^-1, which is what least-squares compensation leaves; with all gates open
it is c. A unit whose gate falls is missed by all that lean on it, and one whose gate rises helps them, so that what a gate does is what
the set-wise loss of :func:`infoprune.criteria.heads.information_loss` charges for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from infoprune.criteria.heads import Block, head_spectrum, noise_energy
from infoprune.linalg import descending_eigh, descending_eigvalsh
from infoprune.plan import Compensation
from infoprune.spectrum import normalize


@dataclass(frozen=True)
class StandIn:
    """A linear map that some columns of a block's contexts are replaced by.

    Attributes:
        through: (k,) columns that are read.
        rest: (r,) columns that are replaced.
        weight: (k, r), or (r,) where every replaced column is a multiple of itself.
        mean: (n,) m.
    """

    through: torch.Tensor
    rest: torch.Tensor
    weight: torch.Tensor
    mean: torch.Tensor

    def to(self, like: torch.Tensor) -> StandIn:
        """On the device of ``like``, weights in its precision."""
        return StandIn(self.through.to(like.device), self.rest.to(like.device), self.weight.to(like), self.mean.to(like))

    def replace(self, contexts: torch.Tensor) -> torch.Tensor:
        """(..., n) what the output projection reads, m + (c - m) weight in the replaced columns."""
        mean, weight = self.mean.to(contexts.dtype), self.weight.to(contexts.dtype)
        seen = (contexts - mean)[..., self.through]
        return contexts.index_copy(-1, self.rest, mean[self.rest] + (seen * weight if weight.dim() == 1 else seen @ weight))


@dataclass(frozen=True)
class Channel:
    """What passes the gates of one block, and what stands in for the rest.

    Attributes:
        covariance: (n, n) S, ridge included.
        mean: (n,) m, zero where nothing is put in the place of what is removed.
        unit_width: Columns of one unit.
        regress: Whether units that stay stand in for others; otherwise a gate scales its own unit alone, c^ = m + Z (c - m).
    """

    covariance: torch.Tensor
    mean: torch.Tensor
    unit_width: int
    regress: bool

    @classmethod
    def of(cls, block: Block, compensation: Compensation) -> Channel:
        """Of a block, float64."""
        mean = torch.zeros_like(block.mean) if compensation == "none" else block.mean
        return cls(block.covariance, mean, block.site.unit_width, compensation == "least-squares")

    def to(self, device: torch.device, dtype: torch.dtype) -> Channel:
        """The same elsewhere."""
        return replace(self, covariance=self.covariance.to(device, dtype), mean=self.mean.to(device, dtype))

    def columns(self, units: torch.Tensor) -> torch.Tensor:
        """Indices of the columns of those of all ``units`` (units,) that are true."""
        return units.repeat_interleave(self.unit_width).nonzero().flatten()

    def wiener(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Columns K with gates above 0 (k,), their z (k,), and M_KK^-1 Z_K S_K. (k, n), which depends on the gates differentiably."""
        if not ((gates > 0) & (gates < 1)).any():  # where all are clamped nothing comes back to them, and matrices need not wait for it
            gates = gates.detach()
        through = self.columns(gates > 0)
        z, unit = gates.repeat_interleave(self.unit_width)[through], through // self.unit_width
        seen = self.covariance[through]
        own = seen[:, through] * (unit[:, None] == unit)
        mixed = z[:, None] * seen[:, through] * z + (1 - z.square())[:, None] * own
        return through, z, torch.linalg.solve(mixed, z[:, None] * seen)

    def stand_in(self, gates: torch.Tensor) -> StandIn:
        """What shut and half open units are replaced by; differentiable in ``gates``. What is open passes as it is."""
        rest = self.columns(gates < 1)
        if not self.regress:
            return StandIn(rest, rest, gates.repeat_interleave(self.unit_width)[rest], self.mean)
        if not len(rest):
            return StandIn(rest, rest, self.covariance.new_empty(0, 0), self.mean)
        through, z, estimate = self.wiener(gates)
        return StandIn(through, rest, z[:, None] * estimate[:, rest], self.mean)

    def energies(self, gates: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """Variances along ``directions`` (n, count), diag(D^T C^(z) D) with C^ = Z S Z without regression; differentiable in the gates."""
        if not self.regress:
            scaled = gates.repeat_interleave(self.unit_width)[:, None] * directions
            return (scaled * (self.covariance @ scaled)).sum(0)
        through, z, estimate = self.wiener(gates)
        return (z[:, None] * (self.covariance[through] @ directions) * (estimate @ directions)).sum(0)

    def passed(self, gates: torch.Tensor) -> torch.Tensor:
        """(n, n) the covariance C^(z) of what passes."""
        if not self.regress:
            wide = gates.repeat_interleave(self.unit_width)
            return wide[:, None] * self.covariance * wide
        through, z, estimate = self.wiener(gates)
        return (z[:, None] * self.covariance[through]).T @ estimate


@dataclass(frozen=True)
class DenseStructure:
    """What does not depend on the gates; float64.

    Attributes:
        snr: (units, unit width) lambda_i / s^2 of each unit's output, for the rate.
        spectrum: (hidden,) cumulative energy shares C(k) of the dense block's output spectrum.
    """

    snr: torch.Tensor
    spectrum: torch.Tensor


def dense_structure(block: Block) -> DenseStructure:
    """Constants of one block, whatever its gates."""
    snr = torch.stack([head_spectrum(block, u) for u in range(block.site.num_units)]) / noise_energy(block)
    return DenseStructure(snr, normalize(descending_eigvalsh(block.out @ block.covariance @ block.out.T)).cumsum(0))


@dataclass(frozen=True)
class BlockStructure:
    """One block's constants between two refreshes; float32, on the gates' device.

    Attributes:
        snr, spectrum: As in :class:`DenseStructure`.
        directions: (n, hidden) W^T q for the eigenvectors q of the gated output's covariance at the last refresh. They stay outside the
            graph: to first order an eigenvalue's derivative is that of the energy along its eigenvector, and nothing divides by gaps
            between eigenvalues.
        channel: Of the block.
    """

    snr: torch.Tensor
    spectrum: torch.Tensor
    directions: torch.Tensor
    channel: Channel

    def rate(self, gates: torch.Tensor) -> torch.Tensor:
        """Information rate sum_u R_u(z_u), R(z) = 1/2 sum_i ln(1 + z^2 lambda_i / s^2), in nats per token; zero at z = 0."""
        return 0.5 * torch.log1p(gates[:, None].square() * self.snr).sum()

    def ks(self, gates: torch.Tensor) -> torch.Tensor:
        """KS distance max_k |C_z(k) - C(k)| between the spectra of the gated and the dense block's output, in [0, 1]."""
        energies = self.channel.energies(gates, self.directions).clamp_min(0)
        total = energies.sum()
        if float(total.detach()) <= 0:
            return gates.new_ones(()) + 0 * gates.sum()
        return ((energies / total).cumsum(0) - self.spectrum).abs().max()


def structure_of(block: Block, dense: DenseStructure, channel: Channel, gates: torch.Tensor, spectra: bool = True) -> BlockStructure:
    """Constants of one block at the present gates (units,), which turn the directions.

    Without ``spectra``, which take an eigenproblem of the hidden size, there are no directions, and so no KS distance.

    Args:
        block: Of S and W.
        dense: Of the block.
        channel: Of the block, as training uses it.
        gates: Present ones.
        spectra: Whether to find directions.
    """
    like = {"device": gates.device, "dtype": torch.float32}
    directions = torch.empty(len(block.covariance), 0)
    if spectra:
        exact = replace(channel, covariance=block.covariance, mean=block.mean)
        passed = exact.passed(gates.detach().cpu().double())
        directions = block.out.T @ descending_eigh(block.out @ passed @ block.out.T)[1]
    return BlockStructure(dense.snr.to(**like), dense.spectrum.to(**like), directions.to(**like), channel)


def closed(block: Block, kept: list[int], compensation: Compensation) -> StandIn:
    """What is left of a block whose units ``kept`` stay, as it will be when it is cut; solved in float64, exact."""
    channel = Channel.of(block, compensation)
    gates = torch.tensor([float(unit in kept) for unit in range(block.site.num_units)], dtype=torch.float64)
    return channel.stand_in(gates)
